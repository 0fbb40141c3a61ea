"""Where the ranges of a quantized graph come from: options that commands share, and their sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from unirt.cli.terminal import waiting
from unirt.errors import ModelError, OptionError
from unirt.model import Model
from unirt.precision.calibration.calibrate import observe
from unirt.precision.calibration.histogram import BINS, PERCENTILE, Method
from unirt.precision.calibration.moments import SecondMoments, second_moments
from unirt.precision.calibration.ranges import Calibration, RangeLike

CALIBRATED: Final = ("int8", "fp8")
"""Precisions that need ranges."""

IN_SAMPLE: Final = (
    "It was measured on the samples that its ranges were found on: other samples, given with "
    "--test, tell more."
)

ROUNDED_ON: Final = (
    "It was measured on the samples that its weights were rounded on, where it is better than "
    "elsewhere: other samples, given with --test, tell more."
)

SampleFile = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FILE.NPZ", help="Samples by input name, to find the ranges on."
    ),
]
TestFile = Annotated[
    Path | None,
    typer.Option(
        "--test",
        metavar="FILE.NPZ",
        help="Samples to measure the result on; with `labels`, accuracy too. Default: --data.",
    ),
]
RoundingFile = Annotated[
    Path | None,
    typer.Option(
        "--round-on",
        metavar="FILE.NPZ",
        help="Samples to round weights on, so that errors cancel out there: closer, and takes "
        "longer. Default: each channel by itself.",
    ),
]
MethodName = Annotated[
    Method | None,
    typer.Option("--method", help="How ranges are found. Default: mse."),
]
Percentile = Annotated[
    float | None,
    typer.Option("--percentile", help=f"For that method. Default: {PERCENTILE:g}."),
]
Bins = Annotated[
    int | None,
    typer.Option(
        "--bins",
        help=f"Of the histogram of each tensor, a power of two from 256 to 65536. Default: {BINS}.",
    ),
]
SavedRanges = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Ranges saved before, by `unirt calibrate` for one.",
    ),
]
RangeTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--range", metavar="NAME=LOW:HIGH", help="The range of a tensor, by hand. Repeatable."
    ),
]


@dataclass(frozen=True)
class Found:
    """The ranges to quantize by, those of all values seen, and what weights are rounded by; each
    None where it was not asked for.
    """

    ranges: Calibration | None
    seen: Calibration | None
    moments: SecondMoments | None


@dataclass(frozen=True)
class RangeOptions:
    """How the ranges of a command are to be found, and on what weights are rounded."""

    precision: str
    data: Path | None = None
    calibration: Path | None = None
    method: Method | None = None
    percentile: float | None = None
    bins: int | None = None
    by_hand: Sequence[str] = ()
    round_on: Path | None = None

    @property
    def calibrating(self) -> bool:
        """Whether ranges are to be found on data."""
        return self.data is not None and self.calibration is None and self.precision in CALIBRATED

    def check(self, model: Model, save: Path | None = None) -> None:
        """Raises OptionError for options that would change nothing."""
        finding = {"--method": self.method, "--percentile": self.percentile, "--bins": self.bins}
        given = {
            "--calibration": self.calibration,
            "--range": self.by_hand or None,
            "--save-calibration": save,
        }
        unused, why = "", ""
        if self.precision not in CALIBRATED:
            unused = _first({**given, **finding})
            why = f"{self.precision} quantizes no activations by ranges."
        elif not self.calibrating:
            unused = _first(finding)
            why = "Ranges are found on data, and not where a file has them."
        elif self.percentile is not None and self.method not in (None, "percentile"):
            unused, why = "--percentile", f"The method {self.method} has none."
        if unused:
            raise OptionError(f"{unused} means nothing here.", why, "Leave it out.", option=unused)
        if save is not None and not (self.calibrating or self.by_hand):
            raise OptionError(
                "There is no new calibration to save.",
                "It comes of --data or --range, and neither is given.",
                "Add --data FILE.npz, or leave --save-calibration out.",
            )
        if self.round_on is not None and (
            model.primary.format == "tflite" or self.precision == "fp8"
        ):
            fp8 = self.precision == "fp8"
            what = "fp8 is" if fp8 else "a .tflite is, by ai-edge-quantizer,"
            raise OptionError(
                "--round-on does not go with this.",
                f"It is about the whole numbers that weights become, and {what} rounded to "
                "nearest.",
                "Leave it out.",
            )

    def own(self, test: Path | None) -> list[str]:
        """What to tell where the samples that measure are those that the options found it on."""
        notes = [IN_SAMPLE] if test is None and self.calibrating else []
        if self.round_on is not None and self.round_on == (test or self.data):
            notes.append(ROUNDED_ON)
        return notes

    def find(self, model: Model, as_json: bool) -> Found:
        """What the options say of this model. Raises what `observe`, `second_moments` and
        `Calibration` raise.
        """
        by_hand = read_ranges(self.by_hand)
        ranges = seen = None
        if self.calibration is not None:
            ranges = seen = Calibration.load(self.calibration)
        elif self.calibrating:
            assert self.data is not None
            with waiting(f"calibrating {model.name}", as_json):
                how, share = chosen_method(self.method, self.percentile)
                observed = observe(model, self.data, bins=BINS if self.bins is None else self.bins)
                ranges = observed.calibration(how, percentile=share)
                seen = observed.calibration("max")
        if by_hand:
            ranges = (
                ranges.with_ranges(by_hand)
                if ranges is not None
                else Calibration.from_ranges(model, by_hand)
            )
        moments = None
        if self.round_on is not None:
            with waiting(f"looking at what {model.name} sums up", as_json):
                moments = second_moments(model, self.round_on)
        return Found(ranges, seen, moments)


def _first(options: Mapping[str, object]) -> str:
    return next((flag for flag, value in options.items() if value is not None), "")


def chosen_method(method: Method | None, percentile: float | None) -> tuple[Method, float]:
    """A percentile alone names its method too."""
    how: Method = method or ("mse" if percentile is None else "percentile")
    return how, PERCENTILE if percentile is None else percentile


def read_ranges(texts: Sequence[str]) -> dict[str, RangeLike]:
    """`NAME=LOW:HIGH`, or `NAME=LARGEST`, by name; names may hold = and : themselves."""
    found: dict[str, RangeLike] = {}
    for text in texts:
        name, equals, ends = text.rpartition("=")
        try:
            numbers = [float(end) for end in ends.split(":")]
        except ValueError:
            numbers = []
        if not equals or not name or len(numbers) not in (1, 2) or name in found:
            raise OptionError(
                f"--range {text} cannot be used.",
                "It names a tensor that another one names."
                if name in found
                else "It is the name of a tensor, =, and the lower and the upper end with : "
                "between them.",
                "Write for example --range /conv1/Relu_output_0=0:6.",
                text=text,
            )
        found[name] = (numbers[0], numbers[1]) if len(numbers) == 2 else numbers[0]
    return found


def with_onnx(model: Model, ranges: Calibration | None) -> Model:
    """A .tflite with the ONNX file beside it where the ranges are that one's; else the model."""
    if model.primary.format != "tflite" or ranges is None or ranges.model == model.hash:
        return model
    if model.path is None:
        return model
    try:
        both = Model(model.path, beside=True)
    except ModelError:
        return model
    onnx = both.formats.get("onnx")
    return both if onnx is not None and onnx.hash == ranges.model else model


def ranges_document(ranges: Calibration | None, saved: Path | None = None) -> dict[str, Any] | None:
    if ranges is None:
        return None
    return {
        "method": ranges.method,
        "samples": ranges.samples,
        "saved": str(saved) if saved else None,
    }

"""`unirt quantize`: a model in int8 or less, what of it is not, and what that costs."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.text import Text

from unirt import plugins
from unirt.cli.arguments import Debug, Json, ModelPath, complete_candidate
from unirt.cli.outcome import NOTHING, OK, reporting
from unirt.cli.saving import Out, check_apart, check_out, save_whole
from unirt.cli.sparsify import cost_text
from unirt.cli.terminal import (
    Column,
    plural,
    print_heading,
    print_pairs,
    print_table,
    size_text,
    stdout,
    telling,
    waiting,
)
from unirt.devices import host_devices
from unirt.errors import BackendUnavailable, ModelError, OptionError
from unirt.model import Model
from unirt.precision.calibration.calibrate import observe
from unirt.precision.calibration.histogram import PERCENTILE, Method
from unirt.precision.calibration.ranges import Calibration, RangeLike
from unirt.precision.casting.cast import cast
from unirt.precision.casting.plan import SCALES
from unirt.precision.partial.measure import Sensitivity
from unirt.precision.partial.search import Budget, Search, search
from unirt.precision.partial.trial import Measured, Trial
from unirt.precision.quantization.litert import quantize_tflite
from unirt.precision.quantization.quantize import PRECISIONS, Precision
from unirt.precision.quantization.quantize import quantize as quantize_model
from unirt.precision.quantization.recipes import RECIPES, find_recipe, recipe_for
from unirt.types import Candidate

_CALIBRATED: Final = ("int8", "fp8")
"""Precisions that need ranges."""


@dataclass
class _Made:
    """What came of it, whatever the format."""

    model: Model
    precision: str
    recipe: str
    nodes: Sequence[str]
    kept: Mapping[str, str]
    notes: list[str]
    calibration: Calibration | None = None
    measured: Measured | None = None
    accuracy: float | None = None
    engine: str = ""
    samples: int = 0
    search: Search | None = None
    budgeted: Sequence[str] = field(default=())
    rest: str = "fp32"


def quantize(
    model: ModelPath,
    out: Out,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE.NPZ", help="Samples by input name, to find the ranges on."
        ),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(
            "--test",
            metavar="FILE.NPZ",
            help="Samples to measure the result on; with `labels`, accuracy too. Default: --data.",
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help=f"One of {', '.join(PRECISIONS)}; for a .tflite int8, int8-dynamic or "
            "int8-weights.",
        ),
    ] = "int8",
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help=f"How the target wants it: {', '.join(RECIPES)}, or auto for the CPU of this "
            "machine. Default: tensorrt.",
        ),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="CANDIDATE",
            help="The engine that shall run it, instead of --recipe.",
            autocompletion=complete_candidate,
        ),
    ] = None,
    rest: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(
            "--rest",
            help="What all nodes that are not quantized compute in. Default: fp32, or what the "
            "engine that --for names wants.",
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option("--method", help="How ranges are found. Default: mse."),
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option("--percentile", help=f"For that method. Default: {PERCENTILE:g}."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="Ranges saved before."),
    ] = None,
    save_calibration: Annotated[
        Path | None,
        typer.Option("--save-calibration", metavar="FILE", help="Where to save the ranges."),
    ] = None,
    range_: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            metavar="NAME=LOW:HIGH",
            help="The range of a tensor, by hand. Repeatable.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="NODE", help="A node to leave in float32. Repeatable."),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option("--block", help="For weights only: how many share a scale. Default: 32."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            "--max-drop",
            metavar="SHARE",
            help="Leave as many nodes in float32 as accuracy needs to fall by at most this share "
            "of the samples: 0.5% or 0.005.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", help="The same for the relative error of the outputs."),
    ] = None,
    min_snr: Annotated[
        float | None,
        typer.Option("--min-snr", help="The same for the signal-to-noise ratio, in dB."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="Measures the result. Default: one that computes Q/DQ exactly as written.",
            autocompletion=complete_candidate,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a float32 model, and show what each node became and what that costs.

    With --max-drop, --max-error or --min-snr it looks for the fewest nodes to leave in float32, and
    writes no model where nothing meets that.
    """
    with reporting(as_json, debug) as report:
        opened = Model(model)
        limits = (_share(max_drop), max_error, min_snr)
        budget = Budget(*limits) if any(one is not None for one in limits) else None
        check_out(out, opened, f".{opened.primary.format}")
        chosen = _recipe(opened, recipe, for_)
        wanted_rest = _rest(opened, rest, chosen if for_ is not None else None)
        given = _ranges(range_)
        calibrating = data is not None and calibration is None and precision in _CALIBRATED
        _check_ranges(
            precision,
            calibrating,
            {
                "--calibration": calibration,
                "--range": range_,
                "--save-calibration": save_calibration,
            },
            {"--method": method, "--percentile": percentile},
        )
        _check_files(opened, out, save_calibration, calibration, data)
        measured_on = test if test is not None else data
        if budget is not None and measured_on is None:
            raise OptionError(
                "There is a budget, and no data to measure on.",
                "Whether a graph meets it, only samples tell.",
                "Add --test FILE.npz, or --data.",
            )
        ranges = seen = None
        if calibration is not None:
            ranges = seen = Calibration.load(calibration)
        elif calibrating:
            assert data is not None
            with waiting(f"calibrating {opened.name}", as_json):
                share = PERCENTILE if percentile is None else percentile
                how = method or ("mse" if percentile is None else "percentile")
                observed = observe(opened, data)
                ranges = observed.calibration(how, percentile=share)
                seen = observed.calibration("max")
        if given:
            ranges = (
                ranges.with_ranges(given)
                if ranges is not None
                else Calibration.from_ranges(opened, given)
            )
        keep = keep or []
        if opened.primary.format == "tflite":
            if budget is not None or block is not None:
                raise OptionError(
                    f"{opened.name} is a .tflite, of which one node cannot be quantized alone.",
                    "Budgets and blocks need an ONNX graph.",
                    "Leave them out, name nodes with --keep, or give the network as ONNX.",
                )
            with waiting(f"quantizing {opened.name}", as_json):
                made = _tflite(opened, ranges, precision, keep)
        elif budget is not None:
            assert measured_on is not None
            with telling(as_json) as teller:
                found = search(
                    opened,
                    ranges,
                    measured_on,
                    max_drop=budget.max_drop,
                    max_error=budget.max_error,
                    min_snr=budget.min_snr,
                    precision=_named(precision),
                    recipe=chosen,
                    keep=keep,
                    block=block,
                    engine=engine,
                    progress=teller,
                )
            made = _found(found, keep)
        else:
            with waiting(f"quantizing {opened.name}", as_json):
                done = quantize_model(
                    opened, ranges, _named(precision), chosen, keep=keep, block=block
                )
            made = _Made(
                done.model, done.precision, done.recipe, done.nodes, done.kept, list(done.notes)
            )
        made.calibration = ranges
        if wanted_rest != "fp32":
            with waiting(f"casting the rest to {wanted_rest}", as_json):
                _cast_rest(made, wanted_rest, seen)
        if measured_on is not None and (made.search is None or made.rest != "fp32"):
            with telling(as_json) as teller, Trial(opened, measured_on, engine) as trial:
                made.measured = trial.measure(
                    made.model, lambda share: teller("measuring the quantized graph", share)
                )
                made.accuracy, made.engine = trial.accuracy, trial.engine
                made.samples = trial.samples
        if measured_on is not None and test is None and calibration is None and ranges is not None:
            made.notes.append(
                "It was measured on the samples that its ranges were found on: other samples, "
                "given with --test, tell more."
            )
        if ranges is not None:
            made.notes += [note for note in ranges.notes if note not in made.notes]
        if save_calibration is not None and ranges is not None:
            ranges.save(save_calibration)
        met = made.search is None or made.search.met
        if budget is not None and met and made.rest != "fp32" and made.measured is not None:
            met = not any(budget.excess(made.measured, made.accuracy))
        saved = save_whole(out, made.model.primary.read()) if met else None
        report.code = OK if met else NOTHING
        report.document = _document(opened, made, saved, save_calibration)
        if not as_json:
            _show(stdout(), opened, made, saved, save_calibration)


# --- what was asked for --------------------------------------------------------------------------


def _share(text: str | None) -> float | None:
    """`0.5%` or `0.005` as a number."""
    if text is None:
        return None
    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(
            f"--max-drop {text} cannot be read.",
            "It is a share of all samples, as a percentage or a fraction of 1.",
            "Write for example --max-drop 0.5% or --max-drop 0.005.",
            text=text,
        )
    return value / 100 if percent else value


def _ranges(texts: Sequence[str] | None) -> dict[str, RangeLike]:
    """`NAME=LOW:HIGH`, or `NAME=LARGEST`, by name; names may hold = and : themselves."""
    found: dict[str, RangeLike] = {}
    for text in texts or ():
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


def _recipe(model: Model, recipe: str | None, for_: str | None) -> str:
    """The recipe's name. Raises OptionError, CandidateError, BackendUnavailable."""
    if recipe is not None and for_ is not None:
        raise OptionError(
            "--recipe and --for are both given.",
            "The engine that --for names decides on the recipe.",
            "Leave one of them out.",
        )
    tflite = model.primary.format == "tflite"
    features: Sequence[str] = host_devices()[0].facts.get("instruction_sets", ())
    if for_ is not None:
        candidate = Candidate.parse(for_)
        with redirect_stdout(sys.stderr):
            plugin = plugins.plugin(candidate.backend)
        if plugin is None:
            raise BackendUnavailable(
                f"There is no recipe for {for_}.",
                f"There is no such backend; plugins bring {', '.join(plugins.names())}.",
                "Check its name, or name a --recipe.",
                backend=candidate.backend,
            )
        if plugin.backend is not None and model.file(plugin.backend.formats) is None:
            raise OptionError(
                f"{for_} cannot run what becomes of {model.name}.",
                f"It reads {' and '.join(plugin.backend.formats)}, and this is "
                f"{model.primary.format}, which stays so.",
                f"Give the network as {plugin.backend.formats[0]}.",
            )
        if plugin.backend is not None and plugin.backend.quantization:
            return find_recipe(plugin.backend.quantization).name
        on_cpu = candidate.device in (None, "cpu")
        return recipe_for(candidate.backend, features if on_cpu else ()).name
    if recipe is not None and tflite:
        raise OptionError(
            f"--recipe {recipe} does not go with {model.name}.",
            "It is a .tflite, and there is one recipe for those.",
            "Leave it out.",
        )
    if recipe == "auto":
        return recipe_for("onnxruntime", features).name
    return find_recipe(recipe or "tensorrt").name


def _check_ranges(
    precision: str,
    calibrating: bool,
    given: Mapping[str, object],
    finding: Mapping[str, object],
) -> None:
    """Raises OptionError for options that would change nothing."""
    unused, why = "", ""
    if precision not in _CALIBRATED:
        unused = next((flag for flag, value in {**given, **finding}.items() if value), "")
        why = f"{precision} quantizes no activations by ranges."
    elif not calibrating:
        unused = next((flag for flag, value in finding.items() if value is not None), "")
        why = "Ranges are found on data, and not where a file has them."
    elif finding["--percentile"] is not None and finding["--method"] not in (None, "percentile"):
        unused, why = "--percentile", f"The method {finding['--method']} has none."
    if unused:
        raise OptionError(f"{unused} means nothing here.", why, "Leave it out.", option=unused)
    if given["--save-calibration"] and not (calibrating or given["--range"]):
        raise OptionError(
            "There is no new calibration to save.",
            "It comes of --data or --range, and neither is given.",
            "Add --data FILE.npz, or leave --save-calibration out.",
        )


def _check_files(
    model: Model,
    out: Path,
    save_calibration: Path | None,
    calibration: Path | None,
    data: Path | None,
) -> None:
    if save_calibration is not None:
        check_out(save_calibration, model, save_calibration.suffix.lower(), "--save-calibration")
    check_apart((("--out", out), ("--save-calibration", save_calibration), ("--data", data)))
    check_apart((("--out", out), ("--calibration", calibration)))


def _named(precision: str) -> Precision:
    """`quantize` refuses what is none."""
    return precision  # type: ignore[return-value]


def _rest(model: Model, rest: str | None, target: str | None) -> str:
    """What is not quantized computes in this; a target wants what its candidates get."""
    if model.primary.format == "tflite":
        if rest in (None, "fp32"):
            return "fp32"
        raise OptionError(
            f"--rest {rest} does not go with {model.name}.",
            "It is a .tflite, and only ONNX graphs are cast.",
            "Leave it out, or give the network as ONNX.",
        )
    if rest is not None:
        return rest
    return "fp32" if target is None else find_recipe(target).rest


def _cast_rest(made: _Made, rest: str, seen: Calibration | None) -> None:
    try:
        done = cast(made.model, rest, ranges=seen)  # type: ignore[arg-type]
    except ModelError as error:
        made.notes.append(f"Nothing was cast to {rest}: {error.why}")
        return
    made.model, made.rest = done.model, rest
    made.notes += done.notes
    wide = {name: why for name, why in done.kept.items() if why != SCALES}
    made.notes += [f"{name!r} is not cast to {rest}: {why}" for name, why in wide.items()]


def _tflite(model: Model, ranges: Calibration | None, precision: str, keep: Sequence[str]) -> _Made:
    done = quantize_tflite(
        model,
        calibration=ranges,
        precision=precision,  # type: ignore[arg-type]  # it refuses what is none
        keep=keep,
    )
    return _Made(done.model, done.precision, done.recipe, done.nodes, done.kept, list(done.notes))


def _found(found: Search, keep: Sequence[str]) -> _Made:
    done, table = found.quantized, found.table
    budgeted = found.kept
    kept = {name: why for name, why in done.kept.items() if name not in budgeted}
    kept |= dict.fromkeys(budgeted, "kept for the budget")
    return _Made(
        done.model,
        done.precision,
        done.recipe,
        done.nodes,
        kept,
        list(done.notes),
        None,
        found.measured,
        table.accuracy,
        table.engine,
        table.samples,
        found,
        budgeted,
    )


# --- what is told --------------------------------------------------------------------------------


def _document(
    model: Model, made: _Made, saved: Path | None, save_calibration: Path | None
) -> dict[str, Any]:
    ranges = made.calibration
    return {
        "model": model.name,
        "model_hash": model.hash,
        "precision": made.precision,
        "recipe": made.recipe,
        "rest": made.rest,
        "calibration": None
        if ranges is None
        else {
            "method": ranges.method,
            "samples": ranges.samples,
            "saved": str(save_calibration) if save_calibration else None,
        },
        "nodes": list(made.nodes),
        "kept": dict(made.kept),
        "engine": made.engine or None,
        "samples": made.samples or None,
        "accuracy_fp32": made.accuracy,
        "measured": made.measured.to_dict() if made.measured else None,
        "search": made.search.to_dict() if made.search else None,
        "notes": made.notes,
        "saved": str(saved) if saved else None,
        "saved_hash": made.model.hash,
        "bytes": made.model.size,
    }


def _show(
    console: Console, model: Model, made: _Made, saved: Path | None, save_calibration: Path | None
) -> None:
    ranges = made.calibration
    pairs = [("model", f"{model.name} ({model.primary.format}), {size_text(model.size)}")]
    rest = f", all else {made.rest}" if made.rest != "fp32" else ""
    pairs.append(("recipe", f"{made.recipe}, {made.precision}{rest}"))
    if ranges is not None:
        pairs.append(("ranges", f"{ranges.method}, {plural(ranges.samples, 'sample')}"))
    if made.samples:
        pairs.append(("measured", f"on {plural(made.samples, 'sample')} by {made.engine}"))
    if made.search is not None:
        pairs.append(("budget", str(made.search.budget)))
    print_pairs(console, pairs, style="bold")
    console.print()
    if made.search is not None:
        _show_sensitivity(console, made.search.table, made)
    else:
        rows = [[name, made.precision] for name in made.nodes]
        rows += [[name, "float32"] for name in made.kept if name not in made.nodes]
        print_table(console, [Column("node"), Column("computes in")], rows)
    if made.kept:
        print_heading(console, "Stays in float32")
        print_pairs(console, list(made.kept.items()))
    if made.notes:
        print_heading(console, "Notes")
        print_pairs(console, [("-", note) for note in made.notes])
    console.print()
    if made.search is not None:
        whole = made.search.table.whole
        if made.budgeted or made.rest != "fp32":
            console.print(Text(f"All quantized: {cost_text(whole, made.accuracy)}"))
    if made.measured is not None:
        console.print(Text(f"{_which(made)}: {cost_text(made.measured, made.accuracy)}"))
    else:
        console.print(Text("What that costs was not measured: give --test FILE.npz."))
    if save_calibration is not None:
        console.print(Text(f"Saved: {save_calibration}, the ranges"))
    if saved is not None:
        kept = f", {plural(len(made.kept), 'node')} in float32" if made.kept else ""
        told = f", {plural(len(made.nodes), 'node')} in {made.precision}{kept}"
        size = f", {size_text(made.model.size)}"
        console.print(Text.assemble((f"Saved: {saved}", "bold green"), told, size))
    else:
        console.print(
            Text.assemble(
                ("Nothing was saved: ", "bold red"),
                f"cast to {made.rest}, it no longer meets the budget: --rest fp32 does."
                if made.search is not None and made.search.met
                else "no graph met the budget; this one came nearest.",
            )
        )


def _which(made: _Made) -> str:
    """The graph that was saved, as its cost is told."""
    if made.search is None:
        return "Against float32"
    kept = f"All but {len(made.budgeted)}" if made.budgeted else "All quantized"
    return kept if made.rest == "fp32" else f"{kept}, all else {made.rest}"


def _show_sensitivity(console: Console, table: Sensitivity, made: _Made) -> None:
    """A row for each node, the most sensitive first, as it is alone in the low precision."""
    columns = [Column("node"), Column("becomes"), Column("share", right=True)]
    columns += [Column("error", right=True), Column("SNR dB", right=True)]
    if table.accuracy is not None:
        columns.append(Column("accuracy", right=True))
    rows, styles = [], []
    kept = set(made.budgeted)
    for name in table.ranking:
        high = name in kept or name in made.kept
        alone = table.alone.get(name)
        cells = ["", ""] if alone is None else [f"{alone.error:.1e}", f"{alone.snr_db:.1f}"]
        accuracy = "" if alone is None or alone.accuracy is None else f"{alone.accuracy:.2%}"
        becomes = "float32" if high else made.precision
        row = [name, becomes, f"{table.share(name):.1%}", *cells]
        rows.append(row + ([accuracy] if table.accuracy is not None else []))
        styles.append("yellow" if high else "")
    print_table(console, columns, rows, styles)

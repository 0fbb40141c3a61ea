"""`unirt quantize`: a model in int8 or less, what of it is not, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from unirt.cli.arguments import Block, Debug, Json, Keep, ModelPath
from unirt.cli.outcome import NOTHING, OK, reporting
from unirt.cli.ranges import (
    Bins,
    Found,
    MethodName,
    Percentile,
    RangeOptions,
    RangeTexts,
    RoundingFile,
    SampleFile,
    SavedRanges,
    TestFile,
    ranges_document,
    with_onnx,
)
from unirt.cli.saving import Out, check_apart, check_out, save_model
from unirt.cli.sensitivity import how_text, measured_text, named_precision, print_sensitivity
from unirt.cli.sparsify import cost_text
from unirt.cli.target import (
    MeasuringEngine,
    PrecisionName,
    RecipeName,
    Target,
    TargetEngine,
    find_target,
    wanted_precision,
)
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
from unirt.errors import ModelError, OptionError
from unirt.model import Model
from unirt.precision.calibration.ranges import Calibration
from unirt.precision.casting.cast import cast
from unirt.precision.partial.search import Budget, Search, search
from unirt.precision.partial.trial import Measured, Trial
from unirt.precision.quantization.litert import quantize_tflite
from unirt.precision.quantization.quantize import quantize as quantize_model


@dataclass(frozen=True)
class _Task:
    """What was asked for, once it is known to make sense."""

    model: Model
    precision: str
    target: Target
    rest: str
    keep: Sequence[str]
    only: Sequence[str] | None
    block: int | None
    budget: Budget | None
    measured_on: Path | None
    as_json: bool


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
    data: SampleFile = None,
    test: TestFile = None,
    precision: PrecisionName = None,
    recipe: RecipeName = None,
    for_: TargetEngine = None,
    rest: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(
            "--rest",
            help="What all nodes that are not quantized compute in. Default: fp32, or what the "
            "engine that --for names wants.",
        ),
    ] = None,
    method: MethodName = None,
    percentile: Percentile = None,
    bins: Bins = None,
    calibration: SavedRanges = None,
    save_calibration: Annotated[
        Path | None,
        typer.Option("--save-calibration", metavar="FILE", help="Where to save the ranges."),
    ] = None,
    range_: RangeTexts = None,
    round_on: RoundingFile = None,
    keep: Keep = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="NODE", help="Quantize only this node. Repeatable. Default: all."
        ),
    ] = None,
    block: Block = None,
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
    engine: MeasuringEngine = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a float32 model, and show what each node became and what that costs.

    With --max-drop, --max-error or --min-snr it looks for the fewest nodes to leave in float32, and
    writes no model where nothing meets that. Give --for the engine that shall run it: then that one
    decides how, and what it costs there is measured.
    """
    with reporting(as_json, debug) as report:
        opened = Model(model)
        limits = (_share(max_drop), max_error, min_snr)
        budget = Budget(*limits) if any(one is not None for one in limits) else None
        check_out(out, opened, f".{opened.primary.format}")
        wanted = wanted_precision(precision, for_)
        asked = RangeOptions(
            wanted, data, calibration, method, percentile, bins, range_ or (), round_on
        )
        asked.check(opened, save_calibration)
        _check_files(opened, out, save_calibration, calibration, data)
        target = find_target(opened, wanted, recipe, for_, engine)
        wanted_rest = _rest(opened, rest, target if for_ is not None else None)
        measured_on = test if test is not None else data
        task = _Task(
            opened, wanted, target, wanted_rest, keep or (), only, block, budget, measured_on,
            as_json,
        )  # fmt: skip
        _check_task(task)
        found = asked.find(opened, as_json)
        made = _made(task, found)
        made.notes += asked.own(test)
        if found.ranges is not None:
            made.notes += [note for note in found.ranges.notes if note not in made.notes]
            if save_calibration is not None:
                found.ranges.save(save_calibration)
        met = _met(budget, made)
        saved = save_model(out, made.model.primary.read()) if met else None
        report.code = OK if met else NOTHING
        report.document = _document(task, made, saved, save_calibration)
        if not as_json:
            _show(stdout(), task, made, saved, save_calibration)


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


def _check_task(task: _Task) -> None:
    """Raises OptionError for what does not go together."""
    if task.budget is not None and task.measured_on is None:
        raise OptionError(
            "There is a budget, and no data to measure on.",
            "Whether a graph meets it, only samples tell.",
            "Add --test FILE.npz, or --data.",
        )
    if task.budget is not None and task.only is not None:
        raise OptionError(
            "--only does not go with a budget.",
            "It names the nodes to quantize, and a budget has them looked for.",
            "Leave one of them out; --keep names nodes that are not to be quantized.",
        )
    if task.model.primary.format == "tflite" and (task.block is not None or task.only is not None):
        raise OptionError(
            f"{task.model.name} is a .tflite, and --block and --only need an ONNX graph.",
            "ai-edge-quantizer quantizes all but what it is told to leave, by channels.",
            "Leave them out, name nodes with --keep, or give the network as ONNX.",
        )


def _rest(model: Model, rest: str | None, target: Target | None) -> str:
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
    return "fp32" if target is None else target.recipe.rest


# --- what is made of it --------------------------------------------------------------------------


def _made(task: _Task, found: Found) -> _Made:
    """The quantized model, the rest of it cast, and measured where there is data."""
    if task.budget is not None:
        made = _searched(task, task.budget, found)
    else:
        with waiting(f"quantizing {task.model.name}", task.as_json):
            made = _quantized(task, found)
    made.calibration = found.ranges
    if task.rest != "fp32":
        with waiting(f"casting the rest to {task.rest}", task.as_json):
            _cast_rest(made, task.rest, found.seen)
    if task.measured_on is not None and (made.search is None or made.rest != "fp32"):
        _measure(task, made)
    if made.samples:
        made.notes += task.target.notes
    return made


def _quantized(task: _Task, found: Found) -> _Made:
    done: Any
    if task.model.primary.format == "tflite":
        done = quantize_tflite(
            with_onnx(task.model, found.ranges),
            calibration=found.ranges,
            precision=task.precision,  # type: ignore[arg-type]  # it refuses what is none
            keep=task.keep,
        )
    else:
        done = quantize_model(
            task.model,
            found.ranges,
            named_precision(task.precision),
            task.target.recipe,
            keep=task.keep,
            only=task.only,
            block=task.block,
            moments=found.moments,
        )
    return _Made(done.model, done.precision, done.recipe, done.nodes, done.kept, list(done.notes))


def _searched(task: _Task, budget: Budget, asked: Found) -> _Made:
    assert task.measured_on is not None
    data = task.measured_on
    with telling(task.as_json) as teller:
        found = task.target.measured(
            lambda engine: search(
                with_onnx(task.model, asked.ranges),
                asked.ranges,
                data,
                max_drop=budget.max_drop,
                max_error=budget.max_error,
                min_snr=budget.min_snr,
                precision=named_precision(task.precision),
                recipe=task.target.recipe,
                keep=task.keep,
                block=task.block,
                moments=asked.moments,
                engine=engine,
                progress=teller,
            )
        )
    done, table = found.quantized, found.table
    kept = {name: why for name, why in done.kept.items() if name not in found.kept}
    kept |= dict.fromkeys(found.kept, "kept for the budget")
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
        found.kept,
    )


def _measure(task: _Task, made: _Made) -> None:
    assert task.measured_on is not None
    data = task.measured_on

    def run(engine: str | None) -> None:
        with telling(task.as_json) as teller, Trial(task.model, data, engine) as trial:
            made.measured = trial.measure(
                made.model, lambda share: teller("measuring the quantized graph", share)
            )
            made.accuracy, made.engine = trial.accuracy, trial.engine
            made.samples = trial.samples

    task.target.measured(run)


def _cast_rest(made: _Made, rest: str, seen: Calibration | None) -> None:
    try:
        done = cast(made.model, rest, ranges=seen)  # type: ignore[arg-type]
    except ModelError as error:
        made.notes.append(f"Nothing was cast to {rest}: {error.why}")
        return
    made.model, made.rest = done.model, rest
    made.notes += done.notes
    made.notes += [f"{name!r} is not cast to {rest}: {why}" for name, why in done.wide.items()]


def _met(budget: Budget | None, made: _Made) -> bool:
    """Whether what was made, the rest of it cast too, may be saved."""
    if budget is None or made.search is None:
        return True
    cast_again = made.rest != "fp32" and made.measured is not None
    if (
        cast_again
        and made.measured is not None
        and any(budget.excess(made.measured, made.accuracy))
    ):
        return False
    return made.search.met


# --- what is told --------------------------------------------------------------------------------


def _document(
    task: _Task, made: _Made, saved: Path | None, save_calibration: Path | None
) -> dict[str, Any]:
    return {
        "model": task.model.name,
        "model_hash": task.model.hash,
        "precision": made.precision,
        "recipe": made.recipe,
        "recipe_why": task.target.why,
        "rest": made.rest,
        "calibration": ranges_document(made.calibration, save_calibration),
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
    console: Console, task: _Task, made: _Made, saved: Path | None, save_calibration: Path | None
) -> None:
    rest = f", all else {made.rest}" if made.rest != "fp32" else ""
    recipe, precision = f"{made.recipe}, {task.target.why}", f"{made.precision}{rest}"
    pairs = how_text(task.model, recipe, precision, made.calibration)
    if made.samples:
        pairs.append(("measured", measured_text(made.samples, made.engine)))
    if made.search is not None:
        pairs.append(("budget", str(made.search.budget)))
    print_pairs(console, pairs, style="bold")
    console.print()
    if made.search is not None:
        high = {*made.budgeted, *made.kept}
        becomes = {
            name: "float32" if name in high else made.precision for name in made.search.table.nodes
        }
        print_sensitivity(console, made.search.table, becomes)
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

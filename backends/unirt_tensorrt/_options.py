"""What a user may set, and what the installed TensorRT and this machine make of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unirt import Device, OptionError, Options, option
from unirt_tensorrt._library import TF32_OVERRIDE, Library

MIB = 1 << 20
POOLS = (
    "tactic_dram",
    "tactic_shared_memory",
    "dla_managed_sram",
    "dla_local_dram",
    "dla_global_dram",
)
CURRENT = "CURRENT"

Range = tuple[int, int, int]


@dataclass(frozen=True)
class TensorRTOptions(Options):
    workspace: int | None = option(
        None, "MiB of device memory one layer may use as scratch; default: all of it.", minimum=1
    )
    memory_pools: Mapping[str, str] = option(
        {},
        f"Limits in MiB, fractions allowed, of the builder's other pools: {', '.join(POOLS)}.",
    )
    optimization_level: Literal[0, 1, 2, 3, 4, 5] = option(
        3, "How long the builder searches for faster kernels: 0 builds fastest, 5 searches most."
    )
    tiling: Literal["none", "fast", "moderate", "full"] = option(
        "none", "How long the builder searches for ways to keep data in the L2 cache."
    )
    auxiliary_streams: int | None = option(
        None,
        "Streams the engine may add to its own for branches that run at once; 0: none, "
        "default: TensorRT decides.",
        minimum=0,
    )
    tf32: bool = option(
        False,
        "Let float32 products be rounded to TF32: faster, about 3 digits right. TensorRT's own "
        "default is on; UniRT computes as the graph says.",
    )
    sparse_weights: bool = option(
        False, "Use sparse kernels for weights that are zero in a 2:4 pattern."
    )
    strict_nans: bool = option(
        False, "Keep NaN and infinity as they are: no rewriting of x-x to 0 or x/x to 1."
    )
    weight_streaming: bool = option(
        False, "Build so that weights may stay in host memory and stream in as they are needed."
    )
    weight_streaming_budget: int | None = option(
        None,
        "MiB of weights on the device, the rest streams; default: what TensorRT proposes. Needs "
        "weight_streaming.",
        minimum=0,
    )
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = option(
        "none", "GPUs beyond this one that the engine must run on; costs speed."
    )
    compute_capabilities: tuple[str, ...] = option(
        (),
        "GPUs a TensorRT-RTX engine is made for, such as sm86,sm89, or `current` alone for the "
        "GPU here; default: Ampere and later.",
    )
    version_compatible: bool = option(
        False, "An engine that later TensorRT versions can load, too; costs speed."
    )
    lean_runtime: bool = option(
        False,
        "Put the runtime that reads a version-compatible engine into it: code, which whoever "
        "loads the engine has to trust.",
    )
    refit: bool = option(False, "An engine whose weights can be replaced without a build.")
    strip_weights: bool = option(
        False, "An engine file without the weights that refitting can put back."
    )
    dla_core: int | None = option(
        None, "Run on this deep learning accelerator core, counted from 0.", minimum=0
    )
    gpu_fallback: bool = option(
        False, "Leave to the GPU what the accelerator core cannot run; needs dla_core."
    )
    timing_cache: Literal["use", "editable", "require", "off"] = option(
        "use",
        "Kernel timings of earlier builds: use them, make them editable, fail where one is "
        "missing, or time everything anew.",
    )
    timing_iterations: int = option(1, "Runs averaged for each kernel timing.", minimum=1)
    builds: int = option(
        1, "Engines to build, of which the fastest is kept: timings vary by build.", minimum=1
    )
    verbosity: Literal["detailed", "names", "none"] = option(
        "detailed",
        "What the engine tells of its layers: everything, which fusion reports need; names; "
        "or nothing.",
    )
    cache: Path | None = option(
        None,
        "Folder that keeps engines, kernel timings and compiled kernels between processes; "
        "default: none are kept.",
    )
    default_range: tuple[str, ...] = option(
        ("1:8:512", "1:128:512"),
        "Sizes, as smallest:usual:largest, of dynamic dimensions where no profile is given: of "
        "the first axis, then of the others.",
    )
    lanes: int = option(4, "How many calls run at once on the device.", minimum=1)
    cuda_graphs: Literal["auto", "off", "engine", "capture"] = option(
        "auto",
        "Replay a call as one CUDA graph: by the engine itself (TensorRT-RTX), by capturing each "
        "shape, not at all, or what suits the engine.",
    )
    specialization: Literal["auto", "lazy", "eager", "none"] = option(
        "auto",
        "Kernels of TensorRT-RTX for exactly the shapes in use: made in the background, before "
        "the first answer, or never.",
    )
    share_memory: bool = option(
        False, "Sessions of one engine share scratch memory and take turns: less memory."
    )


def check(options: TensorRTOptions, library: Library, device: Device | None) -> None:
    """Raises OptionError where this TensorRT, or `device`, would ignore or break an option that
    was changed. `device` is None for an engine that is built without touching a GPU.
    """
    changed = options.changed()
    for name, why, remedy in _conflicts(options, library, device):
        if name in changed:
            raise OptionError(
                f"tensorrt cannot take {name}={_text(changed[name])} here.",
                why,
                remedy,
                option=name,
                value=changed[name],
                owner="tensorrt",
                flavour=library.flavour,
                version=library.version,
            )
    pool_limits(options)
    ranges(options)
    _check_capabilities(options, library, device)


_RTX_IGNORES = {
    "optimization_level": "does not search by timing: every level gives the same kernels",
    "tiling": "ignores it: every level gives the same kernels",
    "hardware_compatibility": "does not support it",
    "timing_cache": "times no kernels while it builds: its timing cache does nothing",
    "timing_iterations": "times no kernels while it builds",
    "dla_core": "comes without support for accelerator cores",
    "gpu_fallback": "comes without support for accelerator cores",
}
_RTX_REMEDIES = {
    "hardware_compatibility": "Its engines run on Ampere and later; compute_capabilities narrows "
    "that down.",
}
_NEEDS_GPU = {
    "refit": "an engine that can be refitted is compiled by the GPU's driver",
    "strip_weights": "an engine without weights is compiled by the GPU's driver",
    "builds": "several engines are compared by running them",
}


def _conflicts(
    options: TensorRTOptions, library: Library, device: Device | None
) -> Iterator[tuple[str, str, str]]:
    """Option, reason, remedy of everything that is refused where the option is changed."""
    leave = "Leave the option out."
    title = f"{'TensorRT-RTX' if library.is_rtx else 'TensorRT'} {library.version}"
    if library.is_rtx:
        for name, why in _RTX_IGNORES.items():
            yield name, f"{title} {why}.", _RTX_REMEDIES.get(name, leave)
        if device is None:
            for name, why in _NEEDS_GPU.items():
                yield name, f"There is no GPU to build with: {why}.", leave
        if not library.rounds_floats:
            yield (
                "tf32",
                f"{title} takes this from the environment alone, and {TF32_OVERRIDE} is 0 there, "
                "which UniRT sets where nothing is said.",
                f"Start the process with {TF32_OVERRIDE}=1, and compare the answers.",
            )
        yield (
            "version_compatible",
            f"Such an engine is read by libnvinfer_lean, which {title} comes without: its engines "
            "never cross releases.",
            "Build the engine again for each release.",
        )
    else:
        if options.cuda_graphs == "engine":
            yield (
                "cuda_graphs",
                f"{title} has no graphs of its own; only TensorRT-RTX does.",
                "Use cuda_graphs=capture.",
            )
        yield "specialization", f"{title} compiles its kernels while it builds.", leave
        yield (
            "compute_capabilities",
            f"{title} builds for the GPU that it runs on.",
            "Use hardware_compatibility=ampere_plus for an engine that runs on other GPUs.",
        )
    if options.specialization == "lazy" and options.cuda_graphs == "capture":
        yield (
            "cuda_graphs",
            "Lazy kernels are exchanged behind the back of a graph that was captured.",
            "Set specialization=eager, or leave one of the two out.",
        )
    if not options.version_compatible:
        yield "lean_runtime", "The engine is not version compatible.", "Set version_compatible."
    if not options.weight_streaming:
        yield "weight_streaming_budget", "The engine streams no weights.", "Set weight_streaming."
    elif options.cuda_graphs in ("engine", "capture"):
        yield (
            "cuda_graphs",
            "An engine that streams weights synchronizes, which no CUDA graph can hold.",
            "Set cuda_graphs=off or leave it out.",
        )
    if options.dla_core is None:
        yield "gpu_fallback", "The engine runs on the GPU as it is.", "Set dla_core."


def pool_limits(options: TensorRTOptions) -> dict[str, int]:
    """Bytes by the names of TensorRT's pools. Raises OptionError."""
    limits = {} if options.workspace is None else {"WORKSPACE": options.workspace * MIB}
    for name, text in options.memory_pools.items():
        try:
            size = int(float(text) * MIB)
        except (ValueError, OverflowError):
            size = -1
        if name not in POOLS or size < 0:
            raise OptionError(
                f"tensorrt cannot take memory_pools={name}={text}.",
                f"The pools are {', '.join(POOLS)}, each with a number of MiB.",
                "Write for example memory_pools=tactic_dram=4096; workspace has its own option.",
                option="memory_pools",
                value=dict(options.memory_pools),
                owner="tensorrt",
            )
        limits[name.upper()] = size
    return limits


def ranges(options: TensorRTOptions) -> tuple[Range, Range]:
    """The sizes of a dynamic dimension on the first axis, and on any other. Raises OptionError."""
    found: list[Range] = []
    for text in options.default_range:
        parts = text.split(":")
        numbers = [int(part) for part in parts if part.strip().isdecimal()]
        ordered = len(numbers) == len(parts) == 3 and sorted(numbers) == numbers
        if not ordered or not numbers[2]:
            found.clear()
            break
        found.append((numbers[0], numbers[1], numbers[2]))
    if len(found) not in (1, 2):
        raise OptionError(
            f"tensorrt cannot take default_range={','.join(options.default_range)}.",
            "It is smallest:usual:largest, once for every axis or once for the first and once "
            "for the others.",
            "Write for example default_range=1:8:64,1:128:512.",
            option="default_range",
            value=options.default_range,
            owner="tensorrt",
        )
    return found[0], found[-1]


def capabilities(options: TensorRTOptions, library: Library) -> tuple[Any, ...]:
    """Members of TensorRT's ComputeCapability, none for its default. Raises OptionError."""
    known = getattr(library.module, "ComputeCapability", None)
    members = {} if known is None else dict(known.__members__)
    members.pop("NONE", None)
    found = []
    for text in options.compute_capabilities:
        name = text.strip().upper().replace(".", "").removeprefix("SM")
        name = name if name == CURRENT else f"SM{name}"
        if name not in members:
            raise _capability_refused(
                options,
                f"TensorRT-RTX {library.version} knows {', '.join(members).lower()}, not {text!r}.",
                "Name those of the GPUs that the engine is for, or leave the option out.",
            )
        found.append(name)
    return tuple(members[name] for name in sorted(set(found)))


def _check_capabilities(options: TensorRTOptions, library: Library, device: Device | None) -> None:
    wanted = {member.name for member in capabilities(options, library)}
    here = str(device.facts.get("compute_capability") or "") if device else ""
    if CURRENT in wanted and (len(wanted) > 1 or device is None):
        why = "there is none" if device is None else "it stands for itself alone"
        raise _capability_refused(
            options,
            f"`current` is the GPU that builds, and {why}.",
            "Name the compute capabilities: sm86,sm89.",
        )
    if here and wanted and not {CURRENT, f"SM{here.replace('.', '')}"} & wanted:
        raise _capability_refused(
            options,
            f"An engine for these alone does not run on {device}, whose compute capability is "
            f"{here}.",
            "Add it to the list, or leave the option out.",
        )


def _capability_refused(options: TensorRTOptions, why: str, remedy: str) -> OptionError:
    return OptionError(
        f"tensorrt cannot take compute_capabilities={','.join(options.compute_capabilities)}.",
        why,
        remedy,
        option="compute_capabilities",
        value=options.compute_capabilities,
        owner="tensorrt",
    )


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

"""What TensorRT says when it fails, as errors that name the node, the reason and a way out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from unirt import BuildError, ModelFile
from unirt_tensorrt._library import ERROR, WARNING, Library, Message, is_noise
from unirt_tensorrt._options import TensorRTOptions

ANOTHER = "name another candidate, such as onnxruntime"
CHECKED_BYTES = 1 << 29
"""Up to this size a model that failed goes through onnx.checker, where onnx is installed."""

SAID = 400
"""Characters of what onnx.checker says that an error repeats."""

# Outputs whose size the data decides; TensorRT builds them and TensorRT-RTX does not.
_DATA_DEPENDENT = {"NonZero", "NonMaxSuppression"}
_LAYERS = {"NMS": "NonMaxSuppression", "NON_ZERO": "NonZero"}
_OLD_QUANTIZATION = {"MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"}

_CHATTER = (
    "Make sure input ",
    "Make sure output ",
    "[MS] Multi stream is disabled",
    "is unused or used only at compile-time, but is not being removed",
    "shape values set for non-shape input",
)
_FRAME = re.compile(
    r"^While parsing node|^--- (Begin|End) node ---|^Node name: |^Network must have|^input: "
)
_SOURCE = re.compile(r"^(\w+\.[ch]pp:\d+: |\[[\w./:]+\]\s*|\w+::\w+: (?=Error Code))")
_ERROR_CODE = re.compile(r"^Error Code \d+: [\w ]+ \((.*)\)\s*$", re.DOTALL)
_WHERE = re.compile(
    r"\s*\bIn (operator\(\)|\w+)( at /_src\S+:\d+|$)|\s*Instruction: .*$", re.DOTALL
)
_ASSERTION = re.compile(r"^Assertion failed: .*?: |^Assertion .*? failed\.\s+")
_NODE = re.compile(r'While parsing node number (\d+) \[(\w+)(?: -> "([^"]*)")?')


@dataclass(frozen=True)
class Context:
    """Which build failed, for the errors of it."""

    library: Library
    file: ModelFile
    content: bytes
    options: TensorRTOptions
    ahead: bool
    messages: list[Message]
    derived: str = ""
    """The profile that was derived, as text, where the caller gave none."""
    hot: str = ""
    """The hot shapes that were asked for, as text."""

    @property
    def label(self) -> str:
        return self.file.path.name if self.file.path else "the model"

    @property
    def title(self) -> str:
        return f"TensorRT{'-RTX' if self.library.is_rtx else ''} {self.library.version}"

    def error(self, what: str, why: str, remedy: str, **facts: object) -> BuildError:
        facts = {"node": None, "operator": None, "code": None, **facts}
        return BuildError(
            what,
            why,
            remedy,
            backend="tensorrt",
            flavour=self.library.flavour,
            version=self.library.version,
            log=errors(self.messages),
            **facts,
        )


def errors(messages: Iterable[Message]) -> list[str]:
    return _texts(message for message in messages if message.severity <= ERROR)


def warnings(messages: Iterable[Message]) -> list[str]:
    """What the user may want to act on, once each."""
    found = _texts(message for message in messages if message.severity == WARNING)
    return [text for text in found if not any(part in text for part in _CHATTER)]


def _texts(messages: Iterable[Message]) -> list[str]:
    texts = (plain(message.text) for message in messages if not is_noise(message))
    return [text for text in dict.fromkeys(texts) if text]


def plain(text: str) -> str:
    """A message of TensorRT's without what only its authors can use: source lines, assertions."""
    kept = []
    for line in text.splitlines():
        line = line.strip()
        while (shorter := _SOURCE.sub("", line)) != line:
            line = shorter
        if inner := _ERROR_CODE.match(line):
            line = inner[1]
        line = _WHERE.sub("", line)
        line = re.sub(r"^Myelin \((.*)$", r"\1", line)
        while (shorter := _SOURCE.sub("", _ASSERTION.sub("", line))) != line:
            line = shorter
        line = line.strip()
        noise = is_noise(Message(ERROR, line)) or _FRAME.match(line)
        if line and not noise and not line.startswith("Invalid Node - "):
            kept.append(line)
    return " ".join(dict.fromkeys(kept))


def unreadable(context: Context, parser: Any) -> BuildError:
    """The error for a model that the parser refused."""
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    first = next((one for one in found if one.node() >= 0), found[0] if found else None)
    if first is None:
        return _failed(context, None, None, None, "")
    code = first.code().name
    reason = plain(first.desc() or "")
    if first.func() == "importInput":
        # The parser keeps the input's name where a source file would stand.
        return _input_refused(context, first.file(), code)
    operator = first.node_operator() or None
    node = first.node_name() or _node_name(context.messages, first.node())
    if reason in ("false", ""):
        reason = ""
    return _failed(context, node, operator, code, reason)


def unbuildable(context: Context, layers: Sequence[tuple[str, str, str]]) -> BuildError:
    """The error for a network that was read and could not be built. `layers` are its layers'
    names, kinds and metadata.
    """
    logged = [message.text for message in context.messages if message.severity <= ERROR]
    reason = " ".join(errors(context.messages))
    named = [
        layer
        for layer in layers
        if any(re.search(rf"(?<!\w){re.escape(layer[0])}(?!\w)", text) for text in logged)
    ]
    node = operator = None
    if named:
        name, kind, metadata = max(named, key=lambda layer: len(layer[0]))
        origin = re.search(r"\[ONNX Layer: ([^\]]*)\]", metadata)
        node = origin[1] if origin else name
        operator = _LAYERS.get(kind, kind)
    return _failed(context, node, operator, None, reason)


def _failed(
    context: Context, node: str | None, operator: str | None, code: str | None, reason: str
) -> BuildError:
    place = f"node {node!r} ({operator})" if node else "it"
    known = _known_operator(context, operator, code, reason) or _known_reason(context, code, reason)
    if known:
        why, remedy = known
    else:
        complaint = _checked(context)
        why = reason.removeprefix(f"{node}: ") or "it gives no reason"
        if complaint:
            why = f"{why.rstrip('.!')}. onnx.checker says of the file: {complaint}"
            remedy = f"Repair the graph{f' at node {node!r}' if node else ''} or export it again."
        elif node:
            remedy = f"Change the graph there, or {ANOTHER}."
        else:
            remedy = f"Read the log that this error carries, or {ANOTHER}."
    text = f"{context.title} refused {place}: {why.rstrip('.!')}."
    if context.derived:
        text += f" No profile was given, so its sizes were derived: {context.derived}."
        remedy = (
            "Say which sizes the model takes, profiles=[unirt.ShapeProfile({...})], or derive "
            f"them from samples. {remedy}"
        )
    if context.hot:
        text += f" Hot shapes were asked for too: {context.hot}."
        remedy = f"Leave the hot shapes out to see whether it is they. {remedy}"
    return context.error(
        f"tensorrt could not build {context.label}.",
        text,
        remedy,
        node=node,
        operator=operator,
        code=code,
    )


def _known_operator(
    context: Context, operator: str | None, code: str | None, reason: str
) -> tuple[str, str] | None:
    unsupported = (
        (code == "UNSUPPORTED_NODE" and (not reason or "plugin" in reason.lower()))
        or "is not supported in TensorRT" in reason
        or "has no runners that implement it" in reason
        or "lugin not found" in reason
    )
    if not unsupported or not operator:
        return None
    if context.library.is_rtx and operator in _DATA_DEPENDENT:
        return (
            f"it has no kernels for outputs whose size the data decides, as {operator}'s is",
            f"Install TensorRT itself, whose engines have {operator} (pip install "
            f"'unirt[tensorrt]'), or {ANOTHER}.",
        )
    if operator.startswith("QLinear") or operator in _OLD_QUANTIZATION:
        return (
            f"it does not have {operator}, and takes quantization as QuantizeLinear and "
            "DequantizeLinear around ordinary operators only",
            f"Quantize the float model in that form (Q/DQ), or {ANOTHER}.",
        )
    if "plugin" in reason.lower() and context.ahead and _mentions_no_gpu(context):
        return (
            f"its {operator} is a plugin that needs a GPU while it builds, and none is here",
            f"Build on a machine with a GPU, or {ANOTHER}.",
        )
    return (
        f"it does not have the operator {operator}",
        f"Take the operator out of the graph, or {ANOTHER}.",
    )


def _known_reason(context: Context, code: str | None, reason: str) -> tuple[str, str] | None:
    logged = "\n".join(message.text for message in context.messages if message.severity <= ERROR)
    options = context.options
    lost = re.search(r"Failed to open file: (\S.*)", logged)
    if lost:
        path = lost[1].splitlines()[0]
        return (
            f"the weights that it keeps beside it are missing: {path} cannot be opened",
            "Put that file back where the model expects it, or export the model in one file.",
        )
    if code == "MODEL_DESERIALIZE_FAILED":
        return (
            "the file ends early or is no ONNX model",
            "Fetch or export the model again.",
        )
    if "zero point is not supported" in reason:
        return (
            "it takes symmetric quantization only, and this zero point is not 0",
            f"Quantize symmetrically to int8, with every zero point 0, or {ANOTHER}.",
        )
    if "workspace" in reason:
        given = "all memory" if options.workspace is None else f"{options.workspace} MiB"
        return (
            f"no kernel gets by with the scratch memory it may use, {given}",
            "Raise the option workspace, or leave it out.",
        )
    if "cudnn_impl" in reason and "dtype" in reason:
        return (
            "this release has no int8 convolution",
            "Leave the convolutions in floating point or use fp8, and quantize only the matrix "
            f"products; or {ANOTHER}.",
        )
    if "libnvinfer_lean" in logged:
        return "libnvinfer_lean is not installed", "Leave version_compatible out."
    if "out of memory" in logged.lower() or "OutOfMemory" in logged:
        return (
            "memory ran out",
            "Free GPU memory, narrow the profiles, or lower the option workspace.",
        )
    if context.ahead and (options.refit or options.strip_weights):
        return (
            "refit and strip_weights have the GPU's driver compile, and no GPU is here",
            "Build on a machine with a GPU, or leave these options out.",
        )
    if (options.refit or options.strip_weights) and "CUDA_SUCCESS" in reason:
        return (
            "the GPU's driver cannot compile what refit and strip_weights need",
            "Update the driver, or leave these options out.",
        )
    if not context.derived and ("violate shape constraints" in reason or "inherently" in reason):
        return (
            reason,
            "Give a profile whose shapes the network can take, its most common ones above all.",
        )
    return None


def _input_refused(context: Context, name: str, code: str) -> BuildError:
    specs = {spec.name: spec for spec in context.file.inputs}
    dtype = specs[name].dtype if name in specs else "an unsupported type"
    return context.error(
        f"tensorrt could not build {context.label}.",
        f"{context.title} does not take inputs of type {dtype}, as {name!r} is.",
        f"Take what works on it out of the graph, or {ANOTHER}.",
        code=code,
        input=name,
    )


def no_network(context: Context) -> BuildError:
    """The error for what parses and holds no output: an empty file, or another kind of file."""
    why = "is empty" if not context.content else "holds no graph with an output"
    return context.error(
        f"tensorrt could not build {context.label}.",
        f"What was given as ONNX {why}.",
        "Fetch or export the model again.",
        code="MODEL_DESERIALIZE_FAILED",
    )


def no_builder(context: Context) -> BuildError:
    said = " ".join(errors(context.messages)) or "no CUDA driver or GPU was found"
    return context.error(
        f"tensorrt could not build {context.label}.",
        f"{context.title} made no builder: {said.rstrip('.')}.",
        "Check the driver and the GPU with nvidia-smi.",
    )


def wide(context: Context, name: str, use: str) -> BuildError:
    return context.error(
        f"tensorrt could not build {context.label}.",
        f"TensorRT computes float64 as float32, and {use} {name!r} is float64.",
        f"Cast the graph to float32, or {ANOTHER}.",
        **{use: name},
    )


def _node_name(messages: Iterable[Message], number: int) -> str | None:
    """How TensorRT calls a node without a name: after its first output."""
    for message in messages:
        match = _NODE.search(message.text)
        if match and int(match[1]) == number and match[3]:
            return f"node_of_{match[3]}"
    return f"number {number}" if number >= 0 else None


def _mentions_no_gpu(context: Context) -> bool:
    return any(
        "CUDA driver" in message.text or is_noise(message)
        for message in context.messages
        if message.severity <= ERROR
    )


def _checked(context: Context) -> str:
    """What onnx.checker has against the file; "" for nothing, or where it cannot look."""
    if context.file.external or len(context.content) > CHECKED_BYTES:
        return ""
    try:
        import onnx
    except ImportError:
        return ""
    refusals = (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        ValueError,
        RuntimeError,
    )
    try:
        onnx.checker.check_model(context.content, full_check=True)
    except refusals as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return " ".join(lines)[:SAID] if lines else type(error).__name__
    return ""

"""What TensorRT would silently bend or reject in an ONNX graph, repaired or refused before parsing.

TensorRT quantizes symmetrically to int8, fp8 and int4, with float32 scales. It takes uint8 for
int8, which cuts off half of the range, returns infinity for fp16 scales, and runs float64 as
float32. Whatever can be said exactly in its own terms is rewritten so; the rest is refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unirt import BuildError

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]

# Numbers of onnx.TensorProto.
FLOAT, UINT8, INT8, INT32, INT64, BOOL, HALF, DOUBLE = 1, 2, 3, 6, 7, 9, 10, 11
BFLOAT16, FP8, UINT4, INT4, FP4 = 16, 17, 21, 22, 23

_QUANTIZED = {INT8, FP8, INT4, FP4}
_SIGNED = {UINT8: INT8, INT8: INT8, UINT4: INT4, INT4: INT4}
_RANGE = {INT8: (-128, 127), INT4: (-8, 7)}
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_BORDER = _QUANTIZED | {FLOAT, HALF, BFLOAT16, INT8, UINT8, INT32, INT64, BOOL}
_INTEGER_ONLY = {"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm"}
_INTEGER_ONLY |= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
_MOVING = {
    "Flatten",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
_SYMMETRIC = "Quantize it again, symmetrically: int8 with zero point 0."


@dataclass(frozen=True)
class Prepared:
    """A graph that TensorRT takes literally. `repairs` tell what was rewritten, in sentences,
    `notes` what was for speed alone, and `warnings` what costs speed or digits.
    """

    model: onnx.ModelProto
    repairs: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    changed: bool = False


def prepare(
    model: onnx.ModelProto,
    folder: Path | None = None,
    *,
    is_rtx: bool = False,
    int8_convolutions: bool = True,
) -> Prepared:
    """Checks the model and repairs it, in place or as a copy.

    `folder` is where its external data lies, of which only what a repair needs is read. Answers
    stay the same, but for the rounding of 16-bit scales. TensorRT for RTX gets quantized weights
    as its kernels are right and fast with. Without `int8_convolutions`, which its release does not
    have, those compute in floats. Raises BuildError, with `node` and `operator` where it is one
    node's fault, for what TensorRT would get wrong or cannot do.
    """
    _refuse_borders(model.graph)
    model = _inlined(model)
    repairs, warnings, notes = _Messages(), _Messages(), _Messages()
    changed = False
    for part in _Part(model.graph, None, folder, _all_names(model.graph)).all():
        _refuse_integer_operators(part)
        _fold_biases(part, repairs)
        _center_weights(part, repairs)
        _center_activations(part, repairs)
        _decode_inputs(part, repairs)
        if is_rtx:
            _spread_scales(part, repairs)
            _turn_matrices(part, notes)
        if not int8_convolutions:
            _dequantize_convolutions(part, warnings)
        _widen_scales(part, repairs)
        _tell_unfused(part, warnings)
        _tell_doubles(part, warnings)
        changed |= part.finish()
    return Prepared(model, repairs.sentences(), warnings.sentences(), notes.sentences(), changed)


class _Messages:
    """Sentences about nodes, one for all that the same thing happened to."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)

    def add(self, text: str, name: str) -> None:
        self._names[text].append(name)

    def sentences(self) -> tuple[str, ...]:
        found = []
        for text, names in self._names.items():
            shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            found.append(f"{text}: {len(names)} node{'s' * (len(names) > 1)} ({shown}).")
        return tuple(found)


class _Part:
    """One graph of the model: what makes and reads its tensors, and changes to come."""

    def __init__(
        self, graph: onnx.GraphProto, parent: _Part | None, folder: Path | None, taken: set[str]
    ) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self._parent = parent
        self._folder = folder
        self._taken = taken
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {
            value.name: value.type.tensor_type.elem_type
            for value in (*graph.value_info, *graph.input, *graph.output)
        }
        self._outputs = {value.name for value in graph.output}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self._know(node)
            if node.op_type == "Constant" and (value := _attribute(node, "value")) is not None:
                self._constants[node.output[0]] = value
        self._before: dict[int, list[onnx.NodeProto]] = defaultdict(list)
        self._after: dict[int, list[onnx.NodeProto]] = defaultdict(list)
        self._removed: set[int] = set()
        self._replaced: set[str] = set()
        self._retyped: set[str] = set()
        self._made: dict[tuple[str, str], str] = {}

    def all(self) -> Iterator[_Part]:
        """This graph, and then those in its nodes as they are once it has been repaired."""
        yield self
        for node in self.graph.node:
            for graph in _subgraphs(node):
                yield from _Part(graph, self, self._folder, self._taken).all()

    def of(self, *operators: str) -> Iterator[onnx.NodeProto]:
        for node in self.nodes:
            if node.op_type in operators and id(node) not in self._removed:
                yield node

    def tensor(self, name: str) -> onnx.TensorProto | None:
        found: onnx.TensorProto | None = self._constants.get(name)
        if found is not None:
            return found
        return self._parent.tensor(name) if self._parent and name else None

    def array(self, name: str) -> Array | None:
        """The values of a constant."""
        from onnx import TensorProto, external_data_helper, numpy_helper

        tensor = self.tensor(name)
        if tensor is None:
            return None
        if tensor.data_location == TensorProto.EXTERNAL:
            loaded = TensorProto()
            loaded.CopyFrom(tensor)
            external_data_helper.load_external_data_for_tensor(loaded, str(self._folder or "."))
            tensor = loaded
        array: Array = numpy_helper.to_array(tensor)
        return array

    def element_type(self, name: str) -> int:
        """The type of a tensor, as far as the graph says it: 0 where it does not."""
        tensor = self.tensor(name)
        if tensor is not None:
            return int(tensor.data_type)
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == "Cast":
            return int(_attribute(maker, "to"))
        if maker is not None and maker.op_type in _MOVING:
            return self.element_type(maker.input[0])
        if name in self._types:
            return int(self._types[name])
        return self._parent.element_type(name) if self._parent and name else 0

    def maker(self, name: str) -> onnx.NodeProto | None:
        return self._makers.get(name)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor, in their subgraphs too."""
        return self._readers[name]

    def is_input(self, name: str) -> bool:
        return any(value.name == name for value in self.graph.input)

    def is_output(self, name: str) -> bool:
        return name in self._outputs

    def fresh(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name

    def put_constant(self, name: str, array: Array, element_type: int) -> None:
        from onnx import helper, numpy_helper

        dtype = helper.tensor_dtype_to_np_dtype(element_type)
        tensor = numpy_helper.from_array(np.asarray(array).astype(dtype), name)
        self.graph.initializer.append(tensor)
        self._constants[name] = tensor

    def constant(self, of: str, suffix: str, array: Array, element_type: int) -> str:
        """The name of a new constant that stands for another, made once for all who want it."""
        if (of, suffix) not in self._made:
            name = self._made[of, suffix] = self.fresh(f"{of}_{suffix}")
            self.put_constant(name, array, element_type)
        return self._made[of, suffix]

    def set_input(self, node: onnx.NodeProto, position: int, name: str) -> None:
        while len(node.input) <= position:
            node.input.append("")
        old = node.input[position]
        self._replaced.add(old)
        node.input[position] = name
        if old not in node.input:
            self._readers[old] = [other for other in self._readers[old] if other is not node]
        self._readers[name].append(node)

    def insert_before(self, at: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        self._before[id(at)] += nodes
        for node in nodes:
            self._know(node)

    def insert_after(self, at: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        self._after[id(at)] += nodes
        for node in nodes:
            self._know(node)

    def remove(self, node: onnx.NodeProto) -> None:
        self._removed.add(id(node))
        self._replaced.update(node.input)
        for name in node.input:
            self._readers[name] = [other for other in self._readers[name] if other is not node]

    def retype(self, name: str) -> None:
        """The tensor's declared type no longer holds."""
        self._retyped.add(name)

    def finish(self) -> bool:
        """Writes the nodes back, without the constants that nothing reads any more. Returns whether
        anything was changed.
        """
        unused = {n for n in self._replaced if not self.readers(n) and n not in self._outputs}
        for field in (self.graph.initializer, self.graph.input, self.graph.value_info):
            for index in reversed(range(len(field))):
                name = field[index].name
                stale = name in self._retyped and field is self.graph.value_info
                if stale or (name in unused and name in self._constants):
                    del field[index]
        nodes = []
        for node in self.nodes:
            nodes += self._before[id(node)]
            dead = node.op_type == "Constant" and node.output[0] in unused
            if not dead and id(node) not in self._removed:
                nodes.append(node)
            nodes += self._after[id(node)]
        if len(nodes) != len(self.nodes) or any(self._before.values()) or any(self._after.values()):
            del self.graph.node[:]
            self.graph.node.extend(nodes)
        return bool(self._replaced or self._made or self._removed)

    def _know(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            self._makers[name] = node
        for name in {*node.input, *_captured(node)}:
            self._readers[name].append(node)


def _refuse_borders(graph: onnx.GraphProto) -> None:
    from onnx import TensorProto

    weights = {tensor.name for tensor in graph.initializer}
    for what, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            kind = value.type.WhichOneof("value")
            element_type = value.type.tensor_type.elem_type
            if value.name in weights or element_type in _BORDER or kind is None:
                continue
            name = kind.removesuffix("_type").replace("_", " ")
            if kind == "tensor_type" and element_type:
                name = TensorProto.DataType.Name(element_type).lower()
            why = f"TensorRT has no {name} for inputs and outputs."
            if element_type == DOUBLE:
                why = "TensorRT would make it float32 without a word."
            raise BuildError(
                f"The {what} {value.name!r} is of type {name}.",
                why,
                "Export the model with float32, float16, int32 or int64 there.",
                tensor=value.name,
            )


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, its own functions written out if they quantize."""
    if not any(_of_interest(node) for function in model.functions for node in function.node):
        return model
    from onnx import inliner

    return inliner.inline_local_functions(model)


def _of_interest(node: onnx.NodeProto) -> bool:
    inner = (inner for graph in _subgraphs(node) for inner in graph.node)
    return node.op_type in _QDQ or _integer_only(node) or any(map(_of_interest, inner))


def _integer_only(node: onnx.NodeProto) -> bool:
    return node.op_type in _INTEGER_ONLY or node.op_type.startswith("QLinear")


def _refuse_integer_operators(part: _Part) -> None:
    for node in filter(_integer_only, part.nodes):
        raise _refusal(
            node,
            "TensorRT computes on integers only where Q/DQ pairs say so.",
            "Export the quantized model in Q/DQ format (QuantFormat.QDQ in ONNX Runtime).",
        )


def _fold_biases(part: _Part, repairs: _Messages) -> None:
    """int32 through DequantizeLinear, which is how ONNX Runtime writes biases, becomes floats."""
    for node in part.of("DequantizeLinear"):
        if part.element_type(node.input[0]) != INT32:
            continue
        values, scale = part.array(node.input[0]), part.array(node.input[1])
        if values is None or scale is None:
            raise _refusal(
                node,
                "TensorRT dequantizes no int32 tensors, and this one is not constant.",
                "Leave that tensor unquantized.",
            )
        factors = _spread(scale.astype(np.float32), node, values.shape)
        element_type = _attribute(node, "output_dtype") or part.element_type(node.input[1])
        part.remove(node)
        part.put_constant(node.output[0], values.astype(np.float32) * factors, element_type)
        repairs.add("int32 biases, which TensorRT does not dequantize, became floats", _label(node))


def _center_weights(part: _Part, repairs: _Messages) -> None:
    """Constants with zero points become signed ones without, where their values fit."""
    for node in part.of("DequantizeLinear"):
        values = part.array(node.input[0]) if part.tensor(node.input[0]) is not None else None
        given = part.element_type(node.input[0])
        if values is None:
            continue
        signed = _SIGNED.get(given)
        if signed is None:
            if given not in _QUANTIZED:
                raise _wrong_type(node, given)
            continue
        zero = _zero_point(part, node)
        if zero is None or (given == signed and not zero.any()):
            continue
        centered = values.astype(np.int32) - _spread(zero.astype(np.int32), node, values.shape)
        low, high = _RANGE[signed]
        if centered.min(initial=0) < low or centered.max(initial=0) > high:
            raise _refusal(
                node,
                f"TensorRT wants zero point 0, and without its own the weights reach from "
                f"{centered.min()} to {centered.max()}, beyond {low} to {high}.",
                _SYMMETRIC,
            )
        suffix = f"centered_{node.input[2]}" if len(node.input) > 2 else "centered"
        weights = part.constant(node.input[0], suffix, centered, signed)
        part.set_input(node, 0, weights)
        zeros = part.constant(weights, "zero_point", np.zeros(zero.shape), signed)
        part.set_input(node, 2, zeros)
        repairs.add("Weights with zero points became the same without", _label(node))


def _center_activations(part: _Part, repairs: _Messages) -> None:
    """uint8 around 128 is int8 around 0; every other uint8 or zero point is refused."""
    for node in part.of("QuantizeLinear"):
        zero = _zero_point(part, node)
        given = _quantized_type(part, node)
        if zero is None:
            continue
        if given not in _SIGNED and given not in _QUANTIZED:
            raise _wrong_type(node, given)
        if given == UINT8 and (zero == 128).all():
            ends = _dequantizers(part, node, node.output[0])
            for end in (node, *ends):
                zeros = part.constant(end.input[2], "int8", np.zeros(zero.shape), INT8)
                part.set_input(end, 2, zeros)
            repairs.add("uint8 around 128 became int8 around 0", _label(node))
        elif given in (UINT8, UINT4) and not zero.any():
            raise _refusal(
                node,
                f"It quantizes to uint{8 if given == UINT8 else 4}, which TensorRT would take for "
                "the signed type without a word: half of the range would be cut off.",
                _SYMMETRIC,
            )
        elif zero.astype(np.float32).any():
            raise _zero_point_refusal(node, zero)


def _dequantizers(part: _Part, quantizer: onnx.NodeProto, name: str) -> list[onnx.NodeProto]:
    """All that a quantized tensor ends in. Raises BuildError if that is not DQ around 128 alone."""
    part.retype(name)
    found = []
    for node in part.readers(name):
        if node.op_type in _MOVING and name == node.input[0]:
            found += _dequantizers(part, quantizer, node.output[0])
            continue
        zero = _zero_point(part, node) if node.op_type == "DequantizeLinear" else None
        if zero is None or name != node.input[0] or not (zero == 128).all():
            raise _refusal(
                quantizer,
                f"It quantizes to uint8 around 128, which TensorRT does not know, and "
                f"{node.op_type} {_label(node)!r} reads that as it is.",
                _SYMMETRIC,
            )
        found.append(node)
    if part.is_output(name):
        raise _refusal(
            quantizer,
            f"TensorRT quantizes to int8, and the output {name!r} is uint8.",
            "Export the model with a float output there.",
        )
    return found


def _decode_inputs(part: _Part, repairs: _Messages) -> None:
    """uint8 inputs, such as pictures, become floats by plain arithmetic."""
    from onnx import helper

    for node in part.of("DequantizeLinear"):
        name = node.input[0]
        zero = _zero_point(part, node)
        if part.tensor(name) is not None or zero is None:
            continue
        given = _quantized_type(part, node)
        if given in _QUANTIZED and not zero.astype(np.float32).any():
            continue
        scale = part.array(node.input[1])
        known = given in (UINT8, INT8) and part.element_type(node.input[1]) == FLOAT
        if not known or scale is None or scale.size != 1 or zero.size != 1:
            raise _zero_point_refusal(node, zero) if zero.any() else _wrong_type(node, given)
        label = _label(node)
        wide, centered = part.fresh(f"{name}_float"), part.fresh(f"{name}_centered")
        offset = part.constant(node.output[0], "offset", zero.reshape(()), FLOAT)
        factor = part.constant(node.output[0], "scale", np.reshape(scale, ()), FLOAT)
        part.insert_before(
            node,
            helper.make_node("Cast", [name], [wide], f"{label}_cast", to=FLOAT),
            helper.make_node("Sub", [wide, offset], [centered], f"{label}_center"),
            helper.make_node("Mul", [centered, factor], [node.output[0]], f"{label}_scale"),
        )
        part.remove(node)
        repairs.add("Quantized inputs are dequantized by arithmetic", label)


def _spread_scales(part: _Part, repairs: _Messages) -> None:
    """A scale for each channel of fp8 convolutions instead of one for all: the same numbers.

    Where there is one, TensorRT for RTX 1.6 takes another kernel, whose answers were hundreds of
    times too large on an H200.
    """
    for node in part.of("DequantizeLinear"):
        if _quantized_type(part, node) != FP8:
            continue
        readers = [reader for _, reader in _weight_readers(part, node)]
        if not any(reader.op_type in ("Conv", "ConvTranspose") for reader in readers):
            continue
        chain = _weight_chain(part, node)
        weight = part.tensor(chain[0].input[0])
        scale = part.array(node.input[1])
        if weight is None or scale is None or scale.size != 1 or not weight.dims:
            continue
        transposed = any(reader.op_type == "ConvTranspose" for reader in readers)
        axis = 1 if transposed and len(weight.dims) > 1 else 0
        for link in chain:
            _along(link, axis)
            for position in range(1, len(link.input)):
                name = link.input[position]
                value = part.array(name) if name else None
                if value is not None:
                    spread = np.full(weight.dims[axis], value.reshape(()), value.dtype)
                    suffix = f"for_{weight.dims[axis]}_channels"
                    kind = part.element_type(name)
                    part.set_input(link, position, part.constant(name, suffix, spread, kind))
        text = "fp8 convolutions with one scale, which TensorRT for RTX computes wrongly, got one "
        repairs.add(f"{text}for each channel", _label(node))


def _dequantize_convolutions(part: _Part, warnings: _Messages) -> None:
    """Float weights, of the rounded values, in convolutions of two int8 tensors: the same answers
    from another kernel.
    """
    for node in part.of("DequantizeLinear"):
        readers = [reader for _, reader in _weight_readers(part, node)]
        if _quantized_type(part, node) != INT8 or not any(
            reader.op_type in ("Conv", "ConvTranspose") and _is_dequantized(part, reader.input[0])
            for reader in readers
        ):
            continue
        chain = _weight_chain(part, node)
        values, scale = part.array(chain[0].input[0]), part.array(node.input[1])
        if values is None or scale is None:
            continue
        wide = scale.astype(np.float32)
        factors = _spread(wide, node, values.shape)
        if len(chain) > 1:
            low, high = _RANGE[INT8]
            values = np.clip(np.rint(values.astype(np.float32) / factors), low, high)
        element_type = _attribute(node, "output_dtype") or part.element_type(node.input[1])
        for link in chain:
            part.remove(link)
        part.put_constant(node.output[0], values.astype(np.float32) * factors, element_type)
        for reader in readers:
            warnings.add(
                "int8 convolutions, for which this release has no kernels, compute in floating "
                "point on the rounded values",
                _label(reader),
            )


def _is_dequantized(part: _Part, name: str) -> bool:
    maker = part.maker(name)
    while maker is not None and maker.op_type in (*_MOVING, "Cast"):
        maker = part.maker(maker.input[0])
    return maker is not None and maker.op_type == "DequantizeLinear"


def _turn_matrices(part: _Part, notes: _Messages) -> None:
    """int8 and fp8 matrices with the axis that is summed over last.

    The other way round TensorRT for RTX 1.6 reads them with kernels that took 2.4 times as long as
    fp16's on an H200; these take 0.7 (int8) and 0.95 (fp8).
    """
    from onnx import helper

    for node in part.of("DequantizeLinear"):
        if _quantized_type(part, node) not in (INT8, FP8) or _attribute(node, "block_size"):
            continue
        chain = _weight_chain(part, node)
        values, scale = part.array(chain[0].input[0]), part.array(node.input[1])
        readers = _weight_readers(part, node)
        if values is None or scale is None or values.ndim != 2 or not readers:
            continue
        if scale.size > 1 and _axis(node) % 2 != 1:
            continue  # not by output channel: no kernel takes these, which is told below
        if not all(
            reader.op_type == "MatMul"
            or (reader.op_type == "Gemm" and not _attribute(reader, "transB"))
            for _, reader in readers
        ):
            continue
        kind = part.element_type(chain[0].input[0])
        turned = part.constant(chain[0].input[0], "turned", values.T, kind)
        part.set_input(chain[0], 0, turned)
        for link in chain:
            _along(link, 1 - _axis(link) % 2)
            part.retype(link.output[0])
        for name, reader in readers:
            part.retype(name)
            if reader.op_type == "Gemm":
                _drop(reader, "transB")
                reader.attribute.append(helper.make_attribute("transB", 1))
                continue
            back = part.fresh(f"{name}_back")
            label = f"{_label(reader)}_back"
            part.insert_before(
                reader, helper.make_node("Transpose", [name], [back], label, perm=[1, 0])
            )
            part.set_input(reader, 1, back)
        notes.add("quantized matrices were turned, as its fast kernels read them", _label(node))


def _weight_chain(part: _Part, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The Q/DQ nodes between a constant and what reads it, from the last of them."""
    source = part.maker(node.input[0])
    alone = source is not None and len(part.readers(node.input[0])) == 1
    if source is not None and alone and source.op_type == "QuantizeLinear":
        return [source, node]
    return [node]


def _weight_readers(part: _Part, node: onnx.NodeProto) -> list[tuple[str, onnx.NodeProto]]:
    """Those who read what a node makes as their second factor, through Cast too, and under which
    name; nobody where anything else reads it.
    """
    found = []
    for reader in part.readers(node.output[0]):
        if reader.op_type == "Cast":
            behind = _weight_readers(part, reader)
            if not behind:
                return []
            found += behind
        elif list(reader.input).count(node.output[0]) == 1 < len(reader.input) and (
            reader.input[1] == node.output[0]
        ):
            found.append((node.output[0], reader))
        else:
            return []
    return [] if part.is_output(node.output[0]) else found


def _along(node: onnx.NodeProto, axis: int) -> None:
    from onnx import helper

    _drop(node, "axis")
    node.attribute.append(helper.make_attribute("axis", axis))


def _widen_scales(part: _Part, repairs: _Messages) -> None:
    """float32 scales in place of 16-bit ones, with Cast nodes around."""
    from onnx import helper

    for node in part.of(*_QDQ):
        narrow = part.element_type(node.input[1])
        left = _quantized_type(part, node) in (INT4, FP4) or _attribute(node, "block_size")
        if narrow not in (HALF, BFLOAT16) or left:
            continue
        label = _label(node)
        _widen(part, node, 1)
        _drop(node, "precision")
        if node.op_type == "QuantizeLinear":
            _widen(part, node, 0)
        else:
            made = node.output[0]
            target = _attribute(node, "output_dtype") or narrow
            _drop(node, "output_dtype")
            node.output[0] = part.fresh(f"{made}_float32")
            given = [node.output[0]]
            part.insert_after(
                node, helper.make_node("Cast", given, [made], f"{label}_narrow", to=target)
            )
        text = "16-bit scales, with which TensorRT returns infinity, became float32"
        repairs.add(text, label)


def _widen(part: _Part, node: onnx.NodeProto, position: int) -> None:
    from onnx import helper

    name = node.input[position]
    if part.element_type(name) == FLOAT:
        return
    array = part.array(name)
    if array is not None:
        wide = part.constant(name, "float32", array, FLOAT)
    else:
        wide = part.fresh(f"{name}_float32")
        label = f"{_label(node)}_widen{position}"
        part.insert_before(node, helper.make_node("Cast", [name], [wide], label, to=FLOAT))
    part.set_input(node, position, wide)


def _tell_unfused(part: _Part, warnings: _Messages) -> None:
    """Weights quantized along another axis than TensorRT's kernels want: right, but slow."""
    for node in part.of("DequantizeLinear"):
        source = part.maker(node.input[0])
        origin = source.input[0] if source and source.op_type == "QuantizeLinear" else node.input[0]
        weight, scale = part.tensor(origin), part.tensor(node.input[1])
        channels = scale is not None and len(scale.dims) == 1 and scale.dims[0] > 1
        if weight is None or not channels or _attribute(node, "block_size"):
            continue
        rank = len(weight.dims)
        axis = _axis(node) % max(rank, 1)
        outputs = [node.output[0]]
        casts = [n for n in part.readers(outputs[0]) if n.op_type == "Cast"]
        outputs += [cast.output[0] for cast in casts]
        for output, reader in [(name, n) for name in outputs for n in part.readers(name)]:
            wanted = {
                "Conv": 0,
                "ConvTranspose": 1,
                "MatMul": rank - 1,
                "Gemm": 0 if _attribute(reader, "transB") else 1,
            }.get(reader.op_type)
            if wanted in (None, axis) or len(reader.input) < 2 or reader.input[1] != output:
                continue
            warnings.add(
                f"Weights of {reader.op_type} quantized along axis {axis}, where TensorRT fuses "
                f"only axis {wanted}, are dequantized first",
                _label(reader),
            )


def _tell_doubles(part: _Part, warnings: _Messages) -> None:
    for node in part.nodes:
        wide = [name for name in node.input if (t := part.tensor(name)) and t.data_type == DOUBLE]
        if wide or (node.op_type == "Cast" and _attribute(node, "to") == DOUBLE):
            warnings.add("TensorRT computes in float32 what the model has in float64", _label(node))


def _label(node: onnx.NodeProto) -> str:
    return str(node.name or next(iter(node.output), node.op_type))


def _refusal(node: onnx.NodeProto, why: str, remedy: str) -> BuildError:
    return BuildError(
        f"TensorRT cannot run {node.op_type} {_label(node)!r} as it stands.",
        why,
        remedy,
        node=_label(node),
        operator=node.op_type,
    )


def _wrong_type(node: onnx.NodeProto, element_type: int) -> BuildError:
    from onnx import TensorProto

    name = TensorProto.DataType.Name(element_type).lower()
    return _refusal(
        node,
        f"It quantizes to {name}, and TensorRT knows int8, float8e4m3fn, int4 and float4e2m1.",
        _SYMMETRIC,
    )


def _zero_point_refusal(node: onnx.NodeProto, zero: Array) -> BuildError:
    first = zero.reshape(-1)[np.flatnonzero(zero)[0]]
    return _refusal(node, f"Its zero point is {first}, and TensorRT wants 0.", _SYMMETRIC)


def _quantized_type(part: _Part, node: onnx.NodeProto) -> int:
    """The type on the quantized side of a Q or DQ node."""
    if len(node.input) > 2 and node.input[2]:
        return part.element_type(node.input[2])
    if node.op_type == "DequantizeLinear":
        return part.element_type(node.input[0]) or INT8
    return int(_attribute(node, "output_dtype") or UINT8)


def _zero_point(part: _Part, node: onnx.NodeProto) -> Array | None:
    """The zero point's values, a 0 if there is none; None if it is computed."""
    if len(node.input) > 2 and node.input[2]:
        return part.array(node.input[2])
    return np.zeros((), np.int32)


def _axis(node: onnx.NodeProto) -> int:
    axis = _attribute(node, "axis")
    return 1 if axis is None else int(axis)


def _spread(values: Array, node: onnx.NodeProto, shape: tuple[int, ...]) -> Array:
    """Scales or zero points in the shape of what they apply to."""
    if values.size == 1 or not shape:
        return values.reshape(())
    axis = _axis(node) % len(shape) if len(shape) > 1 else 0
    if block := _attribute(node, "block_size"):
        return np.take(np.repeat(values, block, axis), range(shape[axis]), axis)
    return values.reshape([-1 if index == axis else 1 for index in range(len(shape))])


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    from onnx import helper

    found = next((a for a in node.attribute if a.name == name), None)
    return None if found is None else helper.get_attribute_value(found)


def _drop(node: onnx.NodeProto, name: str) -> None:
    for found in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(found)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _captured(node: onnx.NodeProto) -> set[str]:
    """All names that the node's subgraphs read, whether from outside or not."""
    found: set[str] = set()
    for graph in _subgraphs(node):
        found.update(value.name for value in graph.output)
        for inner in graph.node:
            found.update(inner.input, _captured(inner))
    return found


def _all_names(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        names.update(node.input, node.output, *map(_all_names, _subgraphs(node)))
    return names

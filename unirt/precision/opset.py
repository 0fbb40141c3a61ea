"""A graph in a newer opset, where Q/DQ can stand in it: the same answers under the same names.

`_STEPS` is what ONNX changed from opset 7 to 21 so that nodes must change too. Whatever does not
fit the newer operator after that is refused; tests/test_opset.py compares the answers of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from unirt.errors import ModelError
from unirt.precision.graph import FLOAT, Names, all_nodes, name_nodes, subgraphs, tensor_names
from unirt.precision.source import known_shapes, tensor_types

if TYPE_CHECKING:
    import onnx

OLDEST: Final = 7
"""The first opset of ONNX 1.2; operators broadcast otherwise before."""

NEWEST: Final = 21
"""The opset up to which `_STEPS` is complete."""

_ONNX: Final = ("", "ai.onnx")


def opset_of(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    """The opset of ONNX's own operators, 0 if they are not imported."""
    return next((int(entry.version) for entry in imports if entry.domain in _ONNX), 0)


def check_opset(model: onnx.ModelProto, name: str) -> None:
    """Raises ModelError for an opset from which no graph can be raised."""
    opset = opset_of(model.opset_import)
    if opset < OLDEST:
        raise ModelError(
            f"{name} is in opset {opset}, which cannot be quantized.",
            f"It is from before ONNX 1.2, and there is no way from there to opset {OLDEST}.",
            "Export the network with opset 13 or newer.",
            opset=opset,
        )


def raise_opset(model: onnx.ModelProto, needed: int, name: str) -> list[str]:
    """Raises a model, its subgraphs and functions to at least that opset, in place.

    Returns notes. Raises ModelError for what has no equal there.
    """
    from onnx import helper

    check_opset(model, name)
    opset = opset_of(model.opset_import)
    notes = []
    if opset < needed:
        unknown = _Raising(model, name, opset, needed).graph()
        for function in model.functions:
            if 0 < (own := opset_of(function.opset_import)) < needed:
                unknown |= _Raising(model, name, own, needed).function(function)
        notes.append(f"the graph was raised from opset {opset} to {needed}")
        if unknown:
            listed = ", ".join(sorted(unknown))
            notes[0] += f"; nobody knows what that means for {listed}: ONNX has no such operator"
    wanted = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = max(model.ir_version, wanted)
    return notes


def _set_opset(imports: Iterable[onnx.OperatorSetIdProto], opset: int) -> None:
    for entry in imports:
        if entry.domain in _ONNX:
            entry.version = opset


class _Raising:
    """One body on its way from one opset to another. A step changes the `node` that is at hand and
    puts others before and behind it.
    """

    def __init__(self, model: onnx.ModelProto, name: str, opset: int, needed: int) -> None:
        self._model, self._name, self.opset, self.needed = model, name, opset, needed
        self.node_names = name_nodes(model.graph)
        self.names = tensor_names(model.graph)
        self.shapes: Mapping[str, tuple[int | None, ...]] = {}
        self.types: Mapping[str, int] = {}
        self.arrays: dict[str, Any] = {}
        self.read: set[str] = set()
        self.unknown: set[str] = set()
        self.before: list[onnx.NodeProto] = []
        self.behind: list[onnx.NodeProto] = []

    def graph(self) -> set[str]:
        """Returns the operators that ONNX never had."""
        graph = self._model.graph
        self.types = tensor_types(self._model, self._name)
        self.shapes = known_shapes(self._model)
        for tensor in graph.initializer:
            self._know(tensor.name, tensor)
        self._nodes(graph.node, {value.name for value in graph.output})
        _set_opset(self._model.opset_import, self.needed)
        return self.unknown

    def function(self, function: onnx.FunctionProto) -> set[str]:
        taken = (name for node in all_nodes(function.node) for name in (*node.input, *node.output))
        self.names = Names([*function.input, *taken])
        self._nodes(function.node, set(function.output))
        _set_opset(function.opset_import, self.needed)
        return self.unknown

    def _nodes(self, nodes: Any, outputs: set[str]) -> None:
        """Raises the nodes of a whole body; those of graphs inside it first."""
        inner = [graph for node in all_nodes(nodes) for graph in subgraphs(node)]
        self.read = outputs.union(*(node.input for node in all_nodes(nodes)))
        self.read.update(value.name for graph in inner for value in graph.output)
        shapes, self.shapes = self.shapes, {}  # names inside may mean other tensors
        for graph in reversed(inner):
            self._replace(graph.node)
        self.shapes = shapes
        self._replace(nodes)

    def _replace(self, nodes: Any) -> None:
        from onnx import defs

        raised = []
        for node in nodes:
            self.before, self.behind = [], []
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                self._know(node.output[0], node.attribute[0].t)
            if node.domain in _ONNX and not defs.has(node.op_type, ""):
                self.unknown.add(node.op_type)
            elif node.domain in _ONNX:
                self._check(node, self.opset)
                for opset in range(self.opset + 1, self.needed + 1):
                    if (step := _STEPS.get((node.op_type, opset))) is not None:
                        step(self, node)
                self._check(node, self.needed)
            raised += [*self.before, node, *self.behind]
        if len(raised) > len(nodes):
            copies = [type(node)() for node in raised]
            for copy, node in zip(copies, raised, strict=True):
                copy.CopyFrom(node)
            del nodes[:]
            nodes.extend(copies)

    def _know(self, name: str, tensor: onnx.TensorProto) -> None:
        from onnx import numpy_helper

        if len(tensor.dims) < 2:
            self.arrays[name] = numpy_helper.to_array(tensor)

    def _check(self, node: onnx.NodeProto, opset: int) -> None:
        """Refuses a node that is none of that opset, so that nothing is changed unseen."""
        from onnx import defs

        try:
            schema = defs.get_schema(node.op_type, opset, "")
        except defs.SchemaError:
            raise self.refusal(node, f"opset {opset} has no such operator") from None
        if schema.deprecated and opset == self.needed:
            raise self.refusal(node, f"opset {opset} has no such operator any more")
        given = {attribute.name for attribute in node.attribute}
        for wanted in schema.attributes.values():
            if wanted.required and wanted.name not in given:
                raise self.refusal(node, f"opset {opset} has it with {wanted.name!r} only")
        for attribute in node.attribute:
            known: Any = schema.attributes.get(attribute.name)
            if known is None or attribute.type != known.type.value:
                raise self.refusal(node, f"opset {opset} has no such {attribute.name!r}")
        counts = (
            schema.min_input <= len(node.input) <= schema.max_input,
            schema.min_output <= len(node.output) <= schema.max_output,
        )
        if not all(counts):
            what = "outputs" if counts[0] else "inputs"
            raise self.refusal(node, f"opset {opset} has it with other {what}")

    def refusal(self, node: onnx.NodeProto, why: str) -> ModelError:
        called = node.name or next((name for name in node.output if name), "")
        return ModelError(
            f"{self._name} cannot be raised from opset {self.opset} to {self.needed}.",
            f"Quantization needs that, and {node.op_type} {called!r} has no equal there: {why}.",
            f"Export the network with opset {self.needed} or newer.",
            opset=self.opset,
            needed=self.needed,
            node=called,
        )

    def attribute(self, node: onnx.NodeProto, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        from onnx import helper

        for attribute in node.attribute:
            if attribute.name == name:
                if attribute.ref_attr_name:
                    raise self.refusal(node, f"{name!r} comes from the call of a function")
                return helper.get_attribute_value(attribute)
        return default

    def take(self, node: onnx.NodeProto, name: str, default: Any = None) -> Any:
        """The value of an attribute that the node loses."""
        value = self.attribute(node, name, default)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        return value

    def put(self, node: onnx.NodeProto, **attributes: Any) -> None:
        from onnx import helper

        for name, value in attributes.items():
            self.take(node, name)
            node.attribute.append(helper.make_attribute(name, value))

    def constant(self, node: onnx.NodeProto, what: str, value: Any) -> str:
        """A new constant for this node: whole numbers, or floats of the type it computes in."""
        from onnx import helper, numpy_helper

        array = np.asarray(value)
        if array.dtype.kind == "i":
            array = array.astype(np.int64)
        elif node.op_type in ("Clip", "Pad"):
            dtype = self.types.get(node.input[0], FLOAT)
            array = array.astype(helper.tensor_dtype_to_np_dtype(dtype))
        else:
            array = array.astype(np.float32)
        tensor = numpy_helper.from_array(array)
        name = self.add(self.before, node, "Constant", [], what, value=tensor)
        self.arrays[name] = array
        return name

    def add(
        self,
        where: list[onnx.NodeProto],
        node: onnx.NodeProto,
        op_type: str,
        inputs: list[str],
        what: str,
        **attributes: Any,
    ) -> str:
        """A further node before or behind this one, and the name of what it makes."""
        from onnx import helper

        wanted = f"{node.name or node.op_type}__{what}"
        made, name = self.names.fresh(wanted), self.node_names.fresh(wanted)
        where.append(helper.make_node(op_type, inputs, [made], name, **attributes))
        return made

    def finish(
        self, node: onnx.NodeProto, op_type: str, inputs: list[str], what: str, **attributes: Any
    ) -> None:
        """A further node that makes the output of this one from what this one makes now."""
        inner = self.names.fresh(f"{node.output[0]}__{what}")
        self.add(self.behind, node, op_type, [inner, *inputs], what, **attributes)
        self.behind[-1].output[0] = node.output[0]
        node.output[0] = inner


_Step: TypeAlias = Callable[[_Raising, "onnx.NodeProto"], None]


def _inputs(*names: str, first: int = 1) -> _Step:
    """Attributes become inputs."""

    def step(raising: _Raising, node: onnx.NodeProto) -> None:
        node.input.extend([""] * (first - len(node.input)))
        for name in names:
            value = raising.take(node, name)
            if name == "k":  # the one that is no scalar
                value = [value]
            given = value is not None and value != []
            node.input.append(raising.constant(node, name, value) if given else "")
        while not node.input[-1]:
            node.input.pop()

    return step


def _both(*steps: _Step) -> _Step:
    def both(raising: _Raising, node: onnx.NodeProto) -> None:
        for step in steps:
            step(raising, node)

    return both


def _renamed(op_type: str) -> _Step:
    def step(raising: _Raising, node: onnx.NodeProto) -> None:
        node.op_type = op_type

    return step


def _default(**attributes: Any) -> _Step:
    """Attributes that were not given mean something else now."""

    def step(raising: _Raising, node: onnx.NodeProto) -> None:
        given = {attribute.name for attribute in node.attribute}
        raising.put(node, **{name: attributes[name] for name in attributes.keys() - given})

    return step


def _refused(why: str) -> _Step:
    def step(raising: _Raising, node: onnx.NodeProto) -> None:
        raise raising.refusal(node, why)

    return step


def _spatial(raising: _Raising, node: onnx.NodeProto) -> None:
    if not raising.take(node, "spatial", 1):
        raise raising.refusal(node, "it normalizes each position for itself")


def _trained(raising: _Raising, node: onnx.NodeProto) -> None:
    if any(node.output[1:]):
        raise raising.refusal(node, "by its outputs it is one in training")
    del node.output[1:]


def _masked(raising: _Raising, node: onnx.NodeProto) -> None:
    """Engines never agreed on the mask of one that drops nothing."""
    if any(name in raising.read for name in node.output[1:]):
        raise raising.refusal(node, "its mask is read")
    del node.output[1:]


def _asymmetric(raising: _Raising, node: onnx.NodeProto) -> None:
    """As all engines did it: positions counted from corners, and of the nearest the lower one where
    an axis grows, the upper one where it shrinks.
    """
    scales = node.input[1]
    node.input[:] = [node.input[0], "", scales]
    raising.put(node, coordinate_transformation_mode="asymmetric")
    if raising.attribute(node, "mode", b"nearest") != b"nearest":
        return
    known = raising.arrays.get(scales)
    grows, shrinks = (True, True) if known is None else ((known > 1).any(), (known < 1).any())
    raising.put(node, nearest_mode="ceil" if shrinks and not grows else "floor")
    if grows and shrinks:
        one = raising.constant(node, "one", 1.0)
        node.input[2] = raising.add(raising.before, node, "Max", [scales, one], "grow")
        shrink = raising.add(raising.before, node, "Min", [scales, one], "shrink")
        attributes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "ceil"}
        raising.finish(node, "Resize", ["", shrink], "shrunk", **attributes)


def _half_pixel(raising: _Raising, node: onnx.NodeProto) -> None:
    mode, nearest = "coordinate_transformation_mode", "nearest_mode"
    if raising.attribute(node, mode) == b"tf_half_pixel_for_nn":
        if raising.attribute(node, "mode") not in (None, b"nearest") or (
            raising.attribute(node, nearest) != b"floor"
        ):
            raise raising.refusal(node, "tf_half_pixel_for_nn stands for floor alone")
        # floor(x) is round_prefer_ceil(x - 0.5), and by so much do the positions differ.
        raising.put(node, **{mode: "half_pixel", nearest: "round_prefer_ceil"})
    for at, name in enumerate(node.input):
        if at and (known := raising.arrays.get(name)) is not None and not known.size:
            node.input[at] = ""


def _flattened(raising: _Raising, node: onnx.NodeProto) -> None:
    """It went over all axes from its own on, as if they were one."""
    axis = raising.attribute(node, "axis", 1)
    shape = raising.shapes.get(node.input[0])
    if axis == -1 or (shape is not None and all(size == 1 for size in shape[axis:][1:])):
        raising.put(node, axis=axis)
        return
    given = node.input[0]
    size = raising.add(raising.before, node, "Shape", [given], "shape")
    node.input[0] = raising.add(raising.before, node, "Flatten", [given], "flatten", axis=axis)
    raising.put(node, axis=-1)
    raising.finish(node, "Reshape", [size], "flat")


def _counted(raising: _Raising, node: onnx.NodeProto) -> None:
    if len(node.input) < 2 or not node.input[1]:
        raising.put(node, num_outputs=len(node.output))


def _grid(raising: _Raising, node: onnx.NodeProto) -> None:
    if (mode := _GRID_MODES.get(raising.attribute(node, "mode"))) is not None:
        raising.put(node, mode=mode)


def _each_channel(raising: _Raising, node: onnx.NodeProto) -> None:
    """Scale and shift of each group become those of each of its channels."""
    shape = raising.shapes.get(node.input[0]) or ()
    channels = shape[1] if len(shape) > 1 else None
    if channels is None:
        raise raising.refusal(node, "nobody knows how many channels it has")
    times = [1, channels // max(1, raising.attribute(node, "num_groups"))]
    for at, what in ((1, "scale"), (2, "shift")):
        where, given = raising.before, node.input[at]
        axis = raising.constant(node, f"{what}_axis", [1])
        column = raising.add(where, node, "Unsqueeze", [given, axis], f"{what}_column")
        wide = raising.constant(node, f"{what}_times", times)
        table = raising.add(where, node, "Expand", [column, wide], f"{what}_table")
        flat = raising.constant(node, f"{what}_flat", [-1])
        node.input[at] = raising.add(where, node, "Reshape", [table, flat], what)


_GRID_MODES: Final = {b"bilinear": "linear", b"bicubic": "cubic"}
_AXES: Final = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

_STEPS: Final[Mapping[tuple[str, int], _Step]] = {
    ("BatchNormalization", 9): _spatial,
    ("Scan", 9): _refused("it had a batch of its own"),
    ("Upsample", 9): _inputs("scales"),
    ("Slice", 10): _inputs("starts", "ends", "axes"),
    ("TopK", 10): _inputs("k"),
    ("Upsample", 10): _renamed("Resize"),
    ("Clip", 11): _inputs("min", "max"),
    ("Pad", 11): _inputs("pads", "value"),
    ("Resize", 11): _asymmetric,
    ("Scatter", 11): _renamed("ScatterElements"),
    ("Dropout", 12): _both(_masked, _inputs("ratio")),
    **{(op_type, 13): _flattened for op_type in ("Hardmax", "LogSoftmax", "Softmax")},
    **{(op_type, 13): _inputs("axes") for op_type in ("ReduceSum", "Squeeze", "Unsqueeze")},
    ("Resize", 13): _half_pixel,
    ("Split", 13): _inputs("split"),
    ("BatchNormalization", 14): _trained,
    ("RoiAlign", 16): _default(coordinate_transformation_mode="output_half_pixel"),
    **{(f"Reduce{what}", 18): _inputs("axes") for what in _AXES},
    ("Split", 18): _counted,
    ("DFT", 20): _both(_default(axis=1), _inputs("axis", first=2)),
    ("GridSample", 20): _grid,
    ("GroupNormalization", 21): _each_channel,
}

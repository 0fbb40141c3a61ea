"""Reads and checks ONNX models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Final, Literal, NamedTuple, TypeAlias

from unirt.formats.content import Content, size_text
from unirt.formats.model_file import ModelFile, frozen, refusal
from unirt.formats.onnx_external import ExternalData
from unirt.formats.onnx_growth import check_growth
from unirt.formats.onnx_proto import (
    ELEMENT_TYPES,
    Attribute,
    ElementType,
    Function,
    Graph,
    Model,
    Node,
    SparseTensor,
    Tensor,
    TensorType,
    Type,
    ValueInfo,
)
from unirt.formats.protobuf import Numbers, WireError, decode
from unirt.types import Dim, TensorSpec

EXTERNAL: Final = 1
FLOAT: Final = 1
_PRODUCTS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ACTIVATIONS: Final = frozenset({"Clip", "LeakyRelu", "Relu"})
# Engines inline local functions. Real graphs have up to some 100,000 nodes then.
MAX_INLINED_NODES: Final = 1_000_000
MAX_CALL_DEPTH: Final = 100
MAX_RANK: Final = 64
_INT64_MAX: Final = 2**63 - 1

Kind: TypeAlias = Literal["tensor", "sequence", "optional", "map", "sparse"]
FunctionKey: TypeAlias = tuple[str, str, str]


def read(content: Content, max_bytes: int) -> ModelFile:
    """The ONNX model in `content`. Raises ModelError."""
    return _Reader(content, max_bytes).read()


def domain_name(domain: str) -> str:
    return domain or "ai.onnx"


def _has_float_islands(graph: Graph) -> bool:
    """Whether a product of a dequantized tensor and a float32 weight is quantized behind itself or
    its activation.
    """
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        quantizes = node.op_type == "QuantizeLinear" and node.input
        made = makers.get(node.input[0]) if quantizes else None
        if made is not None and made.op_type in _ACTIVATIONS and made.input:
            made = makers.get(made.input[0])
        if made is None or made.op_type not in _PRODUCTS or len(made.input) < 2:
            continue
        before = makers.get(made.input[0])
        if made.input[1] in floats and before is not None and before.op_type == "DequantizeLinear":
            return True
    return False


class _Reader:
    def __init__(self, content: Content, max_bytes: int) -> None:
        self.content = content
        self.max_bytes = max_bytes
        self.refuse = refusal(content)
        self.external = ExternalData(content.path, self.refuse)
        self.ops: Counter[str] = Counter()
        self.weights: Counter[str] = Counter()
        self.declared = 0  # bytes of all tensors, as engines will hold them

    def read(self) -> ModelFile:
        model = self.decode()
        graph = model.graph
        if graph is None:
            raise self.refuse(
                "has no graph.",
                "It reads as ONNX but holds no network: it is damaged, cut short or no model.",
                "Fetch or export the model again.",
            )
        if not model.opset_import:
            raise self.refuse(
                "does not say which opset it uses.",
                "Without an opset import nobody knows what its operators mean.",
                "Fetch or export the model again; it may be cut short.",
            )
        if not graph.output:
            raise self.refuse(
                "has no outputs.",
                "A network without outputs computes nothing.",
                "Export the model again and mark its outputs.",
            )
        weights = {tensor.name for tensor in graph.initializer}
        weights |= {sparse.values.name for sparse in graph.sparse_initializer if sparse.values}
        self.unique((value.name for value in graph.output), "outputs")
        inputs = tuple(self.spec(value, "input") for value in graph.input)
        outputs = tuple(self.spec(value, "output") for value in graph.output)
        self.graph(graph, weigh=True)
        functions = self.functions(model.functions)
        for training in model.training_info:
            for extra in (training.initialization, training.algorithm):
                if extra is not None:
                    self.graph(extra, weigh=False)
        self.external.check_total(self.content.size, self.max_bytes)
        _Inlining(functions, self).check(graph)
        check_growth(model, functions, self.max_bytes, self.refuse)
        return ModelFile(
            format="onnx",
            content=Content(self.content.source, self.external.regions),
            # Before IR 4 every weight had to be listed as an input, too.
            inputs=tuple(spec for spec in inputs if spec.name not in weights),
            outputs=outputs,
            op_counts=frozen(dict(self.ops.most_common())),
            weight_dtypes=frozen(dict(self.weights.most_common())),
            opset=frozen({domain_name(s.domain): s.version for s in model.opset_import}),
            ir_version=model.ir_version,
            producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
            has_float_islands=_has_float_islands(graph),
        )

    def decode(self) -> Model:
        data = self.content.view()
        try:
            return decode(data, Model())
        except WireError as error:
            # Every ONNX writer starts with the IR version, a small number in field 1.
            if len(data) > 1 and data[0] == 0x08 and 0 < data[1] < 0x40:
                raise self.refuse(
                    "is cut short or damaged.",
                    f"It starts like an ONNX model, but {error}.",
                    "Fetch or export the model again.",
                ) from error
            raise self.refuse(
                "is not a model that UniRT reads.",
                f"It has no TFLite mark, and as ONNX it is damaged: {error}.",
                "Give an intact .onnx or .tflite file.",
            ) from error

    # Names

    def unique(self, names: Iterable[str], what: str) -> set[str]:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise self.duplicate(name, f"is one of its {what} twice")
            seen.add(name)
        return seen

    def duplicate(self, name: str, how: str) -> Exception:
        return self.refuse(
            f"uses the name {name!r} twice.",
            f"Every value of a graph has one name and one origin, but {name!r} {how}.",
            "Export the model again, or rename one of the two.",
            tensor=name,
        )

    # Graphs

    def graph(self, graph: Graph, *, weigh: bool) -> None:
        inputs = self.unique((value.name for value in graph.input), "inputs")
        weights: set[str] = set()
        for tensor in graph.initializer:
            self.initializer(tensor.name, weights)
            self.tensor(tensor, tensor.name, weigh=weigh)
        for sparse in graph.sparse_initializer:
            if sparse.values is not None:
                self.initializer(sparse.values.name, weights)
            self.sparse(sparse, weigh=weigh)
        self.nodes(graph.node, inputs | weights, weigh=weigh)

    def initializer(self, name: str, weights: set[str]) -> None:
        if name and name in weights:
            raise self.duplicate(name, "is the name of two weights")
        weights.add(name)

    def nodes(self, nodes: Sequence[Node], defined: set[str], *, weigh: bool) -> None:
        for node in nodes:
            for name in node.output:
                if name in defined and name:
                    raise self.duplicate(name, f"is written again by a {node.op_type} node")
                defined.add(name)
            if weigh:
                prefix = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
                self.ops[prefix + node.op_type] += 1
            for attribute in node.attribute:
                self.attribute(attribute, node.op_type, weigh=weigh)

    def attribute(self, attribute: Attribute, op: str, *, weigh: bool) -> None:
        for tensor in _tensors(attribute):
            self.tensor(tensor, tensor.name or f"{op}.{attribute.name}", weigh=False)
        for sparse in _sparse_tensors(attribute):
            self.sparse(sparse, weigh=False)
        for graph in graphs_of(attribute):
            self.graph(graph, weigh=weigh)

    def functions(self, functions: Sequence[Function]) -> Mapping[FunctionKey, Function]:
        by_key: dict[FunctionKey, Function] = {}
        for function in functions:
            key = domain_name(function.domain), function.name, function.overload
            if key in by_key:
                raise self.duplicate(function.name, "is the name of two functions")
            by_key[key] = function
            inputs = self.unique(function.input, f"inputs of function {function.name!r}")
            self.nodes(function.node, inputs, weigh=True)
            for attribute in function.attribute_proto:
                self.attribute(attribute, function.name, weigh=True)
        return by_key

    # Tensors

    def tensor(self, tensor: Tensor, name: str, *, weigh: bool) -> None:
        """Checks that the tensor has just the data that its shape and type need."""
        dtype = self.element_type(tensor.data_type, name)
        count = self.elements(self.dims(tensor.dims, name), name)
        nbytes = (count * dtype.bits + 7) // 8
        self.declare(nbytes, name)
        if weigh:
            self.weights[dtype.name] += count
        if tensor.data_location == EXTERNAL:
            if dtype.name == "string":
                raise self.refuse(
                    f"keeps the strings of tensor {name!r} outside the file.",
                    "ONNX allows that for numbers only.",
                    "Save the model with that tensor inside.",
                    tensor=name,
                )
            self.external.add(name, tensor.external_data, nbytes)
        elif tensor.raw_data is not None and dtype.name != "string":
            if len(tensor.raw_data) != nbytes:
                raise self.wrong_data(name, f"{nbytes:,} bytes", f"{len(tensor.raw_data):,}")
        else:
            data: Numbers | None = getattr(tensor, dtype.field)
            have = data.count if data else 0
            if have not in _typed_counts(dtype, count):
                need = count * dtype.per_element
                raise self.wrong_data(name, f"{need:,} elements in {dtype.field}", f"{have:,}")

    def wrong_data(self, name: str, need: str, have: str) -> Exception:
        return self.refuse(
            f"has the wrong amount of data for tensor {name!r}.",
            f"Its shape and type need {need}; it has {have}.",
            "Fetch or export the model again.",
            tensor=name,
        )

    def sparse(self, sparse: SparseTensor, *, weigh: bool) -> None:
        values, indices = sparse.values, sparse.indices
        if values is None or indices is None:
            raise self.refuse(
                "has a sparse tensor without values or without indices.",
                "It needs both.",
                "Fetch or export the model again.",
            )
        name = values.name
        self.tensor(values, name, weigh=weigh)
        self.tensor(indices, f"{name} (indices)", weigh=False)
        # Engines make it dense while they load.
        dense = self.elements(self.dims(sparse.dims, name), name)
        self.declare(dense * self.element_type(values.data_type, name).bits // 8, name)

    def declare(self, nbytes: int, name: str) -> None:
        self.declared += nbytes
        if self.declared > self.max_bytes:
            if nbytes > self.max_bytes:
                why = f"tensor {name!r} declares {size_text(nbytes)}"
            else:
                why = f"up to tensor {name!r} its tensors declare {size_text(self.declared)}"
            raise self.refuse(
                "is larger than models may be.",
                f"The limit is {size_text(self.max_bytes)}, and {why}.",
                "If you trust the file, raise the limit with Model(..., max_bytes=...) or "
                "UNIRT_MAX_MODEL_BYTES.",
                tensor=name,
                max_bytes=self.max_bytes,
            )

    def element_type(self, number: int, name: str) -> ElementType:
        dtype = ELEMENT_TYPES.get(number)
        if dtype is None:
            raise self.refuse(
                f"has a tensor {name!r} of the unknown element type {number}.",
                "The file is damaged, or newer than this UniRT.",
                "Fetch or export the model again, or update unirt.",
                tensor=name,
            )
        return dtype

    def dims(self, dims: Numbers | None, name: str) -> list[int]:
        if dims is None:
            return []
        self.rank(dims.count, name)
        return [int(size) for size in dims.values]

    def rank(self, rank: int, name: str) -> None:
        if rank > MAX_RANK:
            raise self.refuse(
                f"has a tensor {name!r} of rank {rank:,}.",
                "No engine takes that many dimensions.",
                "Fetch or export the model again.",
                tensor=name,
            )

    def elements(self, shape: Sequence[int], name: str) -> int:
        """How many elements a shape has. Raises ModelError if it is negative or overflows."""
        if any(size < 0 for size in shape):
            raise self.refuse(
                f"has a tensor {name!r} with a negative dimension.",
                f"Its shape is {list(shape)}.",
                "Fetch or export the model again.",
                tensor=name,
            )
        # Zeros are left out: engines multiply from the left, and may overflow before they meet one.
        if prod(size for size in shape if size) > _INT64_MAX:
            raise self.refuse(
                f"has a tensor {name!r} with more elements than 64 bits count.",
                f"Its shape is {list(shape)}.",
                "Fetch or export the model again.",
                tensor=name,
            )
        return prod(shape)

    # Inputs and outputs

    def spec(self, value: ValueInfo, what: str) -> TensorSpec:
        kind, tensor = _unwrap(value.type)
        if tensor is None:
            if value.type is not None and (kind == "map" or value.type.opaque_type is not None):
                return TensorSpec(value.name, "opaque", None, kind)
            if what == "output":  # engines infer it
                return TensorSpec(value.name, "undefined", None, kind)
        if tensor is None or (what == "input" and tensor.elem_type == 0):
            raise self.refuse(
                f"does not say of what type its input {value.name!r} is.",
                "Without a type no value can be given to it.",
                "Export the model again with typed inputs.",
                tensor=value.name,
            )
        if tensor.elem_type == 0:
            return TensorSpec(value.name, "undefined", None, kind)
        dtype = self.element_type(tensor.elem_type, value.name)
        if tensor.shape is None:
            return TensorSpec(value.name, dtype.name, None, kind)
        shape: list[Dim] = []
        self.rank(len(tensor.shape.dim), value.name)
        for dim in tensor.shape.dim:
            # Exporters write -1 for an unknown size, and engines take it so.
            known = dim.dim_value is not None and dim.dim_value != -1
            shape.append(dim.dim_value if known else dim.dim_param or None)
        static = [size for size in shape if isinstance(size, int)]
        size = self.elements(static, value.name) * dtype.bits // 8
        if size > self.max_bytes:
            raise self.refuse(
                f"has an {what} {value.name!r} larger than models may be.",
                f"The limit is {size_text(self.max_bytes)}, and its shape {shape} takes "
                f"{size_text(size)}.",
                "Export the model again with a sensible shape, or raise the limit with "
                "Model(..., max_bytes=...).",
                tensor=value.name,
                max_bytes=self.max_bytes,
            )
        return TensorSpec(value.name, dtype.name, tuple(shape), kind)


class _Cost(NamedTuple):
    """What a call of a function becomes when engines inline it."""

    nodes: int
    nbytes: int
    depth: int


class _Inlining:
    """Finds out, without doing it, how large a graph grows when its functions are inlined."""

    def __init__(self, functions: Mapping[FunctionKey, Function], reader: _Reader) -> None:
        self.functions = functions
        self.reader = reader
        self.costs: dict[FunctionKey, _Cost] = {}
        self.active: set[FunctionKey] = set()

    def check(self, graph: Graph) -> None:
        if not self.functions:
            return
        cost = self.total(graph.node)
        # Functions that nobody calls are checked, too: some engines inline all of them.
        for key in self.functions:
            self.function(key)
        self.check_cost("its graph", cost)

    def function(self, key: FunctionKey) -> _Cost:
        if key in self.costs:
            return self.costs[key]
        name = key[1]
        if key in self.active:
            raise self.reader.refuse(
                f"has a function {name!r} that calls itself.",
                "ONNX functions are inlined, so that recursion would never end.",
                "Export the model again without recursive functions.",
                function=name,
            )
        self.active.add(key)
        self.check_depth(name, len(self.active))
        inner = self.total(self.functions[key].node)
        self.active.discard(key)
        cost = _Cost(inner.nodes, inner.nbytes, inner.depth + 1)
        self.check_depth(name, cost.depth)
        self.check_cost(f"its function {name!r}", cost)
        self.costs[key] = cost
        return cost

    def check_depth(self, name: str, depth: int) -> None:
        if depth > MAX_CALL_DEPTH:
            raise self.reader.refuse(
                f"has functions that call each other more than {MAX_CALL_DEPTH} deep.",
                f"Among them is {name!r}, and engines inline them all.",
                "Inline the functions when exporting.",
                function=name,
            )

    def total(self, nodes: Sequence[Node]) -> _Cost:
        count = nbytes = depth = 0
        for node in nodes:
            key = domain_name(node.domain), node.op_type, node.overload
            costs = [_Cost(1, 0, 0)]
            if key in self.functions:
                costs = [self.function(key)]
            for attribute in node.attribute:
                nbytes += sum(_stored(tensor) for tensor in _tensors(attribute))
                for graph in graphs_of(attribute):
                    nbytes += sum(map(_stored, graph.initializer))
                    costs.append(self.total(graph.node))
            count += sum(cost.nodes for cost in costs)
            nbytes += sum(cost.nbytes for cost in costs)
            depth = max(depth, *(cost.depth for cost in costs))
        return _Cost(count, nbytes, depth)

    def check_cost(self, what: str, cost: _Cost) -> None:
        limit = self.reader.max_bytes
        if cost.nodes > MAX_INLINED_NODES or cost.nbytes > limit:
            raise self.reader.refuse(
                "grows too large when its functions are inlined.",
                f"With all calls {what} has {cost.nodes:,} nodes and {size_text(cost.nbytes)} of "
                f"constants, more than {MAX_INLINED_NODES:,} or {size_text(limit)}.",
                "Export the model again without nested functions.",
                nodes=cost.nodes,
            )


def _unwrap(type_: Type | None, kind: Kind = "tensor") -> tuple[Kind, TensorType | None]:
    """The outermost kind of a type, and the tensor type at its core."""
    if type_ is None:
        return kind, None
    if type_.tensor_type is not None:
        return kind, type_.tensor_type
    if type_.sparse_tensor_type is not None:
        return "sparse" if kind == "tensor" else kind, type_.sparse_tensor_type
    for name, inner in (("sequence", type_.sequence_type), ("optional", type_.optional_type)):
        if inner is not None:
            outer: Kind = "sequence" if name == "sequence" else "optional"
            return outer if kind == "tensor" else kind, _unwrap(inner.elem_type)[1]
    if type_.map_type is not None:
        return "map" if kind == "tensor" else kind, _unwrap(type_.map_type.value_type)[1]
    return kind, None


def _tensors(attribute: Attribute) -> Iterator[Tensor]:
    if attribute.t is not None:
        yield attribute.t
    yield from attribute.tensors


def _sparse_tensors(attribute: Attribute) -> Iterator[SparseTensor]:
    if attribute.sparse_tensor is not None:
        yield attribute.sparse_tensor
    yield from attribute.sparse_tensors


def graphs_of(attribute: Attribute) -> Iterator[Graph]:
    if attribute.g is not None:
        yield attribute.g
    yield from attribute.graphs


def _typed_counts(dtype: ElementType, count: int) -> set[int]:
    """How many entries the typed data field may have; small types are packed one way or another."""
    if dtype.bits in (2, 4):
        return {-(-count * dtype.bits // 8), -(-count * dtype.bits // 32)}
    return {count * dtype.per_element}


def _stored(tensor: Tensor) -> int:
    """Bytes of a tensor that passed its checks."""
    count = prod(int(size) for size in tensor.dims.values) if tensor.dims else 1
    return count * ELEMENT_TYPES[tensor.data_type].bits // 8

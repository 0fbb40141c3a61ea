"""The messages of ONNX, as far as UniRT reads them: names and numbers as in onnx.proto."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from unirt.formats.protobuf import Message, Numbers, many, one, table


class ElementType(NamedTuple):
    """A tensor's element type: its name, its bits, and the typed field and units of its data."""

    name: str
    bits: int
    field: str = "int32_data"
    per_element: int = 1


ELEMENT_TYPES: Final = {
    1: ElementType("float32", 32, "float_data"),
    2: ElementType("uint8", 8),
    3: ElementType("int8", 8),
    4: ElementType("uint16", 16),
    5: ElementType("int16", 16),
    6: ElementType("int32", 32),
    7: ElementType("int64", 64, "int64_data"),
    8: ElementType("string", 0, "string_data"),
    9: ElementType("bool", 8),
    10: ElementType("float16", 16),
    11: ElementType("float64", 64, "double_data"),
    12: ElementType("uint32", 32, "uint64_data"),
    13: ElementType("uint64", 64, "uint64_data"),
    14: ElementType("complex64", 64, "float_data", 2),
    15: ElementType("complex128", 128, "double_data", 2),
    16: ElementType("bfloat16", 16),
    17: ElementType("float8_e4m3fn", 8),
    18: ElementType("float8_e4m3fnuz", 8),
    19: ElementType("float8_e5m2", 8),
    20: ElementType("float8_e5m2fnuz", 8),
    21: ElementType("uint4", 4),
    22: ElementType("int4", 4),
    23: ElementType("float4_e2m1fn", 4),
    24: ElementType("float8_e8m0fnu", 8),
    25: ElementType("uint2", 2),
    26: ElementType("int2", 2),
    27: ElementType("float6_e2m3fn", 6),
    28: ElementType("float6_e3m2fn", 6),
}


class StringStringEntry(Message):
    key: str = ""
    value: str = ""
    FIELDS = table({1: one("key", str), 2: one("value", str)})


class OperatorSetId(Message):
    domain: str = ""
    version: int = 0
    FIELDS = table({1: one("domain", str), 2: one("version", "int")})


class Tensor(Message):
    dims: Numbers | None = None
    data_type: int = 0
    name: str = ""
    raw_data: memoryview | None = None
    float_data: Numbers | None = None
    double_data: Numbers | None = None
    int32_data: Numbers | None = None
    int64_data: Numbers | None = None
    uint64_data: Numbers | None = None
    string_data: Numbers | None = None
    external_data: Sequence[StringStringEntry] = ()
    data_location: int = 0
    FIELDS = table(
        {
            1: many("dims", "int"),
            2: one("data_type", "int32"),
            4: many("float_data", "float32"),
            5: many("int32_data", "int32"),
            6: many("string_data", "counted"),
            7: many("int64_data", "int"),
            8: one("name", str),
            9: one("raw_data", bytes),
            10: many("double_data", "float64"),
            11: many("uint64_data", "int"),
            13: many("external_data", StringStringEntry),
            14: one("data_location", "int32"),
        }
    )


class SparseTensor(Message):
    values: Tensor | None = None
    indices: Tensor | None = None
    dims: Numbers | None = None
    FIELDS = table({1: one("values", Tensor), 2: one("indices", Tensor), 3: many("dims", "int")})


class Dimension(Message):
    dim_value: int | None = None
    dim_param: str = ""
    FIELDS = table({1: one("dim_value", "int"), 2: one("dim_param", str)})


class TensorShape(Message):
    dim: Sequence[Dimension] = ()
    FIELDS = table({1: many("dim", Dimension)})


class TensorType(Message):
    """Of a dense or sparse tensor."""

    elem_type: int = 0
    shape: TensorShape | None = None
    FIELDS = table({1: one("elem_type", "int32"), 2: one("shape", TensorShape)})


class ContainerType(Message):
    """Of a sequence or an optional."""

    elem_type: Type | None = None


class MapType(Message):
    value_type: Type | None = None


class Opaque(Message):
    pass


class Type(Message):
    tensor_type: TensorType | None = None
    sequence_type: ContainerType | None = None
    map_type: MapType | None = None
    opaque_type: Opaque | None = None
    sparse_tensor_type: TensorType | None = None
    optional_type: ContainerType | None = None
    FIELDS = table(
        {
            1: one("tensor_type", TensorType),
            4: one("sequence_type", ContainerType),
            5: one("map_type", MapType),
            7: one("opaque_type", Opaque),
            8: one("sparse_tensor_type", TensorType),
            9: one("optional_type", ContainerType),
        }
    )


ContainerType.FIELDS = table({1: one("elem_type", Type)})
MapType.FIELDS = table({2: one("value_type", Type)})


class ValueInfo(Message):
    name: str = ""
    type: Type | None = None
    FIELDS = table({1: one("name", str), 2: one("type", Type)})


class Attribute(Message):
    name: str = ""
    ref_attr_name: str = ""
    f: float = 0.0
    i: int = 0
    s: memoryview | None = None
    t: Tensor | None = None
    g: Graph | None = None
    sparse_tensor: SparseTensor | None = None
    floats: Numbers | None = None
    ints: Numbers | None = None
    tensors: Sequence[Tensor] = ()
    graphs: Sequence[Graph] = ()
    sparse_tensors: Sequence[SparseTensor] = ()


class Node(Message):
    input: Sequence[str] = ()
    output: Sequence[str] = ()
    op_type: str = ""
    domain: str = ""
    overload: str = ""
    attribute: Sequence[Attribute] = ()
    FIELDS = table(
        {
            1: many("input", str),
            2: many("output", str),
            4: one("op_type", str),
            5: many("attribute", Attribute),
            7: one("domain", str),
            8: one("overload", str),
        }
    )


class Graph(Message):
    node: Sequence[Node] = ()
    initializer: Sequence[Tensor] = ()
    sparse_initializer: Sequence[SparseTensor] = ()
    input: Sequence[ValueInfo] = ()
    output: Sequence[ValueInfo] = ()
    FIELDS = table(
        {
            1: many("node", Node),
            5: many("initializer", Tensor),
            11: many("input", ValueInfo),
            12: many("output", ValueInfo),
            15: many("sparse_initializer", SparseTensor),
        }
    )


Attribute.FIELDS = table(
    {
        1: one("name", str),
        2: one("f", "float32"),
        3: one("i", "int"),
        4: one("s", bytes),
        5: one("t", Tensor),
        6: one("g", Graph),
        7: many("floats", "float32"),
        8: many("ints", "int"),
        10: many("tensors", Tensor),
        11: many("graphs", Graph),
        21: one("ref_attr_name", str),
        22: one("sparse_tensor", SparseTensor),
        23: many("sparse_tensors", SparseTensor),
    }
)


class Function(Message):
    name: str = ""
    domain: str = ""
    overload: str = ""
    input: Sequence[str] = ()
    output: Sequence[str] = ()
    node: Sequence[Node] = ()
    attribute_proto: Sequence[Attribute] = ()
    FIELDS = table(
        {
            1: one("name", str),
            4: many("input", str),
            5: many("output", str),
            7: many("node", Node),
            10: one("domain", str),
            11: many("attribute_proto", Attribute),
            13: one("overload", str),
        }
    )


class TrainingInfo(Message):
    initialization: Graph | None = None
    algorithm: Graph | None = None
    FIELDS = table({1: one("initialization", Graph), 2: one("algorithm", Graph)})


class Model(Message):
    ir_version: int = 0
    producer_name: str = ""
    producer_version: str = ""
    graph: Graph | None = None
    opset_import: Sequence[OperatorSetId] = ()
    training_info: Sequence[TrainingInfo] = ()
    functions: Sequence[Function] = ()
    FIELDS = table(
        {
            1: one("ir_version", "int"),
            2: one("producer_name", str),
            3: one("producer_version", str),
            7: one("graph", Graph),
            8: many("opset_import", OperatorSetId),
            20: many("training_info", TrainingInfo),
            25: many("functions", Function),
        }
    )

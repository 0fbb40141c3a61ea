"""Reads and checks TFLite models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from typing import Final

from unirt.formats.content import Content, size_text
from unirt.formats.flatbuffer import FlatBuffer, FlatBufferError, Table
from unirt.formats.model_file import ModelFile, frozen, refusal
from unirt.types import TensorSpec

# Element types in the order of their numbers, with their bits; 0 where a shape tells no size.
TYPES: Final = (
    *(("float32", 32), ("float16", 16), ("int32", 32), ("uint8", 8), ("int64", 64), ("string", 0)),
    *(("bool", 8), ("int16", 16), ("complex64", 64), ("int8", 8), ("float64", 64)),
    *(("complex128", 128), ("uint64", 64), ("resource", 0), ("variant", 0), ("uint32", 32)),
    *(("uint16", 16), ("int4", 4), ("bfloat16", 16), ("int2", 2), ("uint4", 4)),
    *(("float8_e4m3fn", 8), ("float8_e5m2", 8)),
)
# Builtin operators in the order of their codes.
_OPERATOR_NAMES: Final = """
    ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE
    EMBEDDING_LOOKUP FLOOR FULLY_CONNECTED HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D
    LOCAL_RESPONSE_NORMALIZATION LOGISTIC LSH_PROJECTION LSTM MAX_POOL_2D MUL RELU RELU_N1_TO_1
    RELU6 RESHAPE RESIZE_BILINEAR RNN SOFTMAX SPACE_TO_DEPTH SVDF TANH CONCAT_EMBEDDINGS SKIP_GRAM
    CALL CUSTOM EMBEDDING_LOOKUP_SPARSE PAD UNIDIRECTIONAL_SEQUENCE_RNN GATHER BATCH_TO_SPACE_ND
    SPACE_TO_BATCH_ND TRANSPOSE MEAN SUB DIV SQUEEZE UNIDIRECTIONAL_SEQUENCE_LSTM STRIDED_SLICE
    BIDIRECTIONAL_SEQUENCE_RNN EXP TOPK_V2 SPLIT LOG_SOFTMAX DELEGATE BIDIRECTIONAL_SEQUENCE_LSTM
    CAST PRELU MAXIMUM ARG_MAX MINIMUM LESS NEG PADV2 GREATER GREATER_EQUAL LESS_EQUAL SELECT
    SLICE SIN TRANSPOSE_CONV SPARSE_TO_DENSE TILE EXPAND_DIMS EQUAL NOT_EQUAL LOG SUM SQRT RSQRT
    SHAPE POW ARG_MIN FAKE_QUANT REDUCE_PROD REDUCE_MAX PACK LOGICAL_OR ONE_HOT LOGICAL_AND
    LOGICAL_NOT UNPACK REDUCE_MIN FLOOR_DIV REDUCE_ANY SQUARE ZEROS_LIKE FILL FLOOR_MOD RANGE
    RESIZE_NEAREST_NEIGHBOR LEAKY_RELU SQUARED_DIFFERENCE MIRROR_PAD ABS SPLIT_V UNIQUE CEIL
    REVERSE_V2 ADD_N GATHER_ND COS WHERE RANK ELU REVERSE_SEQUENCE MATRIX_DIAG QUANTIZE
    MATRIX_SET_DIAG ROUND HARD_SWISH IF WHILE NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5
    SCATTER_ND SELECT_V2 DENSIFY SEGMENT_SUM BATCH_MATMUL PLACEHOLDER_FOR_GREATER_OP_CODES CUMSUM
    CALL_ONCE BROADCAST_TO RFFT2D CONV_3D IMAG REAL COMPLEX_ABS HASHTABLE HASHTABLE_FIND
    HASHTABLE_IMPORT HASHTABLE_SIZE REDUCE_ALL CONV_3D_TRANSPOSE VAR_HANDLE READ_VARIABLE
    ASSIGN_VARIABLE BROADCAST_ARGS RANDOM_STANDARD_NORMAL BUCKETIZE RANDOM_UNIFORM MULTINOMIAL
    GELU DYNAMIC_UPDATE_SLICE RELU_0_TO_1 UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_MAX
    UNSORTED_SEGMENT_SUM ATAN2 UNSORTED_SEGMENT_MIN SIGN BITCAST BITWISE_XOR RIGHT_SHIFT
    STABLEHLO_LOGISTIC STABLEHLO_ADD STABLEHLO_DIVIDE STABLEHLO_MULTIPLY STABLEHLO_MAXIMUM
    STABLEHLO_RESHAPE STABLEHLO_CLAMP STABLEHLO_CONCATENATE STABLEHLO_BROADCAST_IN_DIM
    STABLEHLO_CONVOLUTION STABLEHLO_SLICE STABLEHLO_CUSTOM_CALL STABLEHLO_REDUCE STABLEHLO_ABS
    STABLEHLO_AND STABLEHLO_COSINE STABLEHLO_EXPONENTIAL STABLEHLO_FLOOR STABLEHLO_LOG
    STABLEHLO_MINIMUM STABLEHLO_NEGATE STABLEHLO_OR STABLEHLO_POWER STABLEHLO_REMAINDER
    STABLEHLO_RSQRT STABLEHLO_SELECT STABLEHLO_SUBTRACT STABLEHLO_TANH STABLEHLO_SCATTER
    STABLEHLO_COMPARE STABLEHLO_CONVERT STABLEHLO_DYNAMIC_SLICE STABLEHLO_DYNAMIC_UPDATE_SLICE
    STABLEHLO_PAD STABLEHLO_IOTA STABLEHLO_DOT_GENERAL STABLEHLO_REDUCE_WINDOW STABLEHLO_SORT
    STABLEHLO_WHILE STABLEHLO_GATHER STABLEHLO_TRANSPOSE DILATE STABLEHLO_RNG_BIT_GENERATOR
    REDUCE_WINDOW STABLEHLO_COMPOSITE STABLEHLO_SHIFT_LEFT STABLEHLO_CBRT STABLEHLO_CASE
"""
_OPERATORS: Final = tuple(_OPERATOR_NAMES.split())
_CUSTOM: Final = 32
_STATE: Final = frozenset({"VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE"})
MAX_RANK: Final = 64
_INT64_MAX: Final = 2**63 - 1


class ModelFields:
    """Slots of the schema's tables, by name."""

    OPERATOR_CODES, SUBGRAPHS, BUFFERS, SIGNATURES, EXTERNAL_BUFFERS = 1, 2, 4, 7, 9


class _OperatorCode:
    DEPRECATED, CUSTOM, BUILTIN = 0, 1, 3


class SubGraphFields:
    TENSORS, INPUTS, OUTPUTS, OPERATORS = 0, 1, 2, 3


class TensorFields:
    SHAPE, TYPE, BUFFER, NAME, VARIABLE, SPARSITY, SIGNATURE = 0, 1, 2, 3, 5, 6, 7


class OperatorFields:
    CODE, INPUTS, OUTPUTS, INTERMEDIATES = 0, 1, 2, 8


class BufferFields:
    DATA, OFFSET, SIZE = 0, 1, 2


class _Signature:
    INPUTS, OUTPUTS, SUBGRAPH = 0, 1, 4


def read(content: Content, max_bytes: int) -> ModelFile:
    """The TFLite model in `content`. Raises ModelError."""
    try:
        return _Reader(content, max_bytes).read()
    except FlatBufferError as error:
        raise refusal(content)(
            "is cut short or damaged.",
            f"It has the mark of a TFLite model, but {error}.",
            "Fetch or convert the model again.",
        ) from error


class _Reader:
    def __init__(self, content: Content, max_bytes: int) -> None:
        self.content = content
        self.max_bytes = max_bytes
        self.refuse = refusal(content)
        self.ops: Counter[str] = Counter()
        self.weights: Counter[str] = Counter()
        self.weighed: set[int] = set()
        self.stateful = False

    def read(self) -> ModelFile:
        data = self.content.view()
        model = FlatBuffer(data).root()
        if model.tables(ModelFields.EXTERNAL_BUFFERS):
            raise self.refuse(
                "keeps weights in files outside.",
                "UniRT reads TFLite models only with all their weights inside.",
                "Convert the model again into one file.",
            )
        subgraphs = model.tables(ModelFields.SUBGRAPHS)
        if not subgraphs:
            raise self.refuse(
                "has no graph.",
                "A TFLite model has at least one subgraph.",
                "Fetch or convert the model again; it may be cut short.",
            )
        codes = [operator_name(code) for code in model.tables(ModelFields.OPERATOR_CODES)]
        buffers = [self.buffer(table, len(data)) for table in model.tables(ModelFields.BUFFERS)]
        for subgraph in subgraphs:
            self.subgraph(subgraph, codes, buffers)
        first, signatures = subgraphs[0], model.tables(ModelFields.SIGNATURES)
        tensors = first.tables(SubGraphFields.TENSORS)
        inputs, outputs = first.ints(SubGraphFields.INPUTS), first.ints(SubGraphFields.OUTPUTS)
        if not outputs:
            raise self.refuse(
                "has no outputs.",
                "A network without outputs computes nothing.",
                "Convert the model again and mark its outputs.",
            )
        own = [table for table in signatures if table.scalar(_Signature.SUBGRAPH, "I") == 0]
        names = _signature_names(own[0], inputs, outputs) if len(own) == 1 else None
        if names is None:
            names = tuple(
                [tensors[index].text(TensorFields.NAME) for index in ends]
                for ends in (inputs, outputs)
            )
        self.unique(names[0], "inputs")
        self.unique(names[1], "outputs")
        return ModelFile(
            format="tflite",
            content=self.content,
            inputs=self.specs(tensors, inputs, names[0]),
            outputs=self.specs(tensors, outputs, names[1]),
            op_counts=frozen(dict(self.ops.most_common())),
            weight_dtypes=frozen(dict(self.weights.most_common())),
            stateful=self.stateful,
        )

    def buffer(self, table: Table, file_size: int) -> int:
        """The size of a buffer, whose data may stand behind the tables in files over 2 GiB."""
        offset, size = table.scalar(BufferFields.OFFSET, "Q"), table.scalar(BufferFields.SIZE, "Q")
        if offset <= 1:  # 0 and 1 mean: not there
            return table.length(BufferFields.DATA) or 0
        if offset + size > file_size:
            raise FlatBufferError(f"a buffer ends at byte {offset + size:,} of {file_size:,}")
        return size

    def subgraph(self, subgraph: Table, codes: Sequence[str], buffers: Sequence[int]) -> None:
        tensors = subgraph.tables(SubGraphFields.TENSORS)
        for tensor in tensors:
            self.tensor(tensor, buffers)
        ends = subgraph.ints(SubGraphFields.INPUTS) + subgraph.ints(SubGraphFields.OUTPUTS)
        self.indices(ends, len(tensors), least=0)
        for operator in subgraph.tables(SubGraphFields.OPERATORS):
            code = operator.scalar(OperatorFields.CODE, "I")
            if code >= len(codes):
                raise FlatBufferError(f"an operator has code {code} of {len(codes)}")
            self.ops[codes[code]] += 1
            self.stateful |= codes[code] in _STATE
            for slot in (
                OperatorFields.INPUTS,
                OperatorFields.OUTPUTS,
                OperatorFields.INTERMEDIATES,
            ):
                self.indices(operator.ints(slot), len(tensors), least=-1)  # -1: left out

    def indices(self, indices: Iterable[int], count: int, *, least: int) -> None:
        for index in indices:
            if not least <= index < count:
                raise FlatBufferError(f"tensor {index} is named, and there are {count}")

    def tensor(self, tensor: Table, buffers: Sequence[int]) -> None:
        """Checks the tensor's shape, and that a constant has just the data its shape needs."""
        dtype, bits = self.element_type(tensor)
        shape = tensor.ints(TensorFields.SHAPE)
        if len(shape) > MAX_RANK:
            raise self.wrong(tensor, "has an impossible shape", f"Its rank is {len(shape):,}")
        if min(shape, default=0) < 0 or prod(size for size in shape if size) > _INT64_MAX:
            raise self.wrong(tensor, "has an impossible shape", f"Its shape is {list(shape)}")
        count, index = prod(shape), tensor.scalar(TensorFields.BUFFER, "I")
        nbytes = (count * bits + 7) // 8
        if nbytes > self.max_bytes:
            raise self.refuse(
                "is larger than models may be.",
                f"The limit is {size_text(self.max_bytes)}, and tensor "
                f"{tensor.text(TensorFields.NAME)!r} declares {size_text(nbytes)}.",
                "If you trust the file, raise the limit with Model(..., max_bytes=...) or "
                "UNIRT_MAX_MODEL_BYTES.",
                tensor=tensor.text(TensorFields.NAME),
                max_bytes=self.max_bytes,
            )
        # `buffers` may be left out where all are empty.
        if index >= max(len(buffers), 1):
            raise FlatBufferError(f"a tensor has buffer {index} of {len(buffers)}")
        self.stateful |= bool(tensor.scalar(TensorFields.VARIABLE, "?"))
        have = buffers[index] if buffers else 0
        if not have:
            return
        # Some writers do not pack elements below a byte; sparse ones leave out zeros.
        if bits and have not in (nbytes, count) and not tensor.has(TensorFields.SPARSITY):
            raise self.wrong(
                tensor,
                "has the wrong amount of data",
                f"Its shape {list(shape)} of {dtype} needs {nbytes:,} bytes; it has {have:,}",
            )
        if index not in self.weighed:
            self.weighed.add(index)
            self.weights[dtype] += count

    def wrong(self, tensor: Table, what: str, why: str) -> Exception:
        name = tensor.text(TensorFields.NAME)
        return self.refuse(
            f"is damaged: tensor {name!r} {what}.",
            f"{why}.",
            "Fetch or convert the model again.",
            tensor=name,
        )

    def element_type(self, tensor: Table) -> tuple[str, int]:
        number = tensor.scalar(TensorFields.TYPE, "B")
        if number >= len(TYPES):
            raise self.wrong(
                tensor,
                f"has the unknown element type {number}",
                "The file is damaged, or newer than this UniRT",
            )
        return TYPES[number]

    def specs(
        self, tensors: Sequence[Table], indices: Sequence[int], names: Sequence[str]
    ) -> tuple[TensorSpec, ...]:
        specs = []
        for index, name in zip(indices, names, strict=True):
            tensor = tensors[index]
            shape = tensor.ints(TensorFields.SIGNATURE) or tensor.ints(TensorFields.SHAPE)
            if min(shape, default=0) < -1:
                raise self.wrong(tensor, "has an impossible shape", f"Its shape is {list(shape)}")
            sizes = tuple(None if size == -1 else size for size in shape)
            specs.append(TensorSpec(name, self.element_type(tensor)[0], sizes))
        return tuple(specs)

    def unique(self, names: Sequence[str], what: str) -> None:
        for name, times in Counter(names).items():
            if times > 1:
                raise self.refuse(
                    f"uses the name {name!r} {times} times.",
                    f"Its {what} must be told apart by their names.",
                    "Convert the model again, or give it a signature with unique names.",
                    tensor=name,
                )


def operator_name(code: Table) -> str:
    # Codes that did not fit the old one-byte field have a field of their own.
    number = max(
        code.scalar(_OperatorCode.DEPRECATED, "b"), code.scalar(_OperatorCode.BUILTIN, "i")
    )
    if number == _CUSTOM:
        return code.text(_OperatorCode.CUSTOM) or "CUSTOM"
    return _OPERATORS[number] if 0 <= number < len(_OPERATORS) else f"BUILTIN_{number}"


def _signature_names(
    signature: Table, inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[list[str], ...] | None:
    """Names by signature of inputs and outputs; None if it does not cover them all."""
    names = []
    for slot, indices in ((_Signature.INPUTS, inputs), (_Signature.OUTPUTS, outputs)):
        maps = signature.tables(slot)
        by_index = {table.scalar(1, "I"): table.text(0) for table in maps}
        if len(maps) != len(indices) or by_index.keys() != set(indices):
            return None
        names.append([by_index[index] for index in indices])
    return tuple(names)

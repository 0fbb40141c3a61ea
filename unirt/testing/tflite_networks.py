"""Test networks as .tflite bytes, written op by op: no converter, no TensorFlow.

`tflite_network` gives the networks that the conformance suite runs; `Graph` writes any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from unirt.types import Array


def tflite_network(name: str, *, weights: Sequence[Array] | None = None) -> bytes:
    """The named test network as the bytes of a .tflite file.

    `heavy` takes its `weights`, float32 matrices: y = relu(... relu(x @ w0) ... @ wn). Needs
    ai-edge-litert, which ships the schema. Raises KeyError for a name that is no network's.
    """
    if name == "heavy":
        if weights is None:
            raise ValueError("the heavy network needs its weights")
        return _heavy(weights)
    return _NETWORKS[name]()


class Graph:
    """One subgraph of a .tflite file. Tensors and ops are added in order."""

    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated

        self.schema: Any = schema_py_generated
        self.tensors: list[Any] = []
        self.operators: list[tuple[str, Any]] = []
        # Index 0 means "no buffer" and must be empty.
        self.buffers: list[Array | None] = [None]

    def tensor(
        self, name: str, dtype: str, shape: Sequence[int | None], *, variable: bool = False
    ) -> int:
        """A tensor computed at run time, given from outside, or, if `variable`, kept."""
        static = [1 if size is None else size for size in shape]
        unknown = None in shape
        self.tensors.append(
            self.schema.TensorT(
                name=name,
                type=getattr(self.schema.TensorType, dtype.upper()),
                shape=np.array(static, np.int32),
                shapeSignature=np.array([-1 if s is None else s for s in shape], np.int32)
                if unknown
                else None,
                buffer=0,
                hasRank=True,
                isVariable=variable,
            )
        )
        return len(self.tensors) - 1

    def constant(self, name: str, value: Array) -> int:
        """A tensor with a fixed value."""
        index = self.tensor(name, value.dtype.name, value.shape)
        self.buffers.append(np.frombuffer(value.tobytes(), np.uint8))
        self.tensors[index].buffer = len(self.buffers) - 1
        return index

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: str = "",
        **fields: object,
    ) -> None:
        """One operator, such as `ADD`, with its options table, such as `AddOptions`.

        A name that is no builtin operator's becomes a custom one.
        """
        operator = self.schema.OperatorT(
            inputs=np.array(inputs, np.int32), outputs=np.array(outputs, np.int32)
        )
        if options:
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(self.schema, f"{options}T")(**fields)
        self.operators.append((name, operator))

    def write(
        self, inputs: Sequence[int], outputs: Sequence[int], *others: Graph, signature: bool = True
    ) -> bytes:
        """The file, with the graph as its subgraph 0 and `others` (without I/O) behind it.

        The signature `serving_default` calls inputs and outputs by their tensors' names.
        """
        import flatbuffers

        schema = self.schema
        codes: list[str] = []
        buffers: list[Array | None] = [None]
        subgraphs = []
        for position, graph in enumerate((self, *others)):
            for tensor in graph.tensors:
                if tensor.buffer:
                    buffers.append(graph.buffers[tensor.buffer])
                    tensor.buffer = len(buffers) - 1
            for name, operator in graph.operators:
                if name not in codes:
                    codes.append(name)
                operator.opcodeIndex = codes.index(name)
            subgraphs.append(
                schema.SubGraphT(
                    name=f"graph{position}".encode(),
                    tensors=graph.tensors,
                    operators=[operator for _, operator in graph.operators],
                    inputs=np.array([] if position else inputs, np.int32),
                    outputs=np.array([] if position else outputs, np.int32),
                )
            )
        model = schema.ModelT(
            version=3,
            operatorCodes=[self._code(name) for name in codes],
            subgraphs=subgraphs,
            buffers=[schema.BufferT(data=data) for data in buffers],
            signatureDefs=[self._signature(inputs, outputs)] if signature else None,
        )
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _code(self, name: str) -> Any:
        builtin = self.schema.BuiltinOperator
        number = getattr(builtin, name, builtin.CUSTOM)
        return self.schema.OperatorCodeT(
            # The older field has one byte.
            deprecatedBuiltinCode=min(number, 127),
            builtinCode=number,
            customCode=name if number == builtin.CUSTOM else None,
            version=1,
        )

    def _signature(self, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        def named(indices: Sequence[int]) -> list[Any]:
            return [self.schema.TensorMapT(self.tensors[i].name, i) for i in indices]

        return self.schema.SignatureDefT(named(inputs), named(outputs), "serving_default", 0)


def _binary(op: str, options: str, dtype: str, shape: Sequence[int | None], other: Any) -> bytes:
    """y = x `op` other, where `other` is a constant, or x itself for None."""
    graph = Graph()
    x = graph.tensor("x", dtype, shape)
    y = graph.tensor("y", dtype, shape)
    right = x if other is None else graph.constant("other", np.asarray(other, dtype))
    graph.op(op, [x, right], [y], options)
    return graph.write([x], [y])


def _affine() -> bytes:
    graph = Graph()
    x, twice, y = (graph.tensor(name, "float32", [None, 3]) for name in ("x", "twice", "y"))
    two = graph.constant("two", np.full(3, 2, np.float32))
    one = graph.constant("one", np.full(3, 1, np.float32))
    graph.op("MUL", [x, two], [twice], "MulOptions")
    graph.op("ADD", [twice, one], [y], "AddOptions")
    return graph.write([x], [y])


def _pair() -> bytes:
    graph = Graph()
    a, b, total, difference = (
        graph.tensor(name, "float32", [None, 3]) for name in ("a", "b", "total", "difference")
    )
    graph.op("ADD", [a, b], [total], "AddOptions")
    graph.op("SUB", [a, b], [difference], "SubOptions")
    return graph.write([a, b], [total, difference])


def _constant() -> bytes:
    graph = Graph()
    value = graph.constant("value", np.array([1, 2, 3], np.float32))
    zero = graph.constant("zero", np.zeros(3, np.float32))
    y = graph.tensor("y", "float32", [3])
    graph.op("ADD", [value, zero], [y], "AddOptions")
    return graph.write([], [y])


def _flip() -> bytes:
    graph = Graph()
    x, y = (graph.tensor(name, "bool", [None, 3]) for name in ("x", "y"))
    graph.op("LOGICAL_NOT", [x], [y])
    return graph.write([x], [y])


def _tiny() -> bytes:
    graph = Graph()
    x, y = (graph.tensor(name, "int8", [None, 3]) for name in ("x", "y"))
    axis = graph.constant("axis", np.array([1], np.int32))
    graph.op("REVERSE_V2", [x, axis], [y])
    return graph.write([x], [y])


def _unknown() -> bytes:
    """For the error that it gives: nothing implements its operator."""
    graph = Graph()
    x, y = (graph.tensor(name, "float32", [None, 3]) for name in ("x", "y"))
    graph.op("NoSuchOperator", [x], [y])
    return graph.write([x], [y])


def _heavy(weights: Sequence[Array]) -> bytes:
    graph = Graph()
    first = last = graph.tensor("x", "float32", [None, weights[0].shape[0]])
    for layer, weight in enumerate(weights):
        name = "y" if layer == len(weights) - 1 else f"layer{layer}"
        # FULLY_CONNECTED wants [out, in] and a bias.
        kernel = graph.constant(f"kernel{layer}", np.ascontiguousarray(weight.T))
        bias = graph.constant(f"bias{layer}", np.zeros(weight.shape[1], np.float32))
        out = graph.tensor(name, "float32", [None, weight.shape[1]])
        graph.op(
            "FULLY_CONNECTED",
            [last, kernel, bias],
            [out],
            "FullyConnectedOptions",
            fusedActivationFunction=graph.schema.ActivationFunctionType.RELU,
        )
        last = out
    return graph.write([first], [last])


def _counter() -> bytes:
    """Keeps its state in a resource variable, which a second subgraph sets to zero once."""
    begin = Graph()
    handle = begin.tensor("handle0", "resource", [])
    zero = begin.constant("zero", np.zeros((1, 3), np.float32))
    begin.op("VAR_HANDLE", [], [handle], "VarHandleOptions", container="", sharedName="state")
    begin.op("ASSIGN_VARIABLE", [handle, zero], [], "AssignVariableOptions")

    graph = Graph()
    x = graph.tensor("x", "float32", [1, 3])
    handle = graph.tensor("handle", "resource", [])
    state, y = (graph.tensor(name, "float32", [1, 3]) for name in ("state", "y"))
    graph.op("CALL_ONCE", [], [], "CallOnceOptions", initSubgraphIndex=1)
    graph.op("VAR_HANDLE", [], [handle], "VarHandleOptions", container="", sharedName="state")
    graph.op("READ_VARIABLE", [handle], [state], "ReadVariableOptions")
    graph.op("ADD", [state, x], [y], "AddOptions")
    graph.op("ASSIGN_VARIABLE", [handle, y], [], "AssignVariableOptions")
    return graph.write([x], [y], begin)


def _recurrent() -> bytes:
    """Keeps its state in a variable tensor: a linear RNN cell with unit weights adds up x."""
    graph = Graph()
    x = graph.tensor("x", "float32", [1, 3])
    weight = graph.constant("weight", np.eye(3, dtype=np.float32))
    again = graph.constant("again", np.eye(3, dtype=np.float32))
    bias = graph.constant("bias", np.zeros(3, np.float32))
    state = graph.tensor("state", "float32", [1, 3], variable=True)
    y = graph.tensor("y", "float32", [1, 3])
    graph.op("RNN", [x, weight, again, bias, state], [y], "RNNOptions")
    return graph.write([x], [y])


_NETWORKS = {
    "affine": _affine,
    "pair": _pair,
    "constant": _constant,
    "flip": _flip,
    "half": lambda: _binary("ADD", "AddOptions", "float16", [None, 3], None),
    "tiny": _tiny,
    "long": lambda: _binary("ADD", "AddOptions", "int64", [None, 3], None),
    "scalar": lambda: _binary("MUL", "MulOptions", "float32", [], 2),
    "empty": _affine,
    "rows": lambda: _binary("MUL", "MulOptions", "float32", [3, 4], 2),
    "counter": _counter,
    "recurrent": _recurrent,
    "unknown": _unknown,
}

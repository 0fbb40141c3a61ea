"""TFLite: the shared suite, then what is its own."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from unirt_tflite import _backend, _layers
from unirt_tflite._backend import TFLiteBackend

import unirt
from unirt import cli
from unirt.precision import QuantizedTFLite, quantize_tflite
from unirt.testing import BackendConformance
from unirt.testing.tflite_networks import Graph, tflite_network

ONE = np.ones((1, 3), np.float32)
DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "digits.tflite"


class TestTFLite(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> unirt.Backend:
        return TFLiteBackend()


class TestTFLiteReferenceKernels(BackendConformance):
    options = {"kernels": "reference", "threads": 1, "lanes": 3}
    known_failures = {
        "passes_nan_and_infinity_through": "TFLite's own kernels clamp infinity to a float"
    }

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> unirt.Backend:
        return TFLiteBackend()


def session(model: bytes, **options: object) -> unirt.Session:
    return unirt.load(model, "tflite", options=options)


class TestProbe:
    @pytest.fixture(autouse=True)
    def forget_the_library(self) -> Iterator[None]:
        _backend._library.cache_clear()
        yield
        _backend._library.cache_clear()

    def test_names_the_command_where_no_library_is_installed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_backend, "LIBRARIES", {"ai-edge-litert": "no_such_litert.interpreter"})
        availability = TFLiteBackend().probe()
        assert not availability.available
        assert availability.hint == "pip install 'unirt[tflite]'"

    def test_sees_through_an_import_that_lies(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """As tflite-runtime 2.14 does with NumPy 2: it imports, then the constructor fails."""

        class Interpreter:
            def __init__(self, **_: object) -> None:
                sys.stderr.write("A module that was compiled using NumPy 1.x cannot be run\n")
                raise SystemError("returned a result with an exception set")

        fake: Any = types.ModuleType("tflite_runtime.interpreter")
        fake.Interpreter = Interpreter
        fake.OpResolverType = types.SimpleNamespace(BUILTIN_WITHOUT_DEFAULT_DELEGATES=3)
        monkeypatch.setitem(sys.modules, "tflite_runtime", types.ModuleType("tflite_runtime"))
        monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", fake)
        monkeypatch.delitem(_backend.LIBRARIES, "ai-edge-litert")
        availability = TFLiteBackend().probe()
        assert not availability.available
        assert "tflite-runtime" in availability.reason
        assert capfd.readouterr().err == ""

    def test_takes_the_next_library_where_the_first_is_broken(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = {"os": "os", "ai-edge-litert": "ai_edge_litert.interpreter"}
        monkeypatch.setattr(_backend, "LIBRARIES", broken)
        assert TFLiteBackend().probe().available


@pytest.mark.parametrize("network", ["counter", "recurrent"])
class TestState:
    """`counter` keeps its state in a resource variable, `recurrent` in a variable tensor."""

    def test_every_run_starts_from_the_same_state(self, network: str) -> None:
        with session(tflite_network(network), lanes=3) as alone:
            results = list(alone.map([ONE] * 6))
            results += [alone.run(ONE) for _ in range(3)]
            bound = alone.bind({"x": ONE})
            results += [{"y": bound.run()["y"].copy()} for _ in range(3)]
        assert [result["y"].tolist() for result in results] == [ONE.tolist()] * len(results)

    def test_carry_state_goes_on_from_run_to_run(self, network: str) -> None:
        with unirt.build(
            tflite_network(network), "tflite", options={"carry_state": True}
        ) as engine:
            for _ in range(2):  # and a new session starts anew
                with engine.session() as carrying:
                    totals = [carrying.run(ONE)["y"][0, 0] for _ in range(4)]
                    assert totals == [1, 2, 3, 4]

    def test_carry_state_holds_through_many_threads(self, network: str) -> None:
        carrying = session(tflite_network(network), carry_state=True)
        with carrying, ThreadPoolExecutor(8) as pool:
            totals = list(pool.map(lambda _: carrying.run(ONE)["y"][0, 0], range(200)))
        assert sorted(totals) == list(range(1, 201))

    def test_a_binding_carries_a_state_of_its_own(self, network: str) -> None:
        with session(tflite_network(network), carry_state=True) as carrying:
            bound = carrying.bind({"x": ONE})
            assert [bound.run()["y"][0, 0] for _ in range(3)] == [1, 2, 3]


def sequence() -> bytes:
    """Adds up along time, [1, any, 3], into a variable tensor."""
    graph = Graph()
    x = graph.tensor("x", "float32", [1, None, 3])
    eye, zero = np.eye(3, dtype=np.float32), np.zeros(3, np.float32)
    constants = [graph.constant(f"c{i}", value) for i, value in enumerate((eye, eye, zero))]
    state = graph.tensor("state", "float32", [1, 3], variable=True)
    y = graph.tensor("y", "float32", [1, None, 3])
    graph.op("UNIDIRECTIONAL_SEQUENCE_RNN", [x, *constants, state], [y], "SequenceRNNOptions")
    return graph.write([x], [y])


def test_carried_state_is_not_lost_to_a_new_shape() -> None:
    two, three = np.ones((1, 2, 3), np.float32), np.ones((1, 3, 3), np.float32)
    with session(sequence(), carry_state=True) as carrying:
        assert carrying.run(two)["y"][0, :, 0].tolist() == [1, 2]
        with pytest.raises(unirt.InputError, match="first run"):
            carrying.run(three)
        assert carrying.run(two)["y"][0, :, 0].tolist() == [3, 4]
    with session(sequence()) as alone:
        for value in (two, three, two):
            assert alone.run(value)["y"][0, -1, 0] == value.shape[1]


def test_a_shape_that_the_network_refuses_leaves_the_session_usable() -> None:
    graph = Graph()
    x, y = (graph.tensor(name, "float32", [None, 3]) for name in "xy")
    graph.op("ADD", [x, graph.constant("c", np.ones((2, 3), np.float32))], [y], "AddOptions")
    with session(graph.write([x], [y]), lanes=1) as two_rows:
        for _ in range(3):
            with pytest.raises(unirt.BackendError, match=r"x \[5, 3\]"):
                two_rows.run(np.ones((5, 3), np.float32))
            assert two_rows.run(np.ones((2, 3), np.float32))["y"].tolist() == [[2] * 3] * 2


def test_a_failing_run_leaves_the_session_usable() -> None:
    graph = Graph()
    x, index, y = (
        graph.tensor(*end)
        for end in (("x", "float32", [3]), ("i", "int32", [1]), ("y", "float32", [1]))
    )
    graph.op("GATHER", [x, index], [y], "GatherOptions")
    with session(graph.write([x, index], [y]), lanes=1) as gather:
        values = np.array([10, 20, 30], np.float32)
        for _ in range(3):
            with pytest.raises(unirt.BackendError):
                gather.run({"x": values, "i": np.array([7], np.int32)})
            assert gather.run({"x": values, "i": np.array([2], np.int32)})["y"].tolist() == [30]


def test_sizes_left_open_need_not_work_at_one() -> None:
    """LiteRT puts 1 for an open size, which this convolution's kernel does not fit."""
    graph = Graph()
    x, y = (graph.tensor(name, "float32", [1, None, None, 1]) for name in "xy")
    kernel = graph.constant("kernel", np.ones((1, 3, 3, 1), np.float32))
    bias = graph.constant("bias", np.zeros(1, np.float32))
    valid = graph.schema.Padding.VALID
    graph.op(
        "CONV_2D", [x, kernel, bias], [y], "Conv2DOptions", padding=valid, strideW=1, strideH=1
    )
    model = graph.write([x], [y])
    with session(model) as convolution:
        for side in (5, 3, 8):
            image = np.ones((1, side, side, 1), np.float32)
            assert convolution.run(image)["y"].shape == (1, side - 2, side - 2, 1)
        with pytest.raises(unirt.BackendError, match="kernels=builtin"):
            convolution.run(np.ones((1, 0, 0, 1), np.float32))


def where() -> bytes:
    """Indices of what is true: the output's shape depends on the input's values."""
    graph = Graph()
    x, y = graph.tensor("x", "bool", [None]), graph.tensor("y", "int64", [None, 1])
    graph.op("WHERE", [x], [y])
    return graph.write([x], [y])


def test_an_output_may_turn_out_empty() -> None:
    with session(where()) as indices:
        for truth in ([1, 0, 1], [0, 0, 0], [0, 1, 0], []):
            x = np.array(truth, bool)
            y = indices.run(x)["y"]
            assert y.dtype == np.int64
            assert y.tolist() == np.argwhere(x).tolist()


def test_a_bound_output_that_changes_its_shape_is_refused_and_not_broadcast() -> None:
    x = np.array([True, True, False])
    with session(where()) as indices:
        bound = indices.bind({"x": x})
        assert bound.run()["y"].tolist() == [[0], [1]]
        x[1] = False
        with pytest.raises(unirt.BackendError, match=r"\[1, 1\]"):
            bound.run()
        x[2] = True
        assert bound.run()["y"].tolist() == [[0], [2]]


def test_outputs_have_the_shape_that_came_out_and_not_the_declared_one() -> None:
    """As in real files, whose converters left output shapes wrong."""
    graph = Graph()
    x, y = graph.tensor("x", "float32", [2, 3]), graph.tensor("y", "float32", [1])
    graph.op("ABS", [x], [y])
    with session(graph.write([x], [y])) as wrong:
        assert wrong.run(np.full((2, 3), -4, np.float32))["y"].tolist() == [[4] * 3] * 2


def test_strings_come_out_as_bytes() -> None:
    graph = Graph()
    x, y = (graph.tensor(name, "string", [None]) for name in "xy")
    graph.op("GATHER", [x, graph.constant("i", np.array([1, 0], np.int32))], [y], "GatherOptions")
    with session(graph.write([x], [y])) as swap:
        expected = [b"b", "hé".encode()]
        assert swap.run(np.array(["hé", "b", "c"]))["y"].tolist() == expected
        assert swap.run(np.array(["hé", b"b"], object))["y"].tolist() == expected
        bound = swap.bind({"x": np.array(["hé", "b"], object)})
        assert bound.run()["y"].tolist() == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "int4", "uint16", "uint64", "complex64", "float64"])
def test_rarer_types_go_in_and_out(dtype: str) -> None:
    graph = Graph()
    x, y = graph.tensor("x", dtype, [2, 3]), graph.tensor("y", dtype, [6])
    graph.op("RESHAPE", [x, graph.constant("shape", np.array([6], np.int32))], [y])
    with session(graph.write([x], [y])) as flat:
        value = np.arange(6).reshape(2, 3).astype(flat.inputs[0].numpy_dtype)
        result = flat.run(value)["y"]
        assert result.dtype == value.dtype
        assert result.tolist() == value.ravel().tolist()
        assert flat.bind({"x": value}).run()["y"].tolist() == value.ravel().tolist()


def test_an_operator_that_is_not_there_is_a_build_error() -> None:
    with pytest.raises(unirt.BuildError, match="NoSuchOperator"):
        unirt.build(tflite_network("unknown"), "tflite")


def test_facts_tell_what_runs_the_network() -> None:
    model = tflite_network("affine")
    for kernels, parts in (("xnnpack", 1), ("builtin", 0), ("reference", 0)):
        options = {"kernels": kernels, "threads": 1}
        with unirt.build(model, "tflite", options=options) as engine:
            assert engine.facts["delegated_parts"] == parts
            assert (engine.facts["kernels"], engine.facts["threads"]) == (kernels, 1)


def test_options_that_would_crash_or_do_not_load_are_refused() -> None:
    model = tflite_network("affine")
    with pytest.raises(unirt.OptionError, match="threads"):
        unirt.build(model, "tflite", options={"threads": 100_000})
    with pytest.raises(unirt.BuildError, match=r"no_such_delegate\.so"):
        unirt.build(model, "tflite", options={"delegates": "no_such_delegate.so"})


# --- its layers ----------------------------------------------------------------------------------


def quantized(model: Any, **how: Any) -> QuantizedTFLite:
    pytest.importorskip("ai_edge_quantizer", reason="ai-edge-quantizer is not installed")
    return quantize_tflite(model, **how)


def layers(model: Any, **options: object) -> unirt.EngineReport:
    with unirt.build(model, "tflite", options=options) as engine:
        report = engine.inspect()
    assert unirt.EngineReport.from_dict(report.to_dict()) == report
    return report


@pytest.fixture(scope="module")
def images() -> Any:
    with np.load(DIGITS.with_name("test.npz")) as arrays:
        return arrays["image"]


def test_every_operator_is_a_layer_with_its_types_and_who_computes_it() -> None:
    report = layers(DIGITS)
    kinds = [layer.kind for layer in report.layers]
    assert kinds[:3] == ["RESHAPE", "CONV_2D", "DEPTHWISE_CONV_2D"]
    assert len(kinds) == sum(unirt.Model(DIGITS).primary.op_counts.values())
    assert {layer.tactic for layer in report.layers} == {"XNNPACK, part 1"}
    assert report.precisions == {"float32": 8}
    assert not report.missing
    assert not any(one.inserted for one in report.reformats)
    last = report.layers[-1]
    assert (last.name, last.nodes) == ("logits", ("logits",))
    assert [(one.name, one.dtype, one.shape) for one in last.outputs] == [
        ("logits", "float32", (-1, 10))
    ]
    assert [(one.dtype, one.shape) for one in last.constants] == [
        ("float32", (10, 512)),
        ("float32", (10,)),
    ]
    assert (report.inputs, report.outputs) == (report.layers[0].inputs, last.outputs)
    for kernels, who in (("builtin", "TFLite"), ("reference", "TFLite's reference")):
        own = layers(DIGITS, kernels=kernels)
        assert {layer.tactic for layer in own.layers} == {who}
        assert own.notes == ()
        assert [layer.name for layer in own.layers] == [layer.name for layer in report.layers]


def test_products_of_an_int8_file_compute_in_int8_and_what_was_kept_does_not(images: Any) -> None:
    made = quantized(DIGITS, data={"image": images[:64]}, keep=["logits"])
    report = layers(made.model)
    products = {one.name: one for one in report.layers if one.constants and "CONV" in one.kind}
    assert len(products) == 5
    for name, layer in products.items():
        assert name in made.nodes
        assert report.precision(layer) == "int8"
        assert [one.dtype for one in layer.constants] == ["int8", "int32"]
    logits = report.layers[-1]
    assert (logits.kind, report.precision(logits)) == ("FULLY_CONNECTED", "float32")
    assert report.precisions == {"int8": 7, "float32": 1}
    assert [one.layer.kind for one in report.unfused_quantization] == ["QUANTIZE", "DEQUANTIZE"]
    who = {layer.kind: layer.tactic for layer in report.layers}
    assert who["CONV_2D"] == "XNNPACK, part 1"
    assert who["AVERAGE_POOL_2D"] == "TFLite"
    assert who["FULLY_CONNECTED"] == "XNNPACK, part 2"
    assert [note for note in report.notes if "XNNPACK leaves 1 of 13 layers" in note]
    full = layers(quantized(DIGITS, data={"image": images[:64]}).model)
    assert full.precision(full.layers[-2]) == "int8"
    assert full.layers[-2].kind == "FULLY_CONNECTED"


def product(kind: str) -> bytes:
    """One operator with random weights, x -> y."""
    graph, random = Graph(), np.random.default_rng(3)
    same = {"padding": graph.schema.Padding.SAME, "strideW": 1, "strideH": 1}
    given: tuple[int, ...] = (1, 8, 8, 16)
    shape: tuple[int, ...]
    if kind == "FULLY_CONNECTED":
        given, shape, result, options, fields = (
            (1, 64),
            (8, 64),
            (1, 8),
            "FullyConnectedOptions",
            {},
        )
    elif kind == "BATCH_MATMUL":
        given, shape, result = (1, 4, 64), (1, 64, 32), (1, 4, 32)
        options, fields = "BatchMatMulOptions", {}
    elif kind == "DEPTHWISE_CONV_2D":
        shape, result, options = (1, 3, 3, 16), given, "DepthwiseConv2DOptions"
        fields = {**same, "depthMultiplier": 1}
    else:
        shape, result, fields = (8, 3, 3, 16), (1, 8, 8, 8), same
        options = {"CONV_2D": "Conv2DOptions", "TRANSPOSE_CONV": "TransposeConvOptions"}[kind]
    x, y = graph.tensor("x", "float32", given), graph.tensor("y", "float32", result)
    inputs = [x, graph.constant("w", random.standard_normal(shape).astype(np.float32))]
    if kind == "TRANSPOSE_CONV":
        inputs = [graph.constant("shape", np.array(result, np.int32)), *reversed(inputs)]
    if kind != "BATCH_MATMUL":
        biases = result[-1]
        inputs.append(graph.constant("b", np.zeros(biases, np.float32)))
    graph.op(kind, inputs, [y], options, **fields)
    return graph.write([x], [y])


@pytest.mark.parametrize("kernels", ["xnnpack", "builtin", "reference"])
@pytest.mark.parametrize(
    "kind", ["FULLY_CONNECTED", "BATCH_MATMUL", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"]
)
def test_what_a_layer_is_said_to_compute_in_shows_in_its_answers(kind: str, kernels: str) -> None:
    """With int8 weights and no ranges: floats are rounded to int8, or weights are unpacked."""
    source = product(kind)
    (spec,) = unirt.Model(source).inputs
    x = np.random.default_rng(4).standard_normal(spec.shape).astype(np.float32)
    answers = {}
    for precision, told in (("int8-dynamic", "int8"), ("int8-weights", "float32")):
        model = quantized(source, precision=precision).model
        report = layers(model, kernels=kernels)
        assert report.precisions == {told: 1}
        assert any("round the floats" in note for note in report.notes) == (told == "int8")
        with session(model, kernels=kernels) as run:
            answers[told] = run.run(x)["y"]
        with session(model, kernels="builtin") as run:
            exact = run.run(x)["y"] if told == "float32" else None
    assert exact is not None
    error = {told: np.abs(one - exact).max() / np.abs(exact).max() for told, one in answers.items()}
    assert error["float32"] < 1e-5
    assert 1e-3 < error["int8"] < 0.05


def test_weights_that_are_unpacked_once_are_no_layer() -> None:
    report = layers(quantized(DIGITS, precision="int8-weights").model)
    assert report.precisions == {"float32": 8}
    assert len(report.missing) == 6
    assert {report.graph[name] for name in report.missing} == {"DequantizeLinear"}
    assert not report.unfused_quantization


class Listing:
    """An interpreter that lists these operators, and then the parts that delegates took."""

    def __init__(
        self,
        operators: list[tuple[list[int], list[int]]],
        parts: list[set[int]],
        first: int = 0,
    ) -> None:
        self._first, self._taken = first, list(parts)
        self._listed = [self._entry("ADD", *one) for one in operators]
        self._operators = operators
        self._parts = [self._entry("DELEGATE", *self._border(part)) for part in parts]
        self._ready = False

    def _entry(self, kind: str, inputs: list[int], outputs: list[int]) -> Mapping[str, Any]:
        return {"op_name": kind, "inputs": np.array(inputs), "outputs": np.array(outputs)}

    def _border(self, part: set[int]) -> tuple[list[int], list[int]]:
        """What it reads from outside, and gives to the outside, as LiteRT has it."""
        made = {i for number in part for i in self._operators[number][1]}
        read = {i for number in part for i in self._operators[number][0]}
        needed = {
            i for number, one in enumerate(self._operators) if number not in part for i in one[0]
        }
        everywhere = {i for one in self._operators for i in one[0]}
        return sorted(read - made), sorted(i for i in made if i in needed or i not in everywhere)

    def _get_ops_details(self) -> list[Mapping[str, Any]]:
        return self._listed + (self._parts if self._ready else self._parts[: self._first])

    def allocate_tensors(self) -> None:
        self._ready = True

    def get_tensor_details(self) -> list[Mapping[str, Any]]:
        last = max(i for one in self._operators for i in (*one[0], *one[1]))
        empty = np.array([], np.int32)
        return [
            {"index": i, "name": "", "shape": empty, "shape_signature": empty, "dtype": np.float32}
            for i in range(last + 1)
        ]

    def get_input_details(self) -> list[Mapping[str, Any]]:
        return [{"index": 0}]

    def get_output_details(self) -> list[Mapping[str, Any]]:
        return [{"index": self._operators[-1][1][0]}]


def test_the_operators_of_each_part_are_found_by_what_it_reads_and_gives() -> None:
    random = np.random.default_rng(5)
    file = unirt.Model(tflite_network("affine")).primary
    for _ in range(200):
        count = int(random.integers(1, 15))
        operators = [
            (random.integers(0, number + 1, random.integers(1, 4)).tolist(), [number + 1])
            for number in range(count)
        ]
        # Runs of operators, so that no part waits for itself.
        cuts = sorted(random.integers(0, count + 1, 4).tolist())
        parts = [set(range(a, b)) for a, b in pairwise(cuts) if a < b]
        taken = [part for part in parts if random.random() < 0.7]
        first = int(random.integers(0, len(taken) + 1))
        report = _layers.read_layers(Listing(operators, taken, first), "xnnpack", file)
        wanted = []
        for number in range(count):
            place = next((place for place, part in enumerate(taken) if number in part), None)
            if place is None:
                wanted.append("TFLite")
            elif place < first:
                wanted.append(f"delegate, part {place + 1}")
            else:
                wanted.append(f"XNNPACK, part {place - first + 1}")
        assert [layer.tactic for layer in report.layers] == wanted


def test_operators_without_outputs_are_layers_too() -> None:
    report = layers(tflite_network("counter"))
    kinds = ["CALL_ONCE", "VAR_HANDLE", "READ_VARIABLE", "ADD", "ASSIGN_VARIABLE"]
    assert [layer.kind for layer in report.layers] == kinds
    assert len({layer.name for layer in report.layers}) == len(kinds)
    assert [layer.tactic for layer in report.layers] == ["TFLite", *["XNNPACK, part 1"] * 4]
    assert any("CALL is a part of that layer" in note for note in report.notes)


def test_tensors_without_names_of_their_own_are_told_apart() -> None:
    graph = Graph()
    tensors = [graph.tensor(name, "float32", [2]) for name in ("x", "", "twice", "twice", "y")]
    for before, after in pairwise(tensors):
        graph.op("ABS", [before], [after])
    report = layers(graph.write(tensors[:1], tensors[-1:]))
    assert [layer.name for layer in report.layers] == ["tensor 1", "twice 2", "twice 3", "y"]


def test_open_sizes_that_do_not_work_at_one_are_told() -> None:
    graph = Graph()
    x, y = (graph.tensor(name, "float32", [None, 3]) for name in "xy")
    two = graph.tensor("two", "float32", [2, 3])
    shape = graph.constant("shape", np.array([2, 3], np.int32))
    graph.op("RESHAPE", [x, shape], [two], "ReshapeOptions", newShape=[2, 3])
    graph.op("ABS", [two], [y])
    report = layers(graph.write([x], [y]))
    assert [layer.kind for layer in report.layers] == ["RESHAPE", "ABS"]
    assert any("cannot prepare this network" in note for note in report.notes)


def test_weights_below_a_byte_are_told_as_what_they_are_not() -> None:
    import ml_dtypes

    graph = Graph()
    weight = graph.constant("w", np.arange(6, dtype=np.int8).astype(ml_dtypes.int4))
    shape = graph.constant("shape", np.array([2, 3], np.int32))
    y = graph.tensor("y", "int4", [2, 3])
    graph.op("RESHAPE", [weight, shape], [y], "ReshapeOptions", newShape=[2, 3])
    assert any("less than 8 bits" in note for note in layers(graph.write([], [y])).notes)


def test_an_interpreter_that_lists_no_operators_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The list is not part of what LiteRT promises."""
    with unirt.build(DIGITS, "tflite") as engine:
        interpreter = _backend._library().module.Interpreter
        monkeypatch.delattr(interpreter, "_get_ops_details")
        with pytest.raises(unirt.BackendUnavailable, match="does not show its layers"):
            engine.inspect()


def test_looking_at_layers_disturbs_no_session(images: Any) -> None:
    with unirt.build(DIGITS, "tflite") as engine, engine.session() as run:
        before = run.run(images[:3])["logits"]
        assert engine.inspect() == engine.inspect()
        assert np.array_equal(run.run(images[:3])["logits"], before)
        with pytest.raises(unirt.BackendUnavailable, match="does not time its layers"):
            run.profile(images[:3])


def test_the_command_line_shows_the_layers(images: Any, tmp_path: Path) -> None:
    made = quantized(DIGITS, data={"image": images[:64]}, keep=["logits"]).model
    path = tmp_path / "made.tflite"
    path.write_bytes(made.primary.read())
    done = CliRunner().invoke(
        cli.app, ["inspect", str(path), "-c", "tflite"], env={"COLUMNS": "160"}
    )
    assert done.exit_code == 0, done.output
    assert "DEPTHWISE_CONV_2D" in done.stdout
    assert "XNNPACK, part 1" in done.stdout
    assert "int8 in 7 layers, float32 in 1 layer" in done.stdout

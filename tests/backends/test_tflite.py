"""TFLite: the shared suite, then what is its own."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from unirt_tflite import _backend
from unirt_tflite._backend import TFLiteBackend

import unirt
from unirt.testing import BackendConformance
from unirt.testing.tflite_networks import Graph, tflite_network

ONE = np.ones((1, 3), np.float32)


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

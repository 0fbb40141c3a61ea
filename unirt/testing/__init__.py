"""The conformance suite that every backend passes, ours or not.

    from unirt.testing import BackendConformance

    class TestMine(BackendConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def backend(cls):
            return MyBackend()

Run pytest with `-p unirt.testing`, so that its assertions explain themselves and `known_failures`
work. An unavailable backend is skipped with its probe's reason, unless `UNIRT_REQUIRE` lists it
(`mine` or, for a further device, `mine@cuda:0`; comma-separated): then it fails.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest

from unirt.backend import Backend, Engine
from unirt.errors import (
    BackendUnavailable,
    BuildError,
    ClosedError,
    InputError,
    OptionError,
    UnirtError,
)
from unirt.model import Model
from unirt.session import Session
from unirt.testing.networks import NETWORKS, OTHER_FORMATS, Network, onnx_bytes
from unirt.testing.tflite_networks import tflite_network
from unirt.types import Availability, Candidate

__all__ = ["NETWORKS", "BackendConformance", "Network"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turns `known_failures` into strict xfails: one that passes again must leave the list."""
    for item in items:
        suite = getattr(item, "cls", None)
        if suite is not None and issubclass(suite, BackendConformance):
            name = item.name.removeprefix("test_")
            reason = suite.known_failures.get(name) or suite.known_failures.get(
                getattr(item, "originalname", name).removeprefix("test_")
            )
            if reason:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


class OnlyDLPack:
    """An array of some other library: nothing but the protocol."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **keywords: Any) -> Any:
        return self._array.__dlpack__(**keywords)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class BackendConformance:
    """What a session of any engine does. Subclass it, give it a `backend`, override nothing else.

    `device` and `options` choose what is tested; `known_failures` maps a test (without `test_`,
    with or without its parameter in brackets) to the reason why this engine cannot pass it.
    """

    device: ClassVar[str | None] = None
    options: ClassVar[Mapping[str, object]] = {}
    known_failures: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        raise NotImplementedError("override the backend fixture")

    @pytest.fixture(scope="class")
    @classmethod
    def available(cls, backend: Backend) -> Backend:
        availability = backend.probe()
        missing = "" if availability.available else availability.reason
        if not missing and availability.find(cls.device) is None:
            kind = str(cls.device).partition(":")[0]
            missing = availability.missing.get(kind, f"no device {cls.device} here")
        if missing:
            candidate = str(Candidate(backend.name, cls.device))
            text = f"{candidate}: {missing}"
            required = os.environ.get("UNIRT_REQUIRE", "").split(",")
            if candidate in required or (cls.device in (None, "cpu") and backend.name in required):
                pytest.fail(f"required, but unavailable: {text}")
            pytest.skip(text)
        return backend

    @classmethod
    def engine(cls, backend: Backend, network: str) -> Engine:
        model = NETWORKS[network].model(backend.formats)
        return backend.compile(model, cls.device, cls.options)

    @pytest.fixture(scope="class")
    @classmethod
    def engines(cls, available: Backend) -> Iterator[dict[str, Engine]]:
        """One engine a network, compiled when first asked for."""

        class Engines(dict[str, Engine]):
            def __missing__(engines, network: str) -> Engine:
                return engines.setdefault(network, cls.engine(available, network))

        made = Engines()
        yield made
        for engine in made.values():
            engine.close()

    @pytest.fixture
    def affine(self, engines: dict[str, Engine]) -> Iterator[Session]:
        with engines["affine"].session() as session:
            yield session

    # What it answers

    @pytest.mark.parametrize("network", NETWORKS)
    def test_answers_as_numpy_does(self, engines: dict[str, Engine], network: str) -> None:
        case = NETWORKS[network]
        with engines[network].session() as session:
            for seed in range(3):
                inputs = case.sample(2, seed)
                case.check(inputs, session.run(inputs))

    @pytest.mark.parametrize("network", NETWORKS)
    def test_declares_what_it_takes_and_gives(
        self, engines: dict[str, Engine], network: str
    ) -> None:
        case, engine = NETWORKS[network], engines[network]
        inputs = case.sample(2, 0)
        for specs, arrays in ((engine.inputs, inputs), (engine.outputs, case.answer(inputs))):
            assert {spec.name: spec.dtype for spec in specs} == {
                name: array.dtype.name for name, array in arrays.items()
            }
            for spec in specs:
                assert spec.shape is not None
                assert len(spec.shape) == arrays[spec.name].ndim

    def test_follows_a_batch_size_that_changes_from_call_to_call(self, affine: Session) -> None:
        case = NETWORKS["affine"]
        for n in (1, 5, 2, 64, 1, 3):
            inputs = case.sample(n, n)
            case.check(inputs, affine.run(inputs))

    def test_gives_an_empty_output_for_an_empty_input(self, affine: Session) -> None:
        inputs = NETWORKS["affine"].sample(0, 0)
        assert affine.run(inputs)["y"].shape == (0, 3)
        NETWORKS["affine"].check(inputs, affine.run(inputs))

    def test_passes_nan_and_infinity_through(self, affine: Session) -> None:
        x = np.array([[np.nan, np.inf, -np.inf]], np.float32)
        np.testing.assert_array_equal(affine.run({"x": x})["y"], x)

    # What goes in

    def test_takes_a_bare_array_where_there_is_one_input(self, affine: Session) -> None:
        inputs = NETWORKS["affine"].sample(2, 0)
        NETWORKS["affine"].check(inputs, affine.run(inputs["x"]))

    def test_takes_anything_with_dlpack(self, affine: Session) -> None:
        inputs = NETWORKS["affine"].sample(2, 0)
        NETWORKS["affine"].check(inputs, affine.run({"x": OnlyDLPack(inputs["x"])}))

    def test_takes_strided_and_read_only_arrays(self, affine: Session) -> None:
        case = NETWORKS["affine"]
        wide = case.sample(8, 0)["x"]
        for x in (wide[::2], wide[::-1], np.asfortranarray(wide), wide.T[:3, :3].T):
            frozen = x.view()
            frozen.flags.writeable = False
            case.check({"x": frozen}, affine.run({"x": frozen}))

    @pytest.mark.parametrize(
        ("inputs", "told"),
        [
            ({}, "missing: 'x'"),
            ({"z": np.zeros((1, 3), np.float32)}, "unknown: 'z'"),
            ({"x": np.zeros((1, 3), np.float32), "z": np.zeros(1)}, "unknown: 'z'"),
            ({"x": np.zeros((1, 3))}, "float64"),
            ({"x": np.zeros((1, 3), np.int32)}, "int32"),
            ({"x": np.zeros((1, 3), ">f4")}, "float32"),
            ({"x": np.zeros(3, np.float32)}, "rank 1 instead of 2"),
            ({"x": np.zeros((1, 4), np.float32)}, "axis 1 is 4 instead of 3"),
            ({"x": [[1.0, 2.0, 3.0]]}, "a list"),
            ({"x": None}, "NoneType"),
            ([1, 2, 3], "a list"),
            ("x", "a str"),
        ],
        ids=[
            "missing",
            "wrong name",
            "extra",
            "float64",
            "int32",
            "byte order",
            "rank",
            "size",
            "list",
            "none",
            "bare list",
            "text",
        ],
    )
    def test_refuses_a_wrong_input_and_stays_usable(
        self, affine: Session, inputs: Any, told: str
    ) -> None:
        with pytest.raises(InputError, match="x") as caught:
            affine.run(inputs)
        assert told in str(caught.value)
        good = NETWORKS["affine"].sample(2, 0)
        NETWORKS["affine"].check(good, affine.run(good))

    def test_refuses_a_bare_array_for_two_inputs(self, engines: dict[str, Engine]) -> None:
        with engines["pair"].session() as session, pytest.raises(InputError, match="2 inputs"):
            session.run(np.zeros((1, 3), np.float32))

    def test_refuses_a_masked_array_and_takes_other_kinds_of_ndarray(self, affine: Session) -> None:
        x = NETWORKS["affine"].sample(2, 0)["x"]
        with pytest.raises(InputError, match="masked"):
            affine.run({"x": np.ma.masked_array(x, x > 0)})
        NETWORKS["affine"].check({"x": x}, affine.run({"x": x.view(np.matrix)}))

    def test_refuses_two_sizes_for_one_symbol(self, engines: dict[str, Engine]) -> None:
        case = NETWORKS["pair"]
        uneven = {"a": case.sample(2, 0)["a"], "b": case.sample(3, 0)["b"]}
        with engines["pair"].session() as session:
            # TFLite has no symbols, so there the engine itself objects.
            with pytest.raises(UnirtError):
                session.run(uneven)
            good = case.sample(2, 0)
            case.check(good, session.run(good))

    # What comes out

    def test_outputs_belong_to_the_caller(self, affine: Session) -> None:
        case = NETWORKS["affine"]
        first, second = case.sample(2, 1), case.sample(2, 2)
        kept = affine.run(first)
        later = affine.run(second)
        case.check(first, kept)
        kept["y"][:] = 7
        case.check(second, later)
        case.check(first, affine.run(first))
        assert not np.shares_memory(kept["y"], first["x"])

    def test_sessions_of_one_engine_are_independent(self, engines: dict[str, Engine]) -> None:
        case, engine = NETWORKS["affine"], engines["affine"]
        one, other = engine.session(), engine.session()
        inputs = case.sample(2, 0)
        one.close()
        case.check(inputs, other.run(inputs))
        other.close()

    # Many at once

    @pytest.mark.parametrize("network", ["affine", "heavy", "pair"])
    def test_eight_threads_share_a_session(self, engines: dict[str, Engine], network: str) -> None:
        case = NETWORKS[network]
        with engines[network].session() as session:
            session.run(case.sample(1, 0))
            start = threading.Barrier(8)

            def work(thread: int) -> None:
                start.wait()
                for call in range(40):
                    inputs = case.sample(1 + (thread + call) % 3, 1000 * thread + call)
                    case.check(inputs, session.run(inputs))

            with ThreadPoolExecutor(8) as threads:
                list(threads.map(work, range(8)))

    def test_submit_gives_a_future_for_each_call(self, affine: Session) -> None:
        case = NETWORKS["affine"]
        inputs = [case.sample(1 + k % 3, k) for k in range(20)]
        futures = [affine.submit(one) for one in inputs]
        for one, future in zip(inputs, futures, strict=True):
            case.check(one, future.result(timeout=60))
        with pytest.raises(InputError):
            affine.submit({"x": np.zeros((1, 4), np.float32)})

    def test_map_keeps_order_and_reads_no_further_than_it_must(self, affine: Session) -> None:
        case = NETWORKS["affine"]
        read = []

        def stream() -> Iterator[dict[str, Any]]:
            for k in range(10**9):
                read.append(k)
                yield case.sample(1 + k % 3, k)

        results = affine.map(stream(), in_flight=3)
        for k in range(12):
            case.check(case.sample(1 + k % 3, k), next(results))
        assert len(read) <= 12 + 3
        results.close()  # type: ignore[attr-defined]
        assert list(affine.map([])) == []

    def test_map_owes_what_came_before_its_source_fails(self, affine: Session) -> None:
        good = NETWORKS["affine"].sample(1, 0)

        def stream() -> Iterator[dict[str, Any]]:
            yield good
            yield good
            raise OSError("the camera is gone")

        results = affine.map(stream(), in_flight=8)
        NETWORKS["affine"].check(good, next(results))
        NETWORKS["affine"].check(good, next(results))
        with pytest.raises(OSError, match="camera"):
            next(results)

    def test_map_owes_what_came_before_a_bad_item(self, affine: Session) -> None:
        case = NETWORKS["affine"]
        good = case.sample(1, 0)
        results = affine.map([good, good, {"x": "bad"}, good])
        case.check(good, next(results))
        case.check(good, next(results))
        with pytest.raises(InputError):
            next(results)
        case.check(good, affine.run(good))

    # Fixed buffers

    @pytest.mark.parametrize("network", NETWORKS)
    def test_bind_runs_from_and_into_fixed_buffers(
        self, engines: dict[str, Engine], network: str
    ) -> None:
        case = NETWORKS[network]
        inputs = case.sample(2, 0)
        with engines[network].session() as session:
            binding = session.bind(inputs)
            buffers = dict(binding.outputs)
            for seed in range(4):
                for name, value in case.sample(2, seed).items():
                    np.copyto(inputs[name], value)
                assert binding.run() is binding.outputs
                case.check(inputs, binding.outputs)
            for name, buffer in buffers.items():
                assert binding.outputs[name] is buffer

    def test_bind_fills_the_outputs_it_is_given(self, engines: dict[str, Engine]) -> None:
        case = NETWORKS["pair"]
        inputs = case.sample(4, 0)
        mine = {"total": np.full((4, 3), np.nan, np.float32)}
        with engines["pair"].session() as session, session.bind(inputs, mine) as binding:
            binding.run()
            case.check(inputs, {**binding.outputs, **mine})
            assert binding.outputs["total"] is mine["total"]

    def test_bind_leaves_other_calls_alone(self, affine: Session) -> None:
        case = NETWORKS["affine"]
        bound, other = case.sample(2, 0), case.sample(5, 1)
        binding = affine.bind(bound)
        binding.run()
        case.check(other, affine.run(other))
        case.check(bound, binding.outputs)
        binding.run()
        case.check(bound, binding.outputs)

    def test_bind_refuses_buffers_that_do_not_fit(self, affine: Session) -> None:
        x = NETWORKS["affine"].sample(4, 0)["x"]
        frozen = np.zeros((4, 3), np.float32)
        frozen.flags.writeable = False
        for inputs, outputs in (
            ({"x": x.astype(np.float64)}, None),
            ({"x": np.asfortranarray(x)}, None),
            ({"x": x}, {"y": np.zeros((4, 4), np.float32)}),
            ({"x": x}, {"y": np.zeros((4, 3))}),
            ({"x": x}, {"y": frozen}),
            ({"x": x}, {"z": np.zeros((4, 3), np.float32)}),
        ):
            with pytest.raises(InputError):
                affine.bind(inputs, outputs)

    def test_bind_refuses_buffers_that_overlap(self, engines: dict[str, Engine]) -> None:
        x = np.zeros((4, 3), np.float32)
        case = NETWORKS["pair"]
        shared = np.zeros((4, 3), np.float32)
        with engines["affine"].session() as session, pytest.raises(InputError, match="shares"):
            session.bind({"x": x}, {"y": x})
        with engines["pair"].session() as session, pytest.raises(InputError, match="shares"):
            session.bind(case.sample(4, 0), {"total": shared, "difference": shared[::1]})

    def test_bound_buffers_cannot_be_exchanged_unseen(self, affine: Session) -> None:
        binding = affine.bind(NETWORKS["affine"].sample(2, 0))
        for buffers in (binding.inputs, binding.outputs, binding.run()):
            with pytest.raises(TypeError):
                buffers["x"] = np.zeros((2, 3), np.float32)  # type: ignore[index]

    # Closing

    def test_close_may_be_called_from_a_callback_of_its_own_future(
        self, engines: dict[str, Engine]
    ) -> None:
        case = NETWORKS["heavy"]
        session = engines["heavy"].session()
        inputs = [case.sample(64, k) for k in range(6)]
        first = session.submit(inputs[0])
        first.add_done_callback(lambda _: session.close())
        futures = [first]
        for one in inputs[1:]:
            try:
                futures.append(session.submit(one))
            except ClosedError:
                break
        for one, future in zip(inputs, futures, strict=False):
            case.check(one, future.result(timeout=60))
        session.close()

    def test_every_close_waits(self, engines: dict[str, Engine]) -> None:
        case = NETWORKS["heavy"]
        session = engines["heavy"].session()
        futures = [session.submit(case.sample(512, k)) for k in range(8)]

        def close() -> bool:
            session.close()
            return all(future.done() for future in futures)

        with ThreadPoolExecutor(3) as threads:
            assert all(threads.map(lambda _: close(), range(3)))

    def test_a_closed_session_says_so(self, engines: dict[str, Engine]) -> None:
        session = engines["affine"].session()
        inputs = NETWORKS["affine"].sample(2, 0)
        binding = session.bind(inputs)
        session.close()
        session.close()
        for use in (session.run, session.submit, session.bind):
            with pytest.raises(ClosedError):
                use(inputs)
        with pytest.raises(ClosedError):
            session.map([inputs])
        with pytest.raises(ClosedError):
            binding.run()

    def test_closing_an_engine_closes_its_sessions(self, available: Backend) -> None:
        with self.engine(available, "affine") as engine:
            session = engine.session()
        with pytest.raises(ClosedError):
            session.run(NETWORKS["affine"].sample(1, 0))
        with pytest.raises(ClosedError):
            engine.session()

    def test_close_waits_for_calls_in_flight(self, engines: dict[str, Engine]) -> None:
        case = NETWORKS["heavy"]
        session = engines["heavy"].session()
        inputs = [case.sample(64, k) for k in range(16)]
        futures = [session.submit(one) for one in inputs]
        session.close()
        for one, future in zip(inputs, futures, strict=True):
            assert future.done()
            case.check(one, future.result())

    def test_closing_under_load_loses_no_answer(self, engines: dict[str, Engine]) -> None:
        case = NETWORKS["affine"]
        session = engines["affine"].session()
        answered, refused = [], []

        def work(thread: int) -> None:
            for call in range(10**6):
                inputs = case.sample(1, 1000 * thread + call)
                try:
                    case.check(inputs, session.run(inputs))
                    answered.append(thread)
                except ClosedError:
                    refused.append(thread)
                    return

        with ThreadPoolExecutor(4) as threads:
            workers = [threads.submit(work, thread) for thread in range(4)]
            while len(answered) < 20 and not any(worker.done() for worker in workers):
                time.sleep(0.001)
            session.close()
            for worker in workers:
                worker.result(timeout=60)
        assert sorted(refused) == [0, 1, 2, 3]

    # What is refused

    def test_a_damaged_model_is_a_unirt_error(self, available: Backend) -> None:
        whole = NETWORKS["heavy"].model(available.formats).primary.read()
        for damaged in (b"", b"not a model", whole[: len(whole) // 2], whole[:-7]):
            with pytest.raises(UnirtError):
                available.compile(Model(damaged), self.device, self.options).session()

    def test_an_unknown_operator_is_a_build_error(self, available: Backend) -> None:
        if "onnx" in available.formats:
            model = onnx_bytes("flip").replace(b"Not", b"Nit")
        else:
            model = tflite_network("unknown") or b""
        with pytest.raises(BuildError) as caught:
            available.compile(Model(model), self.device, self.options)
        assert caught.value.__cause__ is not None

    def test_an_unknown_option_names_the_valid_ones(self, available: Backend) -> None:
        model = NETWORKS["affine"].model(available.formats)
        with pytest.raises(OptionError, match="warp_speed"):
            available.compile(model, self.device, {"warp_speed": 9})

    def test_a_device_that_is_not_here_is_refused(self, available: Backend) -> None:
        model = NETWORKS["affine"].model(available.formats)
        for device in ("cuda:99", "toaster"):
            with pytest.raises(BackendUnavailable, match=device):
                available.compile(model, device)

    def test_a_format_it_cannot_read_is_refused(self, available: Backend) -> None:
        other = [name for name in ("onnx", "tflite") if name not in available.formats]
        for name in other:
            with pytest.raises(UnirtError, match=name):
                available.compile(Model(OTHER_FORMATS[name]()), self.device)

    # How it is made

    def test_probe_says_what_is_here(self, backend: Backend) -> None:
        availability = backend.probe()
        assert isinstance(availability, Availability)
        if availability.available:
            assert availability.version
            assert availability.devices
        else:
            assert availability.reason

    def test_fills_in_only_what_core_leaves_open(self, backend: Backend, engines: Any) -> None:
        """Public methods are core's; a backend brings underscored ones with the same parameters."""
        assert Candidate.parse(backend.name) == Candidate(backend.name)
        session = engines["affine"].session()
        for instance, base in (
            (backend, Backend),
            (engines["affine"], Engine),
            (session, Session),
        ):
            for name, method in vars(base).items():
                mine = getattr(type(instance), name)
                if name.startswith("__") or not inspect.isfunction(method):
                    continue
                if getattr(method, "__final__", False):
                    assert mine is method, f"{name} is core's"
                assert list(inspect.signature(mine).parameters) == list(
                    inspect.signature(method).parameters
                ), name
        session.close()

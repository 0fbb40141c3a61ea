"""Sessions: concurrent calls over a bounded pool of lanes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from unirt import DeviceArray, EngineReport, InputError, Pool, Session
from unirt_tensorrt._lane import Lane
from unirt_tensorrt._runtime import Runtime
from unirt_tensorrt._unit import Unit


class TensorRTSession(Session):
    """Calls take a lane from a bounded pool; lanes are made when first needed. Calls leave the
    thread's current device as they found it.
    """

    concurrent = True

    def __init__(self, runtime: Runtime, shared: Unit | None) -> None:
        self._runtime, self._shared, self._cuda = runtime, shared, runtime.cuda
        count = runtime.settings.lanes
        # Two lanes for each unit: one's inputs travel while the other's compute.
        self.lanes = 2 * count
        self._units = [shared or Unit(runtime) for _ in range(count)]
        self._next = itertools.count()
        self._lanes = Pool(self._new_lane, self.lanes)
        # A first lane now: what cannot open says so here, and the first call does not wait for it.
        self._lanes.give(self._lanes.take())

    def _new_lane(self) -> Lane:
        return Lane(self._runtime, self._units[next(self._next) % len(self._units)])

    def _run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._cuda.several:
            with self._cuda.current():
                return self._on_lane(inputs)
        return self._on_lane(inputs)

    def _on_lane(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        lane = None
        try:
            lane = self._lanes.take()
            return lane.run(inputs)
        finally:
            if lane is not None:
                self._lanes.give(lane)

    def _run_device(self, inputs: Mapping[str, Any], keep: bool) -> Mapping[str, Any]:
        self._check_device(inputs)
        with self._cuda.current():
            lane = None
            try:
                lane = self._lanes.take()
                return lane.run_device(inputs, keep)
            finally:
                if lane is not None:
                    self._lanes.give(lane)

    def _bind(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> Callable[[], object] | None:
        self._check_device({**inputs, **outputs})
        with self._cuda.current():
            unit = self._shared or Unit(self._runtime)
            lane = Lane(self._runtime, unit)
            step = lane.bind(inputs, outputs)
        arrays = (*inputs.values(), *outputs.values())
        if step is None and any(isinstance(array, DeviceArray) for array in arrays):
            raise InputError(
                "These device buffers cannot be bound.",
                "An address is not aligned to 256 bytes, or the network has an input or output "
                "that TensorRT keeps on the host or sizes by itself.",
                "Bind whole allocations, or use run(..., device_outputs=True).",
            )
        return step and self._closable(step, lane, unit)

    def _closable(self, step: Callable[[], object], lane: Lane, unit: Unit) -> Callable[[], object]:
        """The step, with a `close` that frees the lane and unit which serve it alone."""
        current = self._cuda.current

        def step_there() -> None:
            with current():
                step()

        def close() -> None:
            with current():
                lane.close()
                if not unit.is_shared:
                    unit.close()

        # The function itself where it will do: a tight loop feels one call more.
        bound: Any = step_there if self._cuda.several else step
        bound.close = close
        return bound  # type: ignore[no-any-return]

    def _profile(self, inputs: Mapping[str, Any]) -> EngineReport:
        on_host = {
            name: value.numpy() if isinstance(value, DeviceArray) else value
            for name, value in inputs.items()
        }
        with self._cuda.current():
            unit = Unit(self._runtime, plain=True)
            lane = Lane(self._runtime, unit)
            try:
                times = lane.profile(on_host)
            finally:
                lane.close()
                unit.close()
        return self.engine.inspect().with_times(times)

    def _check_device(self, arrays: Mapping[str, Any]) -> None:
        for name, value in arrays.items():
            if not isinstance(value, DeviceArray):
                continue
            index = value.device_id
            if self._cuda.several and hasattr(value.owner, "__cuda_array_interface__"):
                index = self._cuda.device_of(value.pointer)  # that interface does not tell
            if index != self._cuda.index:
                raise InputError(
                    f"{name!r} lies on cuda:{index}.",
                    f"This session runs on cuda:{self._cuda.index}, and UniRT makes no silent "
                    "copies.",
                    "Copy it to that device, or build the engine for the other one.",
                    name=name,
                )

    def _close(self) -> None:
        with self._cuda.current():
            for lane in self._lanes.drain():
                lane.close()
            for unit in self._units:
                if not unit.is_shared:
                    unit.close()
            if self._runtime.settings.specialization != "lazy":
                # Lazy kernels may still come for other sessions; closing the engine saves them.
                self._runtime.save_runtime_cache()

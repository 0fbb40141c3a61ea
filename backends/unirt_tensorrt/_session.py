"""Sessions: concurrent calls over a bounded pool of lanes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from unirt import DeviceArray, EngineReport, InputError, Pool, Session
from unirt_tensorrt._lane import Lane
from unirt_tensorrt._unit import Unit

if TYPE_CHECKING:
    from unirt_tensorrt._engine import TensorRTEngine


class TensorRTSession(Session):
    """Calls take a lane from a bounded pool; lanes are made when first needed."""

    concurrent = True

    def __init__(self, engine: TensorRTEngine) -> None:
        self._native = engine
        # Two lanes for each unit: one's inputs travel while the other's compute.
        self.lanes = 2 * engine.settings.lanes
        self._units = [engine.shared_unit or Unit(engine) for _ in range(engine.settings.lanes)]
        self._next = itertools.count()
        self._lanes = Pool(self._new_lane, self.lanes)
        # A first lane now: what cannot open says so here, and the first call does not wait for it.
        self._lanes.give(self._lanes.take())

    def _new_lane(self) -> Lane:
        return Lane(self._native, self._units[next(self._next) % len(self._units)])

    def _run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        lane = None
        try:
            lane = self._lanes.take()
            return lane.run(inputs)
        finally:
            if lane is not None:
                self._lanes.give(lane)

    def _run_device(self, inputs: Mapping[str, Any], keep: bool) -> Mapping[str, Any]:
        self._check_device(inputs)
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
        lane = Lane(self._native, self._native.shared_unit or Unit(self._native))
        step = lane.bind(inputs, outputs)
        arrays = (*inputs.values(), *outputs.values())
        if step is None and any(isinstance(array, DeviceArray) for array in arrays):
            raise InputError(
                "These device buffers cannot be bound.",
                "An address is not aligned to 256 bytes, or the network has an input or output "
                "that TensorRT keeps on the host or sizes by itself.",
                "Bind whole allocations, or use run(..., device_outputs=True).",
            )
        return step

    def _profile(self, inputs: Mapping[str, Any]) -> EngineReport:
        unit = Unit(self._native, plain=True)
        lane = Lane(self._native, unit)
        try:
            on_host = {
                name: value.numpy() if isinstance(value, DeviceArray) else value
                for name, value in inputs.items()
            }
            times = lane.profile(on_host)
        finally:
            lane.close()
            unit.close()
        return self._native.inspect().with_times(times)

    def _check_device(self, arrays: Mapping[str, Any]) -> None:
        index = self._native.cuda.index
        for name, value in arrays.items():
            if isinstance(value, DeviceArray) and value.device_id != index:
                raise InputError(
                    f"{name!r} lies on cuda:{value.device_id}.",
                    f"This session runs on cuda:{index}, and UniRT makes no silent copies.",
                    "Copy it to that device, or build the engine for the other one.",
                    name=name,
                )

    def _close(self) -> None:
        for lane in self._lanes.drain():
            lane.close()
        for unit in self._units:
            if not unit.is_shared:
                unit.close()
        if self._native.settings.specialization != "lazy":
            # Lazy kernels may still come for other sessions; closing the engine saves them.
            self._native.save_runtime_cache()

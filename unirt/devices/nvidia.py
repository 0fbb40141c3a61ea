"""The NVIDIA GPUs that CUDA would show this process, read through NVML."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unirt.types import Device

logger = logging.getLogger("unirt")


def devices() -> tuple[Device, ...]:
    """The GPUs, numbered as CUDA does. Never raises."""
    return _nvidia()[0]


def status() -> str:
    """One line on the driver and its GPUs, or on why there are none. Never raises."""
    return _nvidia()[1]


# CUDA cores of one multiprocessor; NVML counts cores only. Unlisted here: 128.
_CORES_PER_MULTIPROCESSOR: Mapping[str, int] = {
    "3.0": 192,
    "3.5": 192,
    "3.7": 192,
    "6.0": 64,
    "7.0": 64,
    "7.2": 64,
    "7.5": 64,
    "8.0": 64,
}


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG instance of one, as NVML sees it: CUDA_VISIBLE_DEVICES does not count."""

    name: str
    uuid: str | None = None
    memory_bytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    speed: int = 0
    is_instance: bool = False
    is_split: bool = False
    instances: tuple[Gpu, ...] = ()


def cuda_order(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """What CUDA shows a process with this environment, as CUDA numbers it.

    CUDA_VISIBLE_DEVICES holds numbers or beginnings of UUIDs: the first entry that names nothing
    ends the list, and one named twice empties it. Of all MIG instances CUDA shows a process one,
    and then no whole GPU.
    """
    ordered = list(gpus)
    if all("pci_bus_id" in gpu.facts for gpu in gpus):
        ordered.sort(key=lambda gpu: str(gpu.facts["pci_bus_id"]))
    if environ.get("CUDA_DEVICE_ORDER", "").upper() != "PCI_BUS_ID":
        ordered.sort(key=lambda gpu: -gpu.speed)
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    shown = ordered if wanted is None else _named(ordered, wanted)
    instances = [
        instance
        for gpu in shown
        for instance in ((gpu,) if gpu.is_instance else gpu.instances if gpu.is_split else ())
    ]
    return instances[:1] or [gpu for gpu in shown if not gpu.is_split]


def _named(ordered: Sequence[Gpu], wanted: str) -> list[Gpu]:
    by_uuid = wanted.startswith(("GPU-", "MIG-"))
    everything = [*ordered, *(instance for gpu in ordered for instance in gpu.instances)]
    shown: list[Gpu] = []
    for entry in wanted.split(","):
        if by_uuid:
            found = [gpu for gpu in everything if _is_called(gpu, entry)]
        else:
            # CUDA reads numbers as strtol does: "1gpu" is 1.
            number = re.match(r"\s*([+-]?\d+)", entry)
            place = int(number[1]) if number else -1
            found = [ordered[place]] if 0 <= place < len(ordered) else []
        if len(found) != 1:
            break
        if found[0] in shown:
            return []
        shown += found
    return shown


def _is_called(gpu: Gpu, entry: str) -> bool:
    # Seen on driver 580: the beginning will do, in any case, and what follows a UUID is ignored,
    # but not a blank before it.
    uuid, text = (gpu.uuid or "").lower(), entry.lower()
    return len(text) > len("GPU-") < len(uuid) and (uuid.startswith(text) or text.startswith(uuid))


def read_gpus(nvml: Any) -> tuple[list[Gpu], list[str]]:
    """All GPUs that an initialised `pynvml` can open, and the reasons for those it cannot."""
    driver = _ask(nvml, "SystemGetDriverVersion")
    cuda = _ask(nvml, "SystemGetCudaDriverVersion_v2")
    system = {
        "driver": _text(driver),
        "cuda_driver_version": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
    }
    gpus: list[Gpu] = []
    refused: list[str] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:
            refused.append(f"GPU {index}: {error}")
        else:
            gpus.append(_read_gpu(nvml, handle, system))
    return gpus, refused


def _read_gpu(nvml: Any, handle: Any, system: Mapping[str, Any]) -> Gpu:
    capability = _ask(nvml, "DeviceGetCudaComputeCapability", handle)
    compute_capability = None if capability is None else "{}.{}".format(*capability)
    cores = _ask(nvml, "DeviceGetNumGpuCores", handle)
    per_multiprocessor = _CORES_PER_MULTIPROCESSOR.get(compute_capability or "", 128)
    clock = _ask(nvml, "DeviceGetMaxClockInfo", handle, getattr(nvml, "NVML_CLOCK_SM", 1))
    bus = _ask(nvml, "DeviceGetPciInfo", handle)
    is_split = (_ask(nvml, "DeviceGetMigMode", handle) or (0, 0))[0] == 1
    common = {
        **system,
        "compute_capability": compute_capability,
        **({} if bus is None else {"pci_bus_id": _text(bus.busId)}),
    }
    instances = []
    for index in range(_ask(nvml, "DeviceGetMaxMigDeviceCount", handle) or 0 if is_split else 0):
        instance = _ask(nvml, "DeviceGetMigDeviceHandleByIndex", handle, index)
        if instance is not None:
            attributes = _ask(nvml, "DeviceGetAttributes_v2", instance)
            count = None if attributes is None else int(attributes.multiprocessorCount)
            instances.append(_gpu(nvml, instance, common, count, is_instance=True))
    multiprocessors = cores // per_multiprocessor if cores and compute_capability else None
    return _gpu(
        nvml,
        handle,
        common,
        multiprocessors,
        speed=(cores or 0) * (clock or 0),
        is_split=is_split,
        instances=tuple(instances),
    )


def _gpu(
    nvml: Any,
    handle: Any,
    common: Mapping[str, Any],
    multiprocessors: int | None,
    *,
    speed: int = 0,
    is_instance: bool = False,
    is_split: bool = False,
    instances: tuple[Gpu, ...] = (),
) -> Gpu:
    memory = _ask(nvml, "DeviceGetMemoryInfo", handle)
    uuid = _text(_ask(nvml, "DeviceGetUUID", handle))
    return Gpu(
        name=_text(_ask(nvml, "DeviceGetName", handle)) or "NVIDIA GPU",
        uuid=uuid,
        memory_bytes=None if memory is None else int(memory.total),
        facts={
            **common,
            "uuid": uuid,
            "multiprocessors": multiprocessors,
            "available_memory_bytes": None if memory is None else int(memory.free),
            "mig": is_instance,
        },
        speed=speed,
        is_instance=is_instance,
        is_split=is_split,
        instances=instances,
    )


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:
    # An older driver lacks the symbol, an older pynvml the function, a container the permission,
    # a unified-memory chip the answer: each costs this one fact.
    try:
        return getattr(nvml, f"nvml{function}")(*arguments)
    except Exception as error:  # noqa: BLE001
        logger.debug("NVML gives no %s: %s", function, error)
        return None


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _nvidia() -> tuple[tuple[Device, ...], str]:
    try:
        import pynvml as nvml
    except ImportError:
        return (), "nvidia-ml-py is missing: python -m pip install nvidia-ml-py"
    try:
        nvml.nvmlInit()
        try:
            gpus, refused = read_gpus(nvml)
            driver = _text(_ask(nvml, "SystemGetDriverVersion")) or "of unknown version"
        finally:
            nvml.nvmlShutdown()
        shown = cuda_order(gpus, os.environ)
    except Exception as error:  # noqa: BLE001 - devices are listed, or the reason is
        return (), _nvml_failure(nvml, error)
    devices = tuple(
        Device("cuda", index, gpu.name, gpu.memory_bytes, dict(gpu.facts))
        for index, gpu in enumerate(shown)
    )
    return devices, nvidia_summary(driver, gpus, shown, refused, os.environ)


def nvidia_summary(
    driver: str,
    gpus: Sequence[Gpu],
    shown: Sequence[Gpu],
    refused: Sequence[str],
    environ: Mapping[str, str],
) -> str:
    """The line for a machine whose driver answers."""
    notes = [f"driver {driver}, {len(gpus)} GPU{'' if len(gpus) == 1 else 's'}"]
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        notes.append(f"{len(shown)} shown by CUDA_VISIBLE_DEVICES={wanted!r}")
    if any(gpu.is_split for gpu in gpus):
        notes.append("split by MIG, of which CUDA shows a process one instance")
    if (
        len(shown) > 1
        and len({gpu.speed for gpu in gpus}) > 1
        and environ.get("CUDA_DEVICE_ORDER", "").upper() != "PCI_BUS_ID"
    ):
        # CUDA sorts unlike GPUs by a rule that NVIDIA does not publish.
        notes.append("numbered by estimated speed; CUDA_DEVICE_ORDER=PCI_BUS_ID makes that certain")
    return "; ".join([*notes, *refused])


def _nvml_failure(nvml: Any, error: Exception) -> str:
    code = getattr(error, "value", None)
    if code == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        library = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
        return f"no NVIDIA driver: {library} not found"
    if code == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return "NVIDIA driver not loaded: its library is here, its kernel module does not answer"
    if code == getattr(nvml, "NVML_ERROR_LIB_RM_VERSION_MISMATCH", 18):
        return "NVIDIA driver was updated under a running kernel module: reboot"
    return f"NVIDIA driver does not answer: {error}"

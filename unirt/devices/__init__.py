"""The hardware of this machine: the CPU as far as this process may use it, and its NVIDIA GPUs."""

from __future__ import annotations

from unirt.types import Device


def host_devices() -> tuple[Device, ...]:
    """The CPU, then the NVIDIA GPUs that CUDA would show this process, numbered as CUDA does.

    Never raises. Affinity, limits and free memory are of this moment and of the calling thread.
    """
    # Imported at the first look: most programs that import unirt never take one.
    from unirt.devices import cpu, nvidia

    return (cpu.device(), *nvidia.devices())


def nvidia_status() -> str:
    """One line on the NVIDIA driver and its GPUs, or on why there are none. Never raises."""
    from unirt.devices import nvidia

    return nvidia.status()

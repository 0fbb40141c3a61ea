"""The CPU, as far as this process may use it.

What Linux tells is read from a `root` that holds `proc` and `sys`, so that a recorded tree of
another machine reads like the real one. What a machine does not tell is None, never a guess.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from unirt.types import Device

logger = logging.getLogger("unirt")

ROOT = Path("/")


# Our name of an instruction set, and what Linux and macOS call it, in lower case.
_INSTRUCTION_SETS: Mapping[str, tuple[str, ...]] = {
    "sse4_1": ("sse4_1", "sse4.1"),
    "avx": ("avx", "avx1.0", "avx1_0"),
    "avx2": ("avx2", "avx2_0"),
    "fma": ("fma",),
    "f16c": ("f16c",),
    "avx512f": ("avx512f",),
    "avx512_vnni": ("avx512_vnni", "avx512vnni"),
    "avx_vnni": ("avx_vnni",),
    "avx512_bf16": ("avx512_bf16", "avx512bf16"),
    "avx512_fp16": ("avx512_fp16", "avx512fp16"),
    "amx_tile": ("amx_tile",),
    "amx_int8": ("amx_int8",),
    "amx_bf16": ("amx_bf16",),
    "neon": ("neon", "asimd", "advsimd"),
    "dotprod": ("asimddp", "feat_dotprod"),
    "fp16": ("asimdhp", "feat_fp16"),
    "i8mm": ("i8mm", "feat_i8mm"),
    "bf16": ("bf16", "feat_bf16"),
    "sve": ("sve",),
    "sve2": ("sve2",),
    "sme": ("sme", "feat_sme"),
}

# winnt.h's PF_* numbers. Windows has none for FMA, F16C, VNNI and AMX: absent, not unsupported.
_WINDOWS_FEATURES: Mapping[str, int] = {
    "neon": 19,
    "sse4_1": 37,
    "avx": 39,
    "avx2": 40,
    "avx512f": 41,
    "dotprod": 43,
    "sve": 46,
    "sve2": 47,
    "i8mm": 66,
    "fp16": 67,
    "bf16": 68,
    "sme": 70,
}

_ARM_VENDORS: Mapping[int, str] = {
    0x41: "Arm",
    0x42: "Broadcom",
    0x43: "Cavium",
    0x46: "Fujitsu",
    0x48: "HiSilicon",
    0x4E: "NVIDIA",
    0x50: "APM",
    0x51: "Qualcomm",
    0x53: "Samsung",
    0x61: "Apple",
    0x6D: "Microsoft",
    0xC0: "Ampere",
}

_ARM_PARTS: Mapping[tuple[int, int], str] = {
    (0x41, 0xC07): "Cortex-A7",
    (0x41, 0xC08): "Cortex-A8",
    (0x41, 0xC09): "Cortex-A9",
    (0x41, 0xC0F): "Cortex-A15",
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD0E): "Cortex-A76AE",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4A): "Neoverse-E1",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD84): "Neoverse-V3",
    (0x41, 0xD85): "Cortex-X925",
    (0x41, 0xD87): "Cortex-A725",
    (0x41, 0xD8E): "Neoverse-N3",
    (0x48, 0xD01): "TaiShan-v110",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
    (0x51, 0x001): "Oryon",
    (0xC0, 0xAC3): "Ampere-1",
    (0xC0, 0xAC4): "Ampere-1a",
}


@dataclass(frozen=True)
class Processor:
    """What does not change while a process runs. `core_of` maps a CPU number to its core."""

    name: str
    instruction_sets: tuple[str, ...]
    physical_cores: int
    logical_cores: int
    numa_nodes: int | None = None
    core_of: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CgroupLimits:
    """The tightest limit on the way from this process's cgroup to the top; None is no limit."""

    memory_bytes: int | None = None
    memory_headroom_bytes: int | None = None
    cpu_quota: float | None = None
    cpuset: frozenset[int] | None = None


def instruction_sets(words: Iterable[str]) -> tuple[str, ...]:
    """The instruction sets that engines care about, out of the system's own words for them."""
    known = {word.lower() for word in words}
    return tuple(
        sorted(name for name, said in _INSTRUCTION_SETS.items() if not known.isdisjoint(said))
    )


def cpu_list(text: str) -> frozenset[int]:
    """The numbers in the kernel's `0-3,8` notation; empty for what is not written so."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return frozenset()
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


@cache
def linux_processor(root: Path) -> Processor:
    """Reads the processor from `proc/cpuinfo` and `sys/devices/system`."""
    blocks = [
        {
            key.strip(): value.strip()
            for key, colon, value in map(_colon, block.splitlines())
            if colon
        }
        for block in re.split(r"\n\s*\n", _read(root / "proc/cpuinfo"))
    ]
    cpus = {int(block["processor"]): block for block in blocks if _is_number(block, "processor")}
    system = root / "sys/devices/system"
    online = cpu_list(_read(system / "cpu/online")) or frozenset(cpus)
    core_of = {
        cpu: _core(system / f"cpu/cpu{cpu}/topology", cpus.get(cpu, {}), cpu) for cpu in online
    }
    words = next(
        (block[key] for block in blocks for key in ("flags", "Features") if key in block), ""
    )
    nodes = len(cpu_list(_read(system / "node/online")))
    return Processor(
        name=_cpuinfo_name(blocks),
        instruction_sets=instruction_sets(words.split()),
        physical_cores=len(set(core_of.values())) or 1,
        logical_cores=len(online) or 1,
        numa_nodes=nodes or None,
        core_of=core_of,
    )


def _core(topology: Path, cpuinfo: Mapping[str, str], cpu: int) -> str:
    # The sibling list, not core_id: that repeats between sockets, dies and clusters.
    siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
    if siblings:
        return siblings.strip()
    if "physical id" in cpuinfo and "core id" in cpuinfo:
        return f"{cpuinfo['physical id']}/{cpuinfo['core id']}"
    return f"cpu{cpu}"


def _cpuinfo_name(blocks: Sequence[Mapping[str, str]]) -> str:
    # Before "model name": where Arm kernels have one, it says "ARMv7 Processor rev 4 (v7l)".
    arm: dict[str, list[str]] = {}
    for block in blocks:
        try:
            vendor, part = int(block["CPU implementer"], 16), int(block["CPU part"], 16)
        except (KeyError, ValueError):
            continue
        parts = arm.setdefault(_ARM_VENDORS.get(vendor, f"implementer {vendor:#04x}"), [])
        name = _ARM_PARTS.get((vendor, part), f"part {part:#05x}")
        if name not in parts:
            parts.append(name)
    if arm:
        return ", ".join(f"{vendor} {' + '.join(parts)}" for vendor, parts in arm.items())
    for key in ("model name", "Model Name", "cpu model", "cpu", "uarch"):
        for block in blocks:
            if block.get(key, "unknown").lower() != "unknown":
                return " ".join(block[key].split())
    return ""


def macos_processor(sysctl: str, physical_cores: int, logical_cores: int) -> Processor:
    """Reads what `sysctl machdep.cpu hw.optional` printed."""
    values = {key.strip(): value.strip() for key, _, value in map(_colon, sysctl.splitlines())}
    words = [
        key.rpartition(".")[2]
        for key, value in values.items()
        if key.startswith("hw.optional.") and value not in ("", "0")
    ]
    for key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
        words += values.get(key, "").split()
    return Processor(
        name=values.get("machdep.cpu.brand_string", ""),
        instruction_sets=instruction_sets(words),
        physical_cores=physical_cores,
        logical_cores=logical_cores,
    )


@cache
def _psutil_processor() -> Processor:
    import psutil

    logical = psutil.cpu_count() or os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    if sys.platform == "darwin":
        import subprocess

        sysctl = subprocess.run(
            ["/usr/sbin/sysctl", "machdep.cpu", "hw.optional"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
        return macos_processor(sysctl.stdout, physical, logical)
    name = platform.processor()
    features: tuple[str, ...] = ()
    if sys.platform == "win32":
        import winreg

        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        features = tuple(sorted(name for name, code in _WINDOWS_FEATURES.items() if present(code)))
        key = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
                name = str(winreg.QueryValueEx(opened, "ProcessorNameString")[0]).strip()
        except OSError:
            logger.debug("The registry names no processor.", exc_info=True)
    return Processor(name, features, physical, logical)


def cgroup_limits(root: Path) -> CgroupLimits:
    """Reads the cgroup v1, v2 or hybrid limits of the process whose files lie in `proc/self`.

    A parent's limit holds for its children, so every level up to the mount counts. A container
    may not see its upper levels; what it cannot see is not counted.
    """
    limits: list[int] = []
    headrooms: list[int] = []
    for level in _cgroup_levels(root, "memory"):
        for limit_file, usage_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(_read(level / limit_file))
            # cgroup v1 writes the largest page-aligned number for "no limit".
            if limit is None or limit >= 1 << 62:
                continue
            limits.append(limit)
            usage = _number(_read(level / usage_file))
            if usage is not None:
                # The page cache counts as used, but goes when memory is asked for.
                cached = _stat(_read(level / "memory.stat"), cache_key)
                headrooms.append(max(0, min(limit, limit - usage + cached)))

    quotas: list[float] = []
    for level in _cgroup_levels(root, "cpu"):
        quota, _, period = _read(level / "cpu.max").strip().partition(" ")
        for quota_us, period_us in (
            (_number(quota), _number(period)),
            (
                _number(_read(level / "cpu.cfs_quota_us")),
                _number(_read(level / "cpu.cfs_period_us")),
            ),
        ):
            if quota_us and period_us:
                quotas.append(quota_us / period_us)

    cpusets = (
        cpu_list(_read(level / name))
        for level in _cgroup_levels(root, "cpuset")
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
    )
    return CgroupLimits(
        memory_bytes=min(limits, default=None),
        memory_headroom_bytes=min(headrooms, default=None),
        cpu_quota=min(quotas, default=None),
        cpuset=next(filter(None, cpusets), None),
    )


def _cgroup_levels(root: Path, controller: str) -> Iterator[Path]:
    """The folders that may limit this process, its own first."""
    mounts = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        place, _, source = line.partition(" - ")
        if place.count(" ") < 4 or source.count(" ") < 2:
            continue
        top, at = map(_unescape, place.split(" ")[3:5])
        kind, _, options = source.split(" ")[:3]
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            mounts.append((kind, top, at))
    for line in _read(root / "proc/self/cgroup").splitlines():
        # Kubernetes puts colons into paths.
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        kind = "cgroup" if controllers else "cgroup2"
        ours = [(top, at) for mounted, top, at in mounts if mounted == kind]
        # One cgroup can be mounted in several places: better one that shows where we are in it.
        for top, at in sorted(ours, key=lambda mount: _below(mount[0], path) is None)[:1]:
            mount = root / at.lstrip("/")
            inside = _below(top, path) or PurePosixPath()
            yield from (mount / level for level in (inside, *inside.parents))


def _below(top: str, path: str) -> PurePosixPath | None:
    if ".." in PurePosixPath(path).parts or not PurePosixPath(path).is_relative_to(top):
        return None
    return PurePosixPath(path).relative_to(top)


def in_container(root: Path, environ: Mapping[str, str]) -> bool:
    """Whether the usual traces of Docker, Podman, Kubernetes, LXC or nspawn are here."""
    return (
        (root / ".dockerenv").exists()
        or (root / "run/.containerenv").exists()
        or bool(environ.get("container"))
        or "KUBERNETES_SERVICE_HOST" in environ
        or bool(re.search(r"/(docker|kubepods|libpod|lxc)\b", _read(root / "proc/self/cgroup")))
    )


def linux_cpu(
    root: Path,
    *,
    architecture: str,
    affinity: Collection[int],
    address_space: int | None = None,
    page_size: int = 4096,
    environ: Mapping[str, str],
) -> Device:
    """The CPU of the machine whose files lie in `root`, for a process with this affinity.

    `address_space` is the process's limit (RLIMIT_AS), None for none.
    """
    limits = cgroup_limits(root)
    memory = {
        key: int(value.split()[0]) * 1024
        for key, colon, value in map(_colon, _read(root / "proc/meminfo").splitlines())
        if colon and value.split()[:1] and value.split()[0].isdecimal()
    }
    usable = frozenset(affinity)
    if limits.cpuset is not None:
        usable = usable & limits.cpuset or usable
    virtual = _number(_read(root / "proc/self/statm").partition(" ")[0])
    return _cpu_device(
        linux_processor(root),
        architecture,
        usable,
        physical_memory=memory.get("MemTotal"),
        available_memory=memory.get("MemAvailable"),
        address_space=address_space,
        address_space_used=None if virtual is None else virtual * page_size,
        limits=limits,
        container=in_container(root, environ),
    )


def _cpu_device(
    processor: Processor,
    architecture: str,
    usable: Collection[int],
    *,
    physical_memory: int | None,
    available_memory: int | None,
    address_space: int | None = None,
    address_space_used: int | None = None,
    limits: CgroupLimits = CgroupLimits(),
    container: bool = False,
) -> Device:
    bounds = {
        "physical": physical_memory,
        "cgroup": limits.memory_bytes,
        "RLIMIT_AS": address_space,
    }
    known = {source: size for source, size in bounds.items() if size is not None}
    limited_by = min(known, key=known.__getitem__, default="physical")

    left = [available_memory, limits.memory_headroom_bytes]
    if address_space is not None and address_space_used is not None:
        left.append(max(0, address_space - address_space_used))

    cores = len({processor.core_of.get(cpu, f"cpu{cpu}") for cpu in usable})
    usable_cores = max(1, min(cores, processor.physical_cores))
    quota = limits.cpu_quota
    return Device(
        "cpu",
        name=processor.name or architecture,
        memory_bytes=known.get(limited_by),
        facts={
            "architecture": architecture,
            "instruction_sets": processor.instruction_sets,
            "physical_cores": processor.physical_cores,
            "logical_cores": processor.logical_cores,
            "usable_physical_cores": usable_cores,
            "usable_logical_cores": len(usable) or 1,
            "cpu_quota": quota,
            "usable_cpus": usable_cores if quota is None else min(usable_cores, math.ceil(quota)),
            "available_memory_bytes": min(
                (size for size in left if size is not None), default=None
            ),
            "memory_limited_by": None if limited_by == "physical" else limited_by,
            "numa_nodes": processor.numa_nodes,
            "container": container or quota is not None or limited_by == "cgroup",
        },
    )


def device() -> Device:
    architecture = platform.machine().lower()
    architecture = {"amd64": "x86_64", "arm64": "aarch64"}.get(architecture, architecture)
    try:
        if sys.platform == "linux":
            return linux_cpu(
                ROOT,
                architecture=architecture,
                affinity=os.sched_getaffinity(0),
                address_space=_address_space(),
                page_size=os.sysconf("SC_PAGE_SIZE"),
                environ=os.environ,
            )
        import psutil

        processor = _psutil_processor()
        memory = psutil.virtual_memory()
        usable: Collection[int] = range(processor.logical_cores)
        if sys.platform == "win32":
            usable = psutil.Process().cpu_affinity()
        return _cpu_device(
            processor,
            architecture,
            usable,
            physical_memory=memory.total,
            available_memory=memory.available,
            address_space=_address_space(),
        )
    except Exception:
        # A machine stranger than we know must still run models.
        logger.warning(
            "Reading this machine's CPU failed; only its cores are known.", exc_info=True
        )
        cores = os.cpu_count() or 1
        return _cpu_device(
            Processor("", (), cores, cores),
            architecture,
            range(cores),
            physical_memory=None,
            available_memory=None,
        )


def _address_space() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _is_number(block: Mapping[str, str], key: str) -> bool:
    return block.get(key, "").isdecimal()


def _stat(text: str, key: str) -> int:
    found = re.search(rf"^{key} (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _colon(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)

"""Machines as small recorded trees of /proc and /sys; this machine as other tools see it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from unirt.devices import cpu as cpu_module
from unirt.devices import host_devices, nvidia_status
from unirt.devices.cpu import (
    CgroupLimits,
    cgroup_limits,
    cpu_list,
    in_container,
    linux_cpu,
    linux_processor,
    macos_processor,
)
from unirt.devices.nvidia import Gpu, _nvml_failure, cuda_order, nvidia_summary, read_gpus
from unirt.types import Device

GIB = 1 << 30

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads what only Linux has")


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def cpu_of(
    root: Path, affinity: set[int], machine: str = "x86_64", limit: int | None = None
) -> Device:
    return linux_cpu(root, architecture=machine, affinity=affinity, address_space=limit, environ={})


XEON = "".join(
    f"processor\t: {cpu}\nvendor_id\t: GenuineIntel\n"
    "model name\t: Intel(R) Xeon(R) Platinum  8480+\n"
    "flags\t\t: fpu sse4_1 avx avx2 fma f16c avx512f avx512_vnni avx_vnni avx512_bf16 "
    "avx512_fp16 amx_bf16 amx_tile amx_int8 sse4_2\n\n"
    for cpu in range(4)
)
MEMORY = "MemTotal:       16777216 kB\nMemFree:  1000 kB\nMemAvailable:   12582912 kB\n"


def two_hyperthreaded_cores() -> dict[str, str]:
    topology = "sys/devices/system/cpu/cpu{}/topology/core_cpus_list"
    return {
        "proc/cpuinfo": XEON,
        "proc/meminfo": MEMORY,
        "sys/devices/system/cpu/online": "0-3\n",
        "sys/devices/system/node/online": "0-1\n",
        topology.format(0): "0,2\n",
        topology.format(1): "1,3\n",
        topology.format(2): "0,2\n",
        topology.format(3): "1,3\n",
    }


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


# --- the processor -------------------------------------------------------------------------------


def test_x86_server(tmp_path: Path) -> None:
    cpu = cpu_of(write(tmp_path, two_hyperthreaded_cores()), {0, 1, 2, 3})
    assert (cpu.kind, cpu.index, cpu.name) == ("cpu", None, "Intel(R) Xeon(R) Platinum 8480+")
    assert cpu.memory_bytes == 16 * GIB
    assert cpu.facts == {
        "architecture": "x86_64",
        "instruction_sets": (
            "amx_bf16",
            "amx_int8",
            "amx_tile",
            "avx",
            "avx2",
            "avx512_bf16",
            "avx512_fp16",
            "avx512_vnni",
            "avx512f",
            "avx_vnni",
            "f16c",
            "fma",
            "sse4_1",
        ),
        "physical_cores": 2,
        "logical_cores": 4,
        "usable_physical_cores": 2,
        "usable_logical_cores": 4,
        "cpu_quota": None,
        "usable_cpus": 2,
        "available_memory_bytes": 12 * GIB,
        "memory_limited_by": None,
        "numa_nodes": 2,
        "container": False,
    }
    assert json.loads(json.dumps(cpu.facts))["usable_cpus"] == 2


@pytest.mark.parametrize(
    ("affinity", "logical", "physical"),
    [({0, 2}, 2, 1), ({0, 1}, 2, 2), ({3}, 1, 1), ({0, 1, 2}, 3, 2)],
)
def test_affinity_counts_cores_not_hyperthreads(
    tmp_path: Path, affinity: set[int], logical: int, physical: int
) -> None:
    facts = cpu_of(write(tmp_path, two_hyperthreaded_cores()), affinity).facts
    assert facts["usable_logical_cores"] == logical
    assert facts["usable_physical_cores"] == facts["usable_cpus"] == physical
    assert (facts["logical_cores"], facts["physical_cores"]) == (4, 2)


def test_cores_from_cpuinfo_where_sysfs_is_hidden(tmp_path: Path) -> None:
    block = "processor : {}\nphysical id : {}\ncore id : {}\nmodel name : unknown\n\n"
    cpuinfo = "".join(block.format(cpu, cpu // 4, cpu // 2 % 2) for cpu in range(8))
    cpu = cpu_of(write(tmp_path, {"proc/cpuinfo": cpuinfo}), {0, 1, 4}, "x86_64")
    assert cpu.name == "x86_64"
    assert (cpu.facts["physical_cores"], cpu.facts["logical_cores"]) == (4, 8)
    assert cpu.facts["usable_physical_cores"] == 2


ARM_FLAGS = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm asimddp"


def arm(*parts: tuple[str, str], flags: str = ARM_FLAGS) -> str:
    return "".join(
        f"processor\t: {cpu}\nBogoMIPS\t: 108.00\nFeatures\t: {flags}\n"
        f"CPU implementer\t: {vendor}\nCPU architecture: 8\nCPU part\t: {part}\n\n"
        for cpu, (vendor, part) in enumerate(parts)
    )


@pytest.mark.parametrize(
    ("cpuinfo", "name", "sets"),
    [
        (arm(*[("0x41", "0xd0b")] * 4), "Arm Cortex-A76", ("dotprod", "fp16", "neon")),
        (
            arm(("0x41", "0xd05"), ("0x41", "0xd05"), ("0x41", "0xd0b")),
            "Arm Cortex-A55 + Cortex-A76",
            ("dotprod", "fp16", "neon"),
        ),
        (
            arm(("0x41", "0xd4f"), flags=f"{ARM_FLAGS} sve sve2 i8mm bf16"),
            "Arm Neoverse-V2",
            ("bf16", "dotprod", "fp16", "i8mm", "neon", "sve", "sve2"),
        ),
        (arm(("0x61", "0x022"), flags="fp asimd sme"), "Apple part 0x022", ("neon", "sme")),
        (arm(("0x99", "0x001"), flags="fp asimd"), "implementer 0x99 part 0x001", ("neon",)),
        (
            "processor\t: 0\nmodel name\t: ARMv7 Processor rev 4 (v7l)\n"
            "Features\t: half thumb neon vfpv4\nCPU implementer\t: 0x41\nCPU part\t: 0xd03\n\n"
            "Hardware\t: BCM2835\n",
            "Arm Cortex-A53",
            ("neon",),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "aarch64", ("neon",)),
        ("", "aarch64", ()),
    ],
)
def test_arm(tmp_path: Path, cpuinfo: str, name: str, sets: tuple[str, ...]) -> None:
    cpu = cpu_of(write(tmp_path, {"proc/cpuinfo": cpuinfo}), {0}, "aarch64")
    assert cpu.name == name
    assert cpu.facts["instruction_sets"] == sets


def test_macos() -> None:
    apple = macos_processor(
        "machdep.cpu.brand_string: Apple M2 Pro\nmachdep.cpu.core_count: 12\n"
        "hw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_I8MM: 1\n"
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_FP16: 1\n"
        "hw.optional.arm.FEAT_SME: 0\nhw.optional.AdvSIMD: 1\nhw.optional.neon: 1\n",
        physical_cores=12,
        logical_cores=12,
    )
    assert apple.name == "Apple M2 Pro"
    assert apple.instruction_sets == ("bf16", "dotprod", "fp16", "i8mm", "neon")
    intel = macos_processor(
        "machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz\n"
        "machdep.cpu.features: FPU SSE4.1 AVX1.0 FMA F16C\n"
        "machdep.cpu.leaf7_features: AVX2 BMI1\nhw.optional.avx512f: 0\n",
        physical_cores=6,
        logical_cores=12,
    )
    assert intel.instruction_sets == ("avx", "avx2", "f16c", "fma", "sse4_1")


def test_cpu_list() -> None:
    assert cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    for text in ("", "\n", "(null)", "-1", "1,", "a-b"):
        assert cpu_list(text) == frozenset()


# --- limits --------------------------------------------------------------------------------------


def test_cgroup_v2_takes_the_tightest_of_nested_limits(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/app.slice/job.scope"
    root = write(
        tmp_path,
        {
            **two_hyperthreaded_cores(),
            "proc/self/cgroup": "0::/app.slice/job.scope\n",
            "proc/self/mountinfo": V2_MOUNT,
            f"{group}/memory.max": f"{8 * GIB}\n",
            f"{group}/memory.current": f"{GIB}\n",
            f"{group}/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
            f"{group}/cpu.max": "max 100000\n",
            "sys/fs/cgroup/app.slice/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/app.slice/memory.current": f"{GIB + GIB // 2}\n",
            "sys/fs/cgroup/app.slice/memory.stat": "inactive_file 0\n",
            "sys/fs/cgroup/app.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/app.slice/cpuset.cpus.effective": "0,2-3\n",
            "sys/fs/cgroup/cpuset.cpus.effective": "0-3\n",
        },
    )
    limits = cgroup_limits(root)
    assert limits.memory_bytes == 2 * GIB
    assert limits.memory_headroom_bytes == GIB // 2
    assert limits.cpu_quota == 1.5
    assert limits.cpuset == frozenset({0, 2, 3})
    cpu = cpu_of(root, {0, 1, 2, 3})
    assert cpu.memory_bytes == 2 * GIB
    assert cpu.facts["memory_limited_by"] == "cgroup"
    assert cpu.facts["available_memory_bytes"] == GIB // 2
    assert cpu.facts["usable_logical_cores"] == 3
    assert cpu.facts["usable_physical_cores"] == 2
    assert cpu.facts["usable_cpus"] == 2
    assert cpu.facts["container"] is True


@pytest.mark.parametrize(("quota", "usable"), [("10000", 1), ("100000", 1), ("110000", 2)])
def test_quota_bounds_the_thread_default(tmp_path: Path, quota: str, usable: int) -> None:
    root = write(
        tmp_path,
        {
            **two_hyperthreaded_cores(),
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": f"{quota} 100000\n",
        },
    )
    facts = cpu_of(root, {0, 1, 2, 3}).facts
    assert facts["cpu_quota"] == int(quota) / 100000
    assert facts["usable_cpus"] == usable


def v1_mount(controllers: str, top: str, folder: str) -> str:
    return f"32 31 0:29 {top} {folder} ro,relatime - cgroup cgroup rw,{controllers}\n"


def test_cgroup_v1_in_a_container_without_a_cgroup_namespace(tmp_path: Path) -> None:
    memory, cpu = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu,cpuacct"
    root = write(
        tmp_path,
        {
            **two_hyperthreaded_cores(),
            "proc/self/cgroup": "9:cpuset:/docker/ab\n4:cpu,cpuacct:/docker/ab\n"
            "3:memory:/docker/ab/job\n1:name=systemd:/docker/ab\n",
            "proc/self/mountinfo": v1_mount("memory", "/docker/ab", f"/{memory}")
            + v1_mount("cpu,cpuacct", "/docker/ab", f"/{cpu}")
            + v1_mount("cpuset", "/docker/ab", "/sys/fs/cgroup/cpuset"),
            f"{memory}/job/memory.limit_in_bytes": "9223372036854771712\n",
            f"{memory}/memory.limit_in_bytes": f"{4 * GIB}\n",
            f"{memory}/memory.usage_in_bytes": f"{3 * GIB}\n",
            f"{memory}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
            f"{cpu}/cpu.cfs_quota_us": "50000\n",
            f"{cpu}/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpuset/cpuset.cpus": "1,3\n",
        },
    )
    limits = cgroup_limits(root)
    assert limits.memory_bytes == 4 * GIB
    assert limits.memory_headroom_bytes == 2 * GIB
    assert limits.cpu_quota == 0.5
    assert limits.cpuset == frozenset({1, 3})
    facts = cpu_of(root, {0, 1}).facts
    assert facts["usable_logical_cores"] == facts["usable_cpus"] == 1
    assert in_container(root, {})


def test_cgroup_v1_without_limits(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **two_hyperthreaded_cores(),
            "proc/self/cgroup": "4:memory:/\n1:cpu,cpuacct:/\n0::/\n",
            "proc/self/mountinfo": v1_mount("memory", "/", "/sys/fs/cgroup/memory")
            + v1_mount("cpu,cpuacct", "/", "/sys/fs/cgroup/cpu,cpuacct"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cgroup_limits(root) == CgroupLimits()
    assert cpu_of(root, {0}).facts["container"] is False


def test_cgroup_paths_that_need_care(tmp_path: Path) -> None:
    """Colons in a path, an escaped mount point, a second mount that does not show us."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kubepods.slice:cri-containerd:12ab\n",
            "proc/self/mountinfo": V2_MOUNT.replace("0:26 / /sys", "0:26 /other /elsewhere/sys")
            + V2_MOUNT.replace("/sys/fs/cgroup", r"/my\040groups"),
            "my groups/kubepods.slice:cri-containerd:12ab/memory.max": f"{GIB}\n",
            "elsewhere/sys/fs/cgroup/memory.max": "4096\n",
        },
    )
    assert cgroup_limits(root).memory_bytes == GIB
    # In a namespace whose top lies below: only what is mounted can be read.
    write(root, {"proc/self/cgroup": "0::/../sibling\n", "proc/self/mountinfo": V2_MOUNT})
    write(root, {"sys/fs/cgroup/memory.max": f"{3 * GIB}\n"})
    assert cgroup_limits(root).memory_bytes == 3 * GIB


def test_cpuset_that_contradicts_the_affinity_is_not_believed(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **two_hyperthreaded_cores(),
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpuset.cpus.effective": "64-127\n",
        },
    )
    assert cpu_of(root, {0, 1}).facts["usable_logical_cores"] == 2


def test_address_space_limit(tmp_path: Path) -> None:
    root = write(tmp_path, {**two_hyperthreaded_cores(), "proc/self/statm": "262144 1 1 1 0 1 0\n"})
    cpu = cpu_of(root, {0}, limit=3 * GIB)
    assert cpu.memory_bytes == 3 * GIB
    assert cpu.facts["memory_limited_by"] == "RLIMIT_AS"
    assert cpu.facts["available_memory_bytes"] == 2 * GIB
    assert cpu_of(root, {0}, limit=64 * GIB).memory_bytes == 16 * GIB


@pytest.mark.parametrize("environ", [{"container": "podman"}, {"KUBERNETES_SERVICE_HOST": "::1"}])
def test_container_by_environment(tmp_path: Path, environ: dict[str, str]) -> None:
    assert in_container(tmp_path, environ)
    assert not in_container(tmp_path, {})


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    cpu = cpu_of(tmp_path, {0, 1}, "riscv64")
    assert (cpu.name, cpu.memory_bytes) == ("riscv64", None)
    assert cpu.facts["usable_cpus"] == 1
    assert cpu.facts["available_memory_bytes"] is None


def test_damaged_files_cost_facts_not_the_device(tmp_path: Path) -> None:
    whole = {
        **two_hyperthreaded_cores(),
        "proc/self/cgroup": "4:memory:/docker/ab\n0::/a:b\n",
        "proc/self/mountinfo": V2_MOUNT + v1_mount("memory", "/docker", "/sys/fs/cgroup/memory"),
        "proc/self/statm": "262144 1 1 1 0 1 0\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n",
    }
    chance = random.Random(0)
    for attempt in range(400):
        damaged = dict(whole)
        for name in chance.sample(sorted(whole), 3):
            text = damaged[name][: chance.randrange(len(damaged[name]) + 1)]
            for _ in range(chance.randrange(4)):
                place = chance.randrange(len(text) + 1)
                text = text[:place] + chance.choice("\0\n: -9²/,\\x") + text[place + 1 :]
            damaged[name] = text
        cpu = cpu_of(write(tmp_path / str(attempt), damaged), {0, 1}, limit=GIB)
        assert cpu.kind == "cpu"
        assert cpu.facts["usable_cpus"] >= 1


# --- this machine --------------------------------------------------------------------------------


def test_this_machine() -> None:
    cpu, *others = host_devices()
    facts = cpu.facts
    assert (cpu.kind, cpu.index) == ("cpu", None)
    assert cpu.name
    assert [str(device) for device in others] == [f"cuda:{index}" for index in range(len(others))]
    assert facts["logical_cores"] == psutil.cpu_count()
    assert facts["physical_cores"] == (psutil.cpu_count(logical=False) or psutil.cpu_count())
    assert cpu.memory_bytes is not None
    assert 0 < cpu.memory_bytes <= psutil.virtual_memory().total
    assert 0 < facts["available_memory_bytes"] <= psutil.virtual_memory().total
    assert 1 <= facts["usable_cpus"] <= facts["usable_physical_cores"]
    assert facts["usable_physical_cores"] <= facts["usable_logical_cores"]
    json.dumps([dict(device.facts) for device in (cpu, *others)])
    if sys.platform == "linux":
        assert facts["usable_logical_cores"] <= len(os.sched_getaffinity(0))


def test_the_cpu_is_read_in_50_ms() -> None:
    seconds = []
    for _ in range(3):
        linux_processor.cache_clear()
        begin = time.perf_counter()
        cpu_module.device()
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.05


def child(program: str, **environ: str) -> Any:
    source = Path(__file__).parents[1]
    path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout)


REPORT = """
import json
from unirt.devices import host_devices
cpu = host_devices()[0]
print(json.dumps([cpu.memory_bytes, dict(cpu.facts)]))
"""


@linux_only
def test_affinity_is_respected_and_fresh() -> None:
    one = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, [{one}])\n{REPORT}"
    _, facts = child(program)
    assert facts["usable_logical_cores"] == facts["usable_cpus"] == 1
    assert facts["logical_cores"] == psutil.cpu_count()
    read_before = f"from unirt.devices import host_devices; host_devices()\n{program}"
    assert child(read_before)[1]["usable_logical_cores"] == 1


@linux_only
def test_address_space_limit_of_a_process() -> None:
    limit = 6 * GIB
    program = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
    memory, facts = child(program + REPORT)
    unlimited = cpu_module.device().memory_bytes
    assert unlimited is not None
    assert memory == min(limit, unlimited)
    if unlimited > limit:
        assert facts["memory_limited_by"] == "RLIMIT_AS"
        assert facts["available_memory_bytes"] < limit


def test_nothing_heavy_is_imported_until_asked() -> None:
    program = "import unirt.devices.cpu, unirt.devices.nvidia\n"
    program += "import json, sys\nprint(json.dumps(list(sys.modules)))"
    assert not {"psutil", "pynvml"} & set(child(program))


def test_an_unforeseen_failure_leaves_a_usable_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise ValueError("never seen before")

    monkeypatch.setattr(cpu_module, "_address_space", fail)
    cpu = host_devices()[0]
    assert cpu.facts["usable_cpus"] >= 1
    assert "only its cores are known" in caplog.text


# --- NVIDIA --------------------------------------------------------------------------------------


def gpu(letter: str, **more: Any) -> Gpu:
    return Gpu(f"GPU {letter}", uuid=f"GPU-{letter * 4}-{letter}", **more)


A, B, C = (gpu(letter) for letter in "abc")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [A, B, C]),
        ("", []),
        ("0", [A]),
        ("2,0", [C, A]),
        (" 2, 0", [C, A]),
        ("1gpu,2", [B, C]),
        ("0,7,1", [A]),
        ("-1", []),
        ("1,-1,0", [B]),
        ("0,0", []),
        ("NoDevFiles", []),
        ("GPU-bbbb-b", [B]),
        ("GPU-c,GPU-a", [C, A]),
        ("GPU-c,GPU-x,GPU-a", [C]),
        ("GPU-", []),
        ("GPU-a,GPU-aaaa", []),
        ("-0", [A]),
        ("GPU-BBBB", [B]),
        ("GPU-cccc-cx", [C]),
        ("GPU-c, GPU-c", [C]),
        ("0,GPU-b", [A]),
        ("99999999999999999999", []),
    ],
)
def test_cuda_visible_devices(visible: str | None, expected: list[Gpu]) -> None:
    """As `cuDeviceGetCount` of driver 580.159.04 did with such values on an H200."""
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert cuda_order([A, B, C], environ) == expected


def test_order_of_unlike_gpus() -> None:
    slow = gpu("a", speed=1, facts={"pci_bus_id": "00000000:01:00.0"})
    fast = gpu("b", speed=9, facts={"pci_bus_id": "00000000:65:00.0"})
    assert cuda_order([slow, fast], {}) == [fast, slow]
    assert cuda_order([slow, fast], {"CUDA_VISIBLE_DEVICES": "0"}) == [fast]
    by_bus = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert cuda_order([fast, slow], by_bus) == [slow, fast]
    assert cuda_order([fast, slow], {**by_bus, "CUDA_VISIBLE_DEVICES": "1"}) == [fast]
    notes = nvidia_summary("580.1", [slow, fast], [fast, slow], [], {})
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in notes
    assert "ORDER" not in nvidia_summary("580.1", [slow, fast], [slow, fast], [], by_bus)


def test_mig_shows_one_instance() -> None:
    first, second = (Gpu("1g", uuid=f"MIG-{n}", is_instance=True) for n in "12")
    split = gpu("d", is_split=True, instances=(first, second))
    assert cuda_order([A, split], {}) == [first]
    assert cuda_order([A, split], {"CUDA_VISIBLE_DEVICES": "MIG-2"}) == [second]
    assert cuda_order([A, split], {"CUDA_VISIBLE_DEVICES": "0"}) == [A]
    assert cuda_order([gpu("e", is_split=True)], {}) == []


class RecordedNVML:
    """Answers from a record; whatever is not in it is refused, as a container may do."""

    NVMLError = pynvml.NVMLError

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: object) -> Any:
            if name not in self.answers:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
            recorded = self.answers[name]
            if isinstance(recorded, Exception):
                raise recorded
            return recorded

        return answer


H200 = {
    "nvmlSystemGetDriverVersion": "580.159.04",
    "nvmlSystemGetCudaDriverVersion_v2": 13000,
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": "handle",
    "nvmlDeviceGetName": "NVIDIA H200",
    "nvmlDeviceGetUUID": "GPU-0123",
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetNumGpuCores": 16896,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=150754820096, free=150109880320),
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:00:06.0"),
    "nvmlDeviceGetMigMode": (0, 0),
}


def test_recorded_h200() -> None:
    (only,), refused = read_gpus(RecordedNVML(H200))
    assert refused == []
    assert (only.name, only.memory_bytes) == ("NVIDIA H200", 150754820096)
    assert only.facts == {
        "driver": "580.159.04",
        "cuda_driver_version": "13.0",
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "pci_bus_id": "00000000:00:06.0",
        "uuid": "GPU-0123",
        "available_memory_bytes": 150109880320,
        "mig": False,
    }


@pytest.mark.parametrize(
    "lost",
    sorted(set(H200) - {"nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"}),
)
def test_a_refused_field_never_loses_the_gpu(lost: str) -> None:
    answers = {name: answer for name, answer in H200.items() if name != lost}
    (only,), _ = read_gpus(RecordedNVML(answers))
    assert cuda_order([only], {}) == [only]
    json.dumps(only.facts)


def test_recorded_mig() -> None:
    answers = {
        **H200,
        "nvmlDeviceGetMigMode": (1, 1),
        "nvmlDeviceGetMaxMigDeviceCount": 1,
        "nvmlDeviceGetMigDeviceHandleByIndex": "instance",
        "nvmlDeviceGetAttributes_v2": SimpleNamespace(multiprocessorCount=16),
    }
    gpus, _ = read_gpus(RecordedNVML(answers))
    (shown,) = cuda_order(gpus, {})
    assert (shown.facts["mig"], shown.facts["multiprocessors"]) == (True, 16)
    assert shown.facts["compute_capability"] == "9.0"


def test_a_gpu_that_cannot_be_opened_is_told() -> None:
    lost = {**H200, "nvmlDeviceGetHandleByIndex": pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)}
    gpus, refused = read_gpus(RecordedNVML(lost))
    assert gpus == []
    assert nvidia_summary("580.1", gpus, [], refused, {}).startswith(
        "driver 580.1, 0 GPUs; GPU 0: "
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "driver not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "reboot"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "Insufficient Permissions"),
    ],
)
def test_status_says_why_there_is_no_gpu(code: int, said: str) -> None:
    assert said in _nvml_failure(pynvml, pynvml.NVMLError(code))


def test_status_without_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvidia_status() == "nvidia-ml-py is missing: python -m pip install nvidia-ml-py"
    assert len(host_devices()) == 1


def test_status_agrees_with_the_devices() -> None:
    status = nvidia_status()
    gpus = host_devices()[1:]
    assert "\n" not in status
    if gpus:
        assert status.startswith(f"driver {gpus[0].facts['driver']}, ")
    elif not status.startswith("driver"):
        assert "NVIDIA driver" in status


def test_hidden_gpus_are_not_listed() -> None:
    program = (
        "import json; from unirt.devices import host_devices, nvidia_status\n"
        "print(json.dumps([nvidia_status(), [str(device) for device in host_devices()]]))"
    )
    status, listed = child(program, CUDA_VISIBLE_DEVICES="")
    assert listed == ["cpu"]
    assert "CUDA_VISIBLE_DEVICES=''" in status or not status.startswith("driver")

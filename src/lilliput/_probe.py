"""Measuring the machine this runs on: bandwidth per cache level, peaks per type, disk; torch only, some ten seconds.

Each rate is the best of repeated tries, since a limit is what the machine can do when nothing disturbs it. What
torch's kernels do not reach is not seen: the figures are limits of this software stack, L1 is left out.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from lilliput.cache import folder

MIB = 2**20
BUFFERS_MIB = (1, 4, 16, 64, 512)
MATRIX = 1024
QUIET = 0.3  # cores busy with other work up to which a measurement counts
DISK_MIB = 64
X86 = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_vpopcntdq", "amx_bf16", "amx_int8")
ARM = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")


def probe() -> dict[str, Any]:
    """The facts of this machine as `Device.from_dict` takes them; `source["load"]` tells how busy others kept it."""
    load = busy_cores()
    cores, caches = core_count(), cache_sizes()
    one, every = by_level(bandwidth_table(1), caches), by_level(bandwidth_table(cores), caches)
    measured = {
        "bandwidth_gbps": {level: (one[level], max(one[level], every[level])) for level in one},
        "peak_gops": peak_gops(cores),
        "disk_read_mbps": disk_read_mbps(folder("device")),
    }
    told = {"cores": cores, "caches_bytes": caches, "memory_bytes": psutil.virtual_memory().total}
    assumed = {"idle_w": 1.0 * cores, "energy_per_byte_j": 160e-12, "energy_per_op_j": 25e-12}
    source = dict.fromkeys(told, "operating system") | _sources() | {"device": cpu_model(), "load": load_note(load)}
    return {"name": "here", "isa": instruction_sets(), "measured": True, "source": source} | told | measured | assumed


def _sources() -> dict[str, str]:
    used = f"torch {torch_version()}"
    return {
        "bandwidth_gbps": f"measured: best of sum, amax and dot over float32 buffers of 1 to 512 MiB, {used}",
        "peak_gops": f"measured: matrix product of {MATRIX} x {MATRIX}, {used}",
        "disk_read_mbps": f"measured: a file of {DISK_MIB} MiB in the cache folder, its pages dropped first",
        "idle_w": "assumed: 1 W a core, not measured",
        "energy_per_byte_j": "derived: 640 pJ for 32 bits from DRAM at 45 nm (Horowitz, ISSCC 2014)",
        "energy_per_op_j": "assumed: as the laptop's, 11 W at its fp32 peak, not measured",
    }


def load_note(load: float) -> str:
    """How busy other processes kept the machine; begins with "busy" when that makes the figures doubtful."""
    return f"{'busy' if load > QUIET else 'quiet'}: other processes used {load:.2f} cores when the probe began"


def busy_cores(seconds: float = 0.5) -> float:
    """Cores that other processes kept busy during the next `seconds` (time stolen by other machines included)."""
    process, start = psutil.Process(), time.perf_counter()
    total, own = _busy_seconds(), sum(process.cpu_times()[:2])
    time.sleep(seconds)
    others = (_busy_seconds() - total) - (sum(process.cpu_times()[:2]) - own)
    return max(0.0, others / (time.perf_counter() - start))


def _busy_seconds() -> float:
    times = psutil.cpu_times()._asdict()
    return sum(times.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))


# --- what the operating system knows ---------------------------------------------------------------------------


def torch_version() -> str:
    return str(torch.__version__)


def core_count() -> int:
    """Physical cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""


def cpu_model() -> str:
    """The processor's name, with family and stepping where Linux tells them."""
    facts = dict(re.findall(r"^([\w ]+?)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE))
    told = [facts[key] for key in ("model name", "CPU part") if key in facts]
    told += [f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts]
    return ", ".join(told) or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """The vector extensions that matter to a network, as Linux names them."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [name for name in X86 + ARM if name in flags]


def cache_sizes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """{"L1d", "L2", "L3"} in bytes as the first core sees them; empty where Linux does not tell."""
    sizes = {}
    for index in sorted(root.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        match = re.fullmatch(r"(\d+)([KM]?)", size)
        if kind != "Instruction" and match:
            sizes["L1d" if level == "1" else f"L{level}"] = int(match[1]) * {"": 1, "K": 2**10, "M": MIB}[match[2]]
    return {level: size for level, size in sizes.items() if level in ("L1d", "L2", "L3") and size > 0}


# --- what has to be measured -----------------------------------------------------------------------------------


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch's thread count for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_seconds(run: Callable[[], Any], spend_seconds: float) -> float:
    """The shortest of the runs that fit into `spend_seconds`, after one to warm up; at least two."""
    run()
    best, tries, end = float("inf"), 0, time.perf_counter() + spend_seconds
    while tries < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best, tries = min(best, time.perf_counter() - start), tries + 1
    return best


def bandwidth_table(
    threads: int, buffers_mib: tuple[int, ...] = BUFFERS_MIB, spend_seconds: float = 0.1
) -> dict[int, float]:
    """Bytes of a float32 buffer -> GB/s of reading it again and again, the best of sum, amax and dot."""
    room = psutil.virtual_memory().available // 4
    table = {}
    with torch_threads(threads), torch.inference_mode():
        for size in (mib * MIB for mib in buffers_mib if mib * MIB <= room or mib == min(buffers_mib)):
            x = torch.ones(size // 4)
            readers = (lambda x=x: x.sum(), lambda x=x: x.amax(), lambda x=x: x.dot(x))
            table[size] = size / min(best_seconds(r, spend_seconds) for r in readers) / 1e9
    return table


def by_level(table: dict[int, float], caches: dict[str, int]) -> dict[str, float]:
    """GB/s per level: the best buffer that fits into it but not into a smaller one; memory: the largest buffer."""
    rates, below = {"memory": table[max(table)]}, 0
    for level in ("L1d", "L2", "L3"):
        inside = [rate for size, rate in table.items() if below < size <= caches.get(level, 0)]
        if inside:
            rates[level] = max(*inside, rates["memory"])
        below = max(below, caches.get(level, 0))
    return rates


def peak_gops(threads: int, n: int = MATRIX, spend_seconds: float = 0.5) -> dict[str, float]:
    """Type -> 1e9 operations a second of an (n, n) matrix product; a type torch cannot multiply is left out."""
    peaks = {}
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    with torch_threads(threads), torch.inference_mode():
        for name, dtype in kinds.items():
            a = torch.ones(n, n, dtype=dtype)
            multiply = torch._int_mm if name == "int8" else torch.mm
            with contextlib.suppress(RuntimeError):
                peaks[name] = (
                    2 * n**3 / best_seconds(lambda a=a, multiply=multiply: multiply(a, a), spend_seconds) / 1e9
                )
    return peaks


def disk_read_mbps(where: Path, size_mib: int = DISK_MIB) -> float | None:
    """1e6 bytes a second of reading a new file whose pages were dropped; None where pages cannot be dropped."""
    if not hasattr(os, "posix_fadvise"):
        return None
    block = os.urandom(MIB)
    with tempfile.NamedTemporaryFile(dir=where, buffering=0) as file:
        for _ in range(size_mib):
            file.write(block)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(MIB):
            pass
        return size_mib * MIB / (time.perf_counter() - start) / 1e6

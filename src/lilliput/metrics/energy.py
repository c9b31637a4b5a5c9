"""Energy of a run: from the processor's own counters (RAPL) where they can be read, else modelled from a device.

Modelled: E = idle power x time + bytes x energy a byte + operations x energy an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from lilliput.device import Device
from lilliput.errors import UserError

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Joules of one run; `modelled` when no counter could be read."""

    joules: float
    modelled: bool
    source: str
    runs: int = 0

    def __str__(self) -> str:
        return f"{self.joules:.3g} J" + (" (modelled)" if self.modelled else "")


class Rapl:
    """The energy counters of Linux's powercap folder: all packages, and the DRAM domains beside them.

    A counter wraps around at `max_energy_range_uj`; `joules_since_last` must be called at least once a wrap (minutes).
    """

    def __init__(self, folder: Path = POWERCAP):
        self._ranges = {domain: wrap for domain in _domains(folder) if (wrap := _read(domain / "max_energy_range_uj"))}
        self._last = self._now()

    @property
    def readable(self) -> bool:
        """Whether at least one package can be read (often the superuser alone may)."""
        return any(_is_package(domain) for domain in self._last)

    def joules_since_last(self) -> float:
        """Joules since the last call, or since this object was made."""
        now, last = self._now(), self._last
        self._last = now
        both = now.keys() & last.keys()
        return sum((now[d] - last[d]) % (self._ranges[d] + 1) for d in both) * 1e-6

    def _now(self) -> dict[Path, int]:
        values = {domain: _read(domain / "energy_uj") for domain in self._ranges}
        return {domain: value for domain, value in values.items() if value is not None}


def _domains(folder: Path) -> list[Path]:
    """Packages and DRAM; cores and graphics are inside a package, "psys" and the mmio copies would count twice."""
    found = sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []
    return [domain for domain in found if _is_package(domain) or _name(domain) == "dram"]


def _name(domain: Path) -> str:
    try:
        return (domain / "name").read_text().strip()
    except OSError:
        return ""


def _is_package(domain: Path) -> bool:
    return _name(domain).startswith("package")


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def measure(
    run: Callable[[], Any],
    device: Device,
    bytes: float,
    ops: float,
    *,
    min_runs: int = 20,
    min_seconds: float = 1.0,
    folder: Path = POWERCAP,
) -> Energy:
    """Joules of one `run`: counted, where `device` is this machine and its counters can be read, else modelled.

    `bytes` moved and `ops` done by one run are used by the model alone. The counters see the whole machine.
    """
    if min_runs < 1:
        raise UserError(f"min_runs is {min_runs}; give at least 1")
    run()
    rapl, runs, joules, start = Rapl(folder), 0, 0.0, perf_counter()
    while runs < min_runs or perf_counter() < start + min_seconds:
        run()
        runs += 1
        joules += rapl.joules_since_last()
    if rapl.readable and device.measured:
        return Energy(joules / runs, False, "RAPL, packages and DRAM", runs)
    return model(device, (perf_counter() - start) / runs, bytes, ops)


def model(device: Device, seconds: float, bytes: float, ops: float) -> Energy:
    """Modelled joules of a run of `seconds` on `device` that moves `bytes` and does `ops` operations."""
    if not (seconds >= 0 and bytes >= 0 and ops >= 0):
        raise UserError(f"seconds, bytes and ops must not be negative; they are {seconds}, {bytes} and {ops}")
    joules = device.idle_w * seconds + bytes * device.energy_per_byte_j + ops * device.energy_per_op_j
    return Energy(joules, True, f"facts of the device {device.name}")

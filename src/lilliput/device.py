"""A device: the facts of a machine that bound how fast and how frugal a model can be on it.

`Device.here()` measures this machine once and keeps the result in the cache folder; `Device.load(name)` reads
`devices/<name>.toml`. Every figure carries its source. What is computed from a device is modelled, not measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.cache import folder, write_atomically
from lilliput.errors import UserError

LEVELS = ("L1d", "L2", "L3", "memory")  # from small and fast to large and slow
STAND_INS = {"fp16": ("fp32",), "bf16": ("fp32",), "int8": ("fp32",), "int4": ("int8", "fp32")}
SIGNS_PER_BYTE = 8  # "binary" has no figure of its own: a vector of bytes holds eight times as many signs
DTYPES = ("fp32", *STAND_INS, "binary")
_FOLDER = Path(__file__).parent / "devices"
_VERSION = 1  # of the way a machine is probed; a new one makes every machine probe again


@dataclass(frozen=True)
class Device:
    """Facts of a machine. Caches are those of one core, but for a shared L3; `source` tells where a figure is from."""

    name: str
    cores: int
    isa: tuple[str, ...]
    caches_bytes: dict[str, int]  # L1d, L2, L3
    memory_bytes: int
    bandwidth_gbps: dict[
        str, tuple[float, float]
    ]  # level of the working set -> 1e9 bytes/s of (one thread, all threads)
    peak_gops: dict[str, float]  # type -> 1e9 operations/s of all cores; a multiply-add counts two
    disk_read_mbps: float | None
    idle_w: float
    energy_per_byte_j: float
    energy_per_op_j: float
    source: dict[str, str]
    measured: bool = False

    @classmethod
    def here(cls, refresh: bool = False) -> Device:
        """This machine, probed in some ten seconds and kept in the cache folder; `refresh` probes again.

        A probe that other work disturbed is replaced as soon as the machine is found quiet.
        """
        from lilliput import _probe

        identity = [_VERSION, _probe.cpu_model(), _probe.core_count(), _probe.torch_version()]
        path = folder("device") / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.json"
        known = None if refresh else cls._read(path)
        disturbed = known is not None and known.source.get("load", "").startswith("busy")
        if known is not None and not (disturbed and _probe.busy_cores() <= _probe.QUIET):
            return known
        device = cls.from_dict(_probe.probe())
        write_atomically(path, json.dumps(dataclasses.asdict(device), indent=1))
        return device

    @classmethod
    def _read(cls, path: Path) -> Device | None:
        """The device kept in a file, or None when it is missing or damaged: then it is measured again."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (UserError, ValueError, OSError):
            return None

    @classmethod
    def load(cls, name: str) -> Device:
        """The device of `devices/<name>.toml`, or of any TOML file by its path."""
        path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
        if name not in cls.names() and not (name.endswith(".toml") and path.is_file()):
            raise UserError(f"there is no device {name!r}; give a TOML file or one of: {', '.join(cls.names())}")
        try:
            return cls.from_dict(tomllib.loads(path.read_text()))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a TOML file: {error}") from None

    @classmethod
    def names(cls) -> list[str]:
        """Names of the devices that come with the package."""
        return sorted(path.stem for path in _FOLDER.glob("*.toml"))

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Device:
        """A device from plain data. Raises UserError when a fact is missing, unknown or not a sensible number."""
        if not isinstance(facts, dict):
            raise UserError(f"a device is described by a table of facts, not by {type(facts).__name__}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        missing = [n for n, f in fields.items() if n not in facts and f.default is dataclasses.MISSING]
        unknown = sorted(set(facts) - set(fields))
        if missing or unknown:
            raise UserError(f"the facts of a device lack {missing} and hold the unknown {unknown}")
        try:
            _check_kinds(facts)
            device = cls(**facts | {"isa": tuple(facts["isa"]), "bandwidth_gbps": _pairs(facts["bandwidth_gbps"])})
            _check(device)
        except ValueError as error:
            raise UserError(f"the facts of the device {facts.get('name')!r} are wrong: {error}") from None
        return device

    def level(self, working_set_bytes: float) -> str:
        """The smallest cache level with a known bandwidth that holds the working set, else "memory"."""
        for level in LEVELS[:-1]:
            if level in self.bandwidth_gbps and working_set_bytes <= self.caches_bytes.get(level, 0):
                return level
        return "memory"

    def bandwidth(self, working_set_bytes: float, threads: int | None = None) -> float:
        """Bytes a second when a working set of this size is read again and again."""
        one, every = self.bandwidth_gbps[self.level(working_set_bytes)]
        used = self._threads(threads)
        return 1e9 * (every if used == self.cores else min(one * used, max(one, every)))

    def peak(self, dtype: str = "fp32", threads: int | None = None) -> float:
        """Operations a second; a type the machine has no figure for runs as the next wider one it has."""
        if dtype not in DTYPES:
            raise UserError(f"the type is {dtype!r}; choose one of {', '.join(DTYPES)}")
        if dtype == "binary" and dtype not in self.peak_gops:
            return SIGNS_PER_BYTE * self.peak("int8", threads)
        known = next(t for t in (dtype, *STAND_INS.get(dtype, ())) if t in self.peak_gops)
        return 1e9 * self.peak_gops[known] * self._threads(threads) / self.cores

    def roofline_ms(
        self,
        bytes: float,
        ops: float,
        dtype: str = "fp32",
        threads: int | None = None,
        working_set_bytes: float | None = None,
    ) -> float:
        """Modelled lower bound: max(bytes / bandwidth of the working set, ops / peak).

        The working set, if not given, is `bytes`: what a repeated run keeps in the caches.
        """
        if not (bytes >= 0 and ops >= 0):
            raise UserError(f"bytes and ops must not be negative; they are {bytes} and {ops}")
        held = bytes if working_set_bytes is None else working_set_bytes
        return 1e3 * max(bytes / self.bandwidth(held, threads), ops / self.peak(dtype, threads))

    def predict_latency(self, layers: Iterable[tuple[float, float, str]], threads: int | None = None) -> float:
        """Modelled milliseconds of layers (bytes, ops, type) run in turn; together they are the working set."""
        layers = list(layers)
        held = sum(layer[0] for layer in layers)
        return sum(self.roofline_ms(size, ops, dtype, threads, held) for size, ops, dtype in layers)

    def _threads(self, threads: int | None) -> int:
        if threads is not None and threads < 1:
            raise UserError(f"threads is {threads}; give at least 1")
        return self.cores if threads is None else min(threads, self.cores)


def _check_kinds(facts: dict[str, Any]) -> None:
    kinds = dict.fromkeys(("caches_bytes", "bandwidth_gbps", "peak_gops", "source"), (dict, "table"))
    for fact, (kind, what) in (kinds | {"isa": ((list, tuple), "list of names"), "name": (str, "string")}).items():
        if not isinstance(facts[fact], kind):
            raise ValueError(f"{fact} is {facts[fact]!r}, not a {what}")


def _pairs(rates: dict[str, Any]) -> dict[str, tuple[float, float]]:
    for level, pair in rates.items():
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(_is_number(rate) for rate in pair)):
            raise ValueError(f"bandwidth_gbps.{level} is {pair!r}, not two numbers: of one core and of all")
    return {level: (float(one), float(every)) for level, (one, every) in rates.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(device: Device) -> None:
    positive: dict[str, Any] = {"cores": device.cores, "memory_bytes": device.memory_bytes}
    positive |= {f"caches_bytes.{k}": v for k, v in device.caches_bytes.items()}
    positive |= {f"bandwidth_gbps.{k}": min(v) for k, v in device.bandwidth_gbps.items()}
    positive |= {f"peak_gops.{k}": v for k, v in device.peak_gops.items()}
    if device.disk_read_mbps is not None:
        positive["disk_read_mbps"] = device.disk_read_mbps
    for figure, value in positive.items():
        if not (_is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{figure} is {value!r}, not a positive number")
    for figure in ("idle_w", "energy_per_byte_j", "energy_per_op_j"):
        value = getattr(device, figure)
        if not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{figure} is {value!r}, not a number from zero up")
    if "memory" not in device.bandwidth_gbps or "fp32" not in device.peak_gops:
        raise ValueError("bandwidth_gbps.memory and peak_gops.fp32 are needed")
    for level in (set(device.caches_bytes) | set(device.bandwidth_gbps)) - set(LEVELS):
        raise ValueError(f"level {level!r} is unknown; the levels are {', '.join(LEVELS)}")
    for dtype in set(device.peak_gops) - set(DTYPES):
        raise ValueError(f"type {dtype!r} is unknown; the types are {', '.join(DTYPES)}")

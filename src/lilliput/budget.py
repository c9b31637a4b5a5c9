"""A budget: upper limits on latency, memory, size, energy and lost quality, read from strings such as "latency<=20ms".

Everything is kept in base units that the keys name: `latency_ms`, `memory_bytes`, `energy_j`; `drop` is a fraction
(0.01 is one percent worse than the original). `memory<=50%` means half of the original's and needs `resolve`. For an
FPGA there are `luts`, look-up tables, and a latency at a clock: `latency<=1ms@50MHz` is at most 50,000 cycles.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lilliput.errors import UserError

MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
JOULES = {"uJ": 1e-6, "mJ": 1e-3, "J": 1.0}
SHARE = {"%": 0.01}
COUNT = {"": 1.0}
HERTZ = {"kHz": 1e3, "MHz": 1e6, "GHz": 1e9}

QUANTITIES: dict[str, tuple[str, dict[str, float]]] = {
    "latency": ("latency_ms", MILLISECONDS),
    "time_to_first_token": ("first_token_ms", MILLISECONDS),
    "time_per_token": ("token_ms", MILLISECONDS),
    "memory": ("memory_bytes", BYTES),
    "size": ("size_bytes", BYTES),
    "energy": ("energy_j", JOULES),
    "luts": ("luts", COUNT),
    "drop": ("drop", SHARE),
}
NAME_OF_KEY = {key: name for name, (key, _) in QUANTITIES.items()}
DROP = "drop"

_LIMIT = re.compile(
    r"\s*(?P<name>[A-Za-z_]+)\s*(?:<=|<|≤)\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?nan|[+-]?inf)"
    r"\s*(?P<unit>[^\s\d@]*)\s*(?:@\s*(?P<clock>\d+\.?\d*|\.\d+)\s*(?P<hertz>[A-Za-z]*)\s*)?",
    re.ASCII,
)


@dataclass(frozen=True)
class _Limit:
    """One limit as it was written; `value` is in base units, or a fraction of the original's when `relative`."""

    name: str
    number: float
    unit: str
    clock: str = ""  # as it was written, "50MHz"

    @property
    def key(self) -> str:
        return QUANTITIES[self.name][0]

    @property
    def relative(self) -> bool:
        return self.unit == "%" and self.key != DROP

    @property
    def value(self) -> float:
        return self.number * (SHARE | QUANTITIES[self.name][1])[self.unit]

    def __str__(self) -> str:
        number = f"{self.number:.15g}" if self._short() else f"{self.number!r}"
        return f"{self.name}<={number}{self.unit}" + (f"@{self.clock}" if self.clock else "")

    def _short(self) -> bool:
        return float(f"{self.number:.15g}") == self.number


class Budget:
    """Several upper limits at once: `Budget("latency<=20ms", "memory<=80MB, size<=50%", "drop<=1%")`.

    `<` and `<=` mean the same. Raises UserError on anything that is not a limit, an unknown quantity or unit, a limit
    given twice, a limit that nothing can meet, and an empty budget.
    """

    def __init__(self, *texts: str):
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"a budget is made of strings such as 'latency<=20ms', not of {text!r}")
        self._set([_parse(part) for text in texts for part in text.split(",") if part.strip()])

    def _set(self, limits: list[_Limit]) -> None:
        if not limits:
            raise UserError("the budget is empty; give at least one limit, such as 'latency<=20ms'")
        names = [limit.name for limit in limits]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the budget limits {name} more than once; keep one limit for it")
        self._limits = tuple(limits)

    @property
    def limits(self) -> dict[str, float]:
        """Key in base units -> the most it may be. Limits relative to the original are in `relative`."""
        return {limit.key: limit.value for limit in self._limits if not limit.relative}

    @property
    def relative(self) -> dict[str, float]:
        """Key -> the largest allowed fraction of the original's value; empty after `resolve`."""
        return {limit.key: limit.value for limit in self._limits if limit.relative}

    @property
    def clock_hz(self) -> float | None:
        """Cycles a second at which the latency is meant, or None where the budget names no clock."""
        return next((_hertz(limit.clock) for limit in self._limits if limit.clock), None)

    def resolve(self, original: Mapping[str, float]) -> Budget:
        """This budget with every relative limit made absolute. Raises UserError when `original` lacks a figure."""
        resolved = Budget.__new__(Budget)
        resolved._set([_absolute(limit, original) if limit.relative else limit for limit in self._limits])
        return resolved

    def scaled(self, share: float) -> Budget:
        """This budget with every absolute limit but that on quality multiplied by `share`."""
        other = Budget.__new__(Budget)
        other._set([x if x.key == DROP else dataclasses.replace(x, number=x.number * share) for x in self._limits])
        return other

    def raised(self, key: str, extra: float) -> Budget:
        """This budget with `extra`, in base units, added to the absolute limit on `key`."""
        other = Budget.__new__(Budget)
        other._set([_raised(limit, extra) if limit.key == key else limit for limit in self._limits])
        return other

    def slack(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Key -> (limit - measured) / limit: the unused share of each limit, negative when it is broken."""
        return {key: _slack(limit, value) for key, limit, value in self._pairs(measured)}

    def violations(self, measured: Mapping[str, float]) -> list[str]:
        """One sentence for each limit that is broken; NaN breaks a limit."""
        return [_sentence(key, limit, value) for key, limit, value in self._pairs(measured) if not value <= limit]

    def met(self, measured: Mapping[str, float]) -> bool:
        """Whether every limit holds."""
        return not self.violations(measured)

    def _pairs(self, measured: Mapping[str, float]) -> list[tuple[str, float, float]]:
        for key in self.relative:
            raise UserError(f"the limit on {NAME_OF_KEY[key]} is relative; call budget.resolve(original) first")
        for key in self.limits:
            if key not in measured:
                raise UserError(f"the budget limits {NAME_OF_KEY[key]}, but {key!r} was not measured")
        return [(key, limit, measured[key]) for key, limit in self.limits.items()]

    def __str__(self) -> str:
        return ", ".join(map(str, self._limits))

    def __repr__(self) -> str:
        return f"Budget({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[frozenset[tuple[str, float, bool]], float | None]:
        return frozenset((limit.key, limit.value, limit.relative) for limit in self._limits), self.clock_hz


def _parse(text: str) -> _Limit:
    match = _LIMIT.fullmatch(text)
    if not match:
        raise UserError(f"{text.strip()!r} is not a limit; write it as in 'latency<=20ms' or 'memory<=50%'")
    name, number = match["name"], match["number"]
    unit = match["unit"].replace("\N{MICRO SIGN}", "u").replace("\N{GREEK SMALL LETTER MU}", "u")
    if name not in QUANTITIES:
        raise UserError(f"the budget names {name!r}, which is not a quantity; choose one of {', '.join(QUANTITIES)}")
    units = SHARE | QUANTITIES[name][1]
    if unit not in units:
        allowed = ", ".join(u or "no unit" for u in sorted(units, key=lambda u: (u == "%", units[u])))
        raise UserError(f"{text.strip()!r} has the unit {unit!r}; for {name} use one of: {allowed}")
    return _checked(_Limit(name, float(number), unit, _clock(match, text.strip())), text.strip())


def _clock(match: re.Match[str], text: str) -> str:
    """The clock of a latency as it was written, empty where there is none."""
    if match["clock"] is None:
        return ""
    if match["name"] != "latency" or match["unit"] == "%":
        raise UserError(f"{text!r} has a clock; only an absolute latency has one, as in 'latency<=1ms@50MHz'")
    if match["hertz"] not in HERTZ or not 0 < float(match["clock"]) < math.inf:
        raise UserError(f"{text!r} has the clock {match['clock'] + match['hertz']!r}; write it as in 50MHz")
    return match["clock"] + match["hertz"]


def _hertz(clock: str) -> float:
    number = clock.rstrip("kMGHz")
    return float(number) * HERTZ[clock.removeprefix(number)]


def _checked(limit: _Limit, text: str) -> _Limit:
    if not math.isfinite(limit.value):
        raise UserError(f"{text!r} is not a finite limit; give a number")
    if limit.value < 0:
        raise UserError(f"{text!r} is a negative limit; give a positive number")
    if limit.value == 0 and limit.key != DROP:
        raise UserError(f"{text!r} can never be met; give a limit above zero")
    return limit


def _absolute(limit: _Limit, original: Mapping[str, float]) -> _Limit:
    if limit.key not in original:
        raise UserError(f"{str(limit)!r} is relative to the original, but {limit.key!r} of the original is not known")
    base = next(unit for unit, scale in QUANTITIES[limit.name][1].items() if scale == 1)
    return _checked(_Limit(limit.name, limit.value * original[limit.key], base), f"{limit} of the original")


def _raised(limit: _Limit, extra: float) -> _Limit:
    scale = QUANTITIES[limit.name][1][limit.unit]
    return dataclasses.replace(limit, number=limit.number + extra / scale)


def _slack(limit: float, value: float) -> float:
    if limit == 0:
        return 0.0 if value == 0 else math.copysign(math.inf, -value)
    return (limit - value) / limit


def _sentence(key: str, limit: float, value: float) -> str:
    shown, allowed = format_quantity(key, value), format_quantity(key, limit)
    return f"{NAME_OF_KEY[key]} is {shown}, over the limit of {allowed} by {format_quantity(key, value - limit)}"


_SCALES = {"_ms": MILLISECONDS, "_bytes": {u: BYTES[u] for u in ("B", "kB", "MB", "GB")}, "_j": JOULES, DROP: SHARE}


def format_quantity(key: str, value: float) -> str:
    """`value` in base units with the unit a person would choose: "12.3 ms", "81.2 MB", "1.4 %".

    The unit follows from the end of the key (`_ms`, `_bytes`, `_j`, `drop`); any other key gets a bare number.
    """
    scales = next((units for end, units in _SCALES.items() if key.endswith(end)), {"": 1.0})
    fitting = [unit for unit, scale in scales.items() if abs(value) / scale < 999.5]
    unit = next(iter(fitting), list(scales)[-1])
    scaled = value / scales[unit]
    number = f"{scaled:.3g}" if not abs(scaled) >= 999.5 else f"{scaled:.0f}"
    return f"{number} {unit}".strip()

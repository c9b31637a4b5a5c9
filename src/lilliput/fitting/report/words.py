"""The report's words: names of quantities, numbers with units, and what a change amounts to."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from lilliput.budget import NAME_OF_KEY, QUANTITIES, format_quantity

MISSING = "–"
COSTS = ("token_ms", "latency_ms", "first_token_ms", "memory_bytes", "size_bytes", "energy_j")
TIMES = ("token_ms", "latency_ms")


def finite(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def title(key: str) -> str:
    """ "token_ms" -> "time per token"."""
    return NAME_OF_KEY.get(key, key).replace("_", " ")


def show(key: str, value: Any) -> str:
    """A quantity with its unit, a dash when there is none."""
    return format_quantity(key, value) if finite(value) else MISSING


def number(value: Any, digits: int = 4) -> str:
    """A bare number, a dash when there is none."""
    return f"{value:.{digits}g}".replace("-", "−") if finite(value) else MISSING


def percent(value: Any) -> str:
    """A fraction as percent with its sign: "+1.4 %"."""
    if value == 0:
        return "0 %"
    return f"{100 * value:+.3g} %".replace("-", "−") if finite(value) else MISSING


def share(value: Any) -> str:
    """A fraction as percent: "18.2 %"."""
    return f"{100 * value:.3g} %" if finite(value) else MISSING


def seconds(value: float) -> str:
    """ "0.03 s", "47 s" or "6 min 20 s"."""
    if value < 10:
        return f"{value:.2g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def change(key: str, before: Any, after: Any) -> str:
    """What became of a cost: "3.1 times smaller", "12 % faster", "unchanged"."""
    if not (finite(before) and finite(after) and before > 0 and after > 0):
        return ""
    less, more = ("smaller", "larger") if key.endswith("_bytes") else ("faster", "slower")
    if key.endswith("_j"):
        less, more = "less", "more"
    ratio, word = (before / after, less) if after <= before else (after / before, more)
    if ratio < 1.005:
        return "unchanged"
    if ratio >= 1.5:
        return f"{ratio:.3g} times {word}"
    return f"{100 * abs(1 - after / before):.2g} % {word}"


def unit_of(key: str, values: list[float]) -> tuple[float, str]:
    """(scale, unit) in which the largest of `values` reads well."""
    largest = max((abs(v) for v in values if finite(v)), default=0.0)
    unit = format_quantity(key, largest).rpartition(" ")[2]
    scales = QUANTITIES[NAME_OF_KEY[key]][1]
    return (scales[unit], unit) if unit in scales else (1.0, "")


def is_modelled(record: Mapping[str, Any], key: str) -> bool:
    """Whether the figures of this quantity come from a model of the device."""
    if key in record.get("modelled", ()):
        return True
    return key == "energy_j" and any("energy is modelled" in note for note in record["original"].get("notes", ()))


def met(limits: Mapping[str, float], measured: Mapping[str, Any]) -> bool:
    """Whether all limits hold; a missing or undefined figure breaks its limit."""
    return all(finite(measured.get(key)) and measured[key] <= limit for key, limit in limits.items())


def pretty(label: str) -> str:
    """ "-25.0% neurons" -> "−25% neurons"."""
    return re.sub(r"^-(?=\d)", "−", re.sub(r"(\d)\.0%", r"\1%", str(label)))


def plain(text: str) -> str:
    """User text for a chart: plotly reads tags in labels."""
    return html.escape(pretty(text), quote=False)


def higher_is_better(verify: Mapping[str, Any]) -> bool | None:
    """The direction of the metric, from how the drop was counted; None when nothing changed."""
    rise = verify["score_after"]["value"] - verify["score_before"]["value"]
    return None if not (finite(rise) and rise and finite(verify["drop"])) else rise * verify["drop"] < 0

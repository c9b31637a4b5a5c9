"""Writes `report.html` from a run's record: one file with everything in it, to be opened anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lilliput import __version__
from lilliput.cache import write_atomically
from lilliput.fitting.record import summary
from lilliput.fitting.report import charts, sections, words
from lilliput.fitting.report.front import front
from lilliput.fitting.report.heat import heat

HERE = Path(__file__).parent


def write_report(record: dict[str, Any], path: Path) -> None:
    """Render the record as one HTML file."""
    write_atomically(path, render(record))


def render(record: Mapping[str, Any]) -> str:
    """The report as HTML; it needs no network and no other file."""
    from plotly.offline import get_plotlyjs

    figures = _figures(record)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        _sections(record),
        figures=Markup(as_json({name: figure for group in figures.values() for name, figure in group.items()})),
        groups={name: list(group) for name, group in figures.items()},
        style=Markup((HERE / "style.css").read_text()),
        plotly=Markup(get_plotlyjs()) if any(figures.values()) else "",
        version=__version__,
    )


def _figures(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group -> name -> figure. The figures of one group are alternatives in one place, but for the predictors."""
    costs = front(record)
    shown = next((k for k in words.TIMES if k in costs), "size_bytes")
    predicted = {k: charts.predicted(record, k) for k in (shown, "damage")}
    return {
        "front": {f"front-{k}": f for k, f in costs.items()},
        "layers": {f"layers-{k}": f for k, f in charts.layers(record).items()},
        "quality": {"quality": charts.quality(record)},
        "predicted": {f"predicted-{k}": f for k, f in predicted.items() if f},
    }


def _sections(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "record": record,
        "words": words,
        "summary": _summary(record),
        "met": not record["verify"]["violations"],
        "cards": sections.cards(record),
        "speed": sections.speed(record),
        "warnings": sections.warnings(record),
        "heat": heat(record),
        "difference": sections.difference(record),
        "damage": sections.damage(record),
        "classes": sections.classes(record),
        "audits": sections.audits(record),
        "candidates": sections.candidates(record),
        "recovered": sections.recovered(record),
        "serving": sections.serving(record),
        "rivals": sections.recovered_rivals(record),
        "steps": sections.steps(record),
        "facts": sections.facts(record),
        "commands": sections.commands(record),
        "predictors": record.get("predictors") or {},
        "layer_axis": sections.layer_axis(record),
    }


def _summary(record: Mapping[str, Any]) -> str:
    return summary(dict(record)).replace("->", "→").replace("<=", "≤")


def as_json(data: Any) -> str:
    """JSON that can stand inside a script element; numbers that are not finite become null."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(data: Any) -> Any:
    """The same with six significant digits, and None for numbers that are not finite."""
    if isinstance(data, float):
        return float(f"{data:.6g}") if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(k): _finite(v) for k, v in data.items()}
    return [_finite(v) for v in data] if isinstance(data, list | tuple) else data

"""What all charts of the report share: colours, axes, layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Figure = dict[str, Any]
Record = Mapping[str, Any]

INK, MUTED, GRID, BEFORE, AFTER = "#1d2733", "#5d6979", "#e8ebef", "#c6cdd8", "#0f766e"
FONT = {"family": "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13}
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": MUTED, "size": 12}}


def axis(text: str = "") -> dict[str, Any]:
    """A quiet axis that cannot be dragged."""
    return {
        "title": {"text": text, "font": {"color": MUTED, "size": 12}, "standoff": 10},
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": BEFORE,
        "tickfont": {"color": MUTED, "size": 12},
        "automargin": True,
        "fixedrange": True,
    }


def layout(height: int) -> dict[str, Any]:
    """A transparent chart, `height` pixels high."""
    return {
        "height": height,
        "font": FONT | {"color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 20, "r": 16, "t": 30, "b": 20},
        "hoverlabel": {"bgcolor": "white", "bordercolor": BEFORE, "font": FONT | {"color": INK, "size": 12}},
        "hovermode": "closest",
    }


def padded(values: Sequence[float], margin: float) -> list[float]:
    """The range of `values`, widened on both sides by a share of it."""
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) * margin
    return [low - room, high + room]

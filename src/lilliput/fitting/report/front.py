"""The chart of the trade-off: quality drop over one cost, for everything that was searched, built and asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lilliput.fitting.report import words
from lilliput.fitting.report.drawing import AFTER, INK, LEGEND, MUTED, Figure, Record, axis, layout, padded
from lilliput.fitting.report.labels import LETTER, LINE, Box, Label, place

RIVAL, SEARCHED, REGION = "#b45a0a", "rgba(95,112,136,0.30)", "rgba(15,118,110,0.07)"
WIDTH, HEIGHT = 980, 380  # pixels of the plotting area that labels are placed for
KNEE = 0.005  # quality drop at which the wide axis turns from linear to logarithmic
WIDE = 0.05  # a larger drop is shown on that axis, smaller ones on a linear axis
MOST_TICKS = 18  # that have room on an axis
HOPELESS = 10.0  # drop above which a point lies outside the picture, which would show nothing else
TICKS = (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 100)
BUILT, RIVALS, ORIGINAL, CHOSEN = "joint search, built", "same setting everywhere", "original", "chosen"
VERIFIED = "fitted, verified on test data"
STYLES: dict[str, dict[str, Any]] = {
    BUILT: {"size": 9, "color": "white", "line": {"color": AFTER, "width": 2}},
    RIVALS: {"size": 11, "color": RIVAL, "symbol": "square"},
    ORIGINAL: {"size": 13, "color": INK, "symbol": "diamond"},
    CHOSEN: {"size": 19, "color": AFTER, "symbol": "star", "line": {"color": "white", "width": 1}},
    VERIFIED: {"size": 13, "color": AFTER, "symbol": "circle-open", "line": {"width": 2}},
}


@dataclass(frozen=True)
class Point:
    """Something that was measured."""

    kind: str
    name: str
    cost: float
    drop: float


@dataclass(frozen=True)
class View:
    """How costs and drops become places in the chart."""

    key: str
    scale: float
    turn: Callable[[float], float]
    x: list[float]  # range of the axes
    y: list[float]
    limit: float | None
    drop_limit: float | None

    def at(self, cost: float, drop: float) -> tuple[float, float]:
        """Coordinates on the axes."""
        return cost / self.scale, self.turn(drop)

    def pixel(self, cost: float, drop: float) -> tuple[float, float]:
        """Pixels from the lower left corner."""
        x, y = self.at(cost, drop)
        return (x - self.x[0]) / (self.x[1] - self.x[0]) * WIDTH, (y - self.y[0]) / (self.y[1] - self.y[0]) * HEIGHT


def front(record: Record) -> dict[str, Figure]:
    """Cost -> figure, for every cost that was measured; the limited ones first."""
    built = [c for c in record.get("candidates") or [] if words.finite(c["measured"].get("drop"))]
    keys = [k for k in words.COSTS if any(words.finite(c["measured"].get(k)) for c in built)]
    keys.sort(key=lambda k: k not in record["limits"])
    return {key: _figure(record, key, built) for key in keys}


def _figure(record: Record, key: str, built: Sequence[Record]) -> Figure:
    found, searched = points(record, key, built), predictions(record, key, built)
    view, unit = _view(record, key, found)
    modelled = ", modelled" if words.is_modelled(record, key) else ""
    traces = [_searched(searched, view), _pareto(pareto(searched), view)]
    traces += [_built(kind, [p for p in found if p.kind == kind], view) for kind in STYLES]
    notes, boxes = _limits(view)
    chart = layout(440) | {
        "xaxis": axis(f"{words.title(key)} ({unit}{modelled})") | {"range": view.x},
        "yaxis": axis("quality drop") | {"range": view.y} | _ticks(view),
        "legend": LEGEND,
        "shapes": _region(view),
        "annotations": [*notes, *_names(found, view, boxes)],
    }
    return {"data": [t for t in traces if t["x"]], "layout": chart}


def _view(record: Record, key: str, found: Sequence[Point]) -> tuple[View, str]:
    """The view that holds all measured points and the limits, with the unit of the costs."""
    limit, drop_limit = record["limits"].get(key), record["limits"].get("drop")
    costs = [p.cost for p in found] + ([limit] if limit is not None else [])
    drops = [0.0, *(min(p.drop, HOPELESS) for p in found)] + ([drop_limit] if drop_limit is not None else [])
    scale, unit = words.unit_of(key, costs)
    turn: Callable[[float], float] = (lambda d: math.asinh(d / KNEE)) if max(drops) > WIDE else (lambda d: d)
    x, y = padded([c / scale for c in costs], 0.09), padded([turn(d) for d in drops], 0.12)
    return View(key, scale, turn, x, y, limit, drop_limit), unit


def points(record: Record, key: str, built: Sequence[Record]) -> list[Point]:
    """The original, all candidates and the verified result, as far as their figures are known."""
    rows: list[tuple[str, str, Any, Any]] = [(ORIGINAL, "original", record["original"]["values"].get(key), 0.0)]
    for c in built:
        chosen = c["number"] == record.get("chosen")
        kind = BUILT if c["name"].startswith(("joint", "front")) else RIVALS
        name = f"chosen: {c['name']}" if chosen else c["name"]
        rows.append((CHOSEN if chosen else kind, name, c["measured"].get(key), c["measured"]["drop"]))
    checked = record["verify"]
    rows.append((VERIFIED, "verified", checked["measured"].get(key), checked["drop"]))
    return [Point(*row) for row in rows if words.finite(row[2]) and words.finite(row[3])]


def predictions(record: Record, key: str, built: Sequence[Record]) -> list[tuple[float, float]]:
    """(cost, drop) as predicted for every searched genome; empty when damage cannot be read as a drop."""
    to_drop = drop_of_damage(record, built)
    if to_drop is None:
        return []
    rows = [(r.get(key), r.get("damage")) for r in record.get("front") or []]
    return [(cost, to_drop(damage)) for cost, damage in rows if words.finite(cost) and words.finite(damage)]


def drop_of_damage(record: Record, built: Sequence[Record]) -> Callable[[float], float] | None:
    """A function from damage (nats) to quality drop, or None.

    Exact for perplexity, exp(damage) - 1; else the median ratio of both over the built candidates.
    """
    if record["verify"]["score_before"]["name"] == "perplexity":
        return lambda damage: math.expm1(min(damage, 50.0))
    pairs = [(c["measured"]["drop"], c["damage"]) for c in built if words.finite(c["damage"])]
    ratios = sorted(drop / damage for drop, damage in pairs if damage > 1e-9)
    if len(ratios) < 2 or ratios[len(ratios) // 2] <= 0:
        return None
    return lambda damage: damage * ratios[len(ratios) // 2]


def pareto(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The pairs that no other beats in both numbers (less is better), by the first number."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(pairs):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def _searched(searched: Sequence[tuple[float, float]], view: View) -> Figure:
    marker = {"size": 5, "color": SEARCHED}
    return _trace("searched (predicted)", searched, view) | {"mode": "markers", "marker": marker, "hoverinfo": "skip"}


def _pareto(best: Sequence[tuple[float, float]], view: View) -> Figure:
    line = {"color": "rgba(15,118,110,0.45)", "width": 1.5, "shape": "hv"}
    return _trace("Pareto front (predicted)", best, view) | {"mode": "lines", "line": line, "hoverinfo": "skip"}


def _built(kind: str, found: Sequence[Point], view: View) -> Figure:
    texts = [
        f"<b>{words.plain(p.name)}</b><br>{words.title(view.key)} {words.show(view.key, p.cost)}"
        f"<br>quality drop {words.percent(p.drop)}"
        for p in found
    ]
    look = {"mode": "markers", "marker": STYLES[kind], "hovertext": texts, "hoverinfo": "text"}
    return _trace(kind, [(p.cost, p.drop) for p in found], view) | look


def _trace(name: str, pairs: Sequence[tuple[float, float]], view: View) -> Figure:
    places = [view.at(*pair) for pair in pairs]
    return {"type": "scatter", "name": name, "x": [x for x, _ in places], "y": [y for _, y in places]}


def _names(found: Sequence[Point], view: View, taken: Sequence[Box]) -> list[dict[str, Any]]:
    """Names beside the points that have one, where they cover nothing."""
    order = [CHOSEN, ORIGINAL, RIVALS, VERIFIED]
    named = sorted((p for p in found if p.kind in order), key=lambda p: order.index(p.kind))
    labels = [Label(words.pretty(p.name), *view.pixel(p.cost, p.drop)) for p in named]
    places = place(labels, [view.pixel(p.cost, p.drop) for p in found], (WIDTH, HEIGHT), taken)
    colours = {CHOSEN: AFTER, RIVALS: RIVAL}
    return [
        {
            **dict(zip("xy", view.at(p.cost, p.drop))),
            "text": f"<b>{words.plain(p.name)}</b>" if p.kind == CHOSEN else words.plain(p.name),
            "showarrow": False,
            "font": {"size": 12, "color": colours.get(p.kind, INK)},
            "bgcolor": "rgba(255,255,255,0.6)",
            "borderpad": 0,
            **where,
        }
        for p, where in zip(named, places)
        if where
    ]


def _region(view: View) -> list[dict[str, Any]]:
    """The shaded part of the plane that meets the limits on these two axes, with dashed edges."""
    if view.limit is None and view.drop_limit is None:
        return []
    right = view.x[1] if view.limit is None else view.limit / view.scale
    top = view.y[1] if view.drop_limit is None else view.turn(view.drop_limit)
    edge = {"type": "line", "layer": "below", "line": {"color": AFTER, "width": 1.5, "dash": "dash"}}
    box = {"type": "rect", "layer": "below", "fillcolor": REGION, "line": {"width": 0}}
    shapes = [box | {"x0": view.x[0], "x1": right, "y0": view.y[0], "y1": top}]
    if view.limit is not None:
        shapes.append(edge | {"x0": right, "x1": right, "y0": view.y[0], "y1": view.y[1]})
    if view.drop_limit is not None:
        shapes.append(edge | {"x0": view.x[0], "x1": view.x[1], "y0": top, "y1": top})
    return shapes


def _limits(view: View) -> tuple[list[dict[str, Any]], list[Box]]:
    """The names of the limits at the end of their lines, and the pixels these names cover."""
    base = {"showarrow": False, "font": {"size": 12, "color": AFTER}}
    notes, boxes = [], []
    if view.limit is not None:
        text, x = f"limit {words.show(view.key, view.limit)}", view.pixel(view.limit, 0.0)[0]
        left = x + LETTER * len(text) + 8 < WIDTH
        where = {"xanchor": "left" if left else "right", "xshift": 5 if left else -5, "yref": "paper", "yanchor": "top"}
        notes.append(base | where | {"text": text, "x": view.limit / view.scale, "y": 1})
        start = x if left else x - LETTER * len(text) - 8
        boxes.append((start, HEIGHT - LINE - 4, start + LETTER * len(text) + 8, HEIGHT))
    if view.drop_limit is not None:
        text, y = f"limit {words.share(view.drop_limit)}", view.pixel(0.0, view.drop_limit)[1]
        where = {"xref": "paper", "xanchor": "right", "yanchor": "bottom"}
        notes.append(base | where | {"text": text, "x": 1, "y": view.turn(view.drop_limit)})
        boxes.append((WIDTH - LETTER * len(text), y, WIDTH, y + LINE))
    return notes, boxes


def _ticks(view: View) -> dict[str, Any]:
    """Round percentages; on the wide axis they are set by hand."""
    if view.turn(WIDE) == WIDE:
        return {"tickformat": ".3~p"}
    room = (view.y[1] - view.y[0]) / MOST_TICKS
    inside: list[float] = []
    for tick in sorted({*TICKS, *(-t for t in TICKS)}, key=abs):
        far = all(abs(view.turn(tick) - view.turn(other)) >= room for other in inside)
        if far and view.y[0] <= view.turn(tick) <= view.y[1]:
            inside.append(tick)
    texts = [f"{100 * t:.3g} %".replace("-", "−") for t in inside]
    return {"tickmode": "array", "tickvals": [view.turn(t) for t in inside], "ticktext": texts, "color": MUTED}

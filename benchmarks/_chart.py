"""Panels of lines as an SVG picture, without a drawing library: a logarithmic axis below, names at the right ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 330, 250  # pixels of a panel's plotting area
LEFT, RIGHT, TOP, BOTTOM = 62, 190, 40, 46  # around it
LINE_HEIGHT = 13
Point = tuple[float, float, float]  # x, y, spread of y


@dataclass(frozen=True)
class Line:
    """One contender."""

    name: str
    points: Sequence[Point]
    strong: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines on common axes."""

    title: str
    below: str  # what the logarithmic axis is
    lines: Sequence[Line]
    higher_is_better: bool


def chart(panels: Sequence[Panel], columns: int) -> str:
    """The picture."""
    across, down = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    rows = -(-len(panels) // columns)
    parts = [
        f'<g transform="translate({i % columns * across + LEFT},{i // columns * down + TOP})">{drawn(panel)}</g>'
        for i, panel in enumerate(panels)
    ]
    size = f"{columns * across} {rows * down}"
    style = "text{font:11px sans-serif;fill:#222}.title{font-size:13px;font-weight:bold}.soft{fill:#666}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{columns * across}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def drawn(panel: Panel) -> str:
    """One panel with its upper left corner at 0, 0."""
    lines = [line for line in panel.lines if line.points]
    xs = [math.log10(max(x, 1e-9)) for line in lines for x, _, _ in line.points]
    ys = [y for line in lines for _, y, _ in line.points]
    view = View(min(xs), max(xs), *room(ys, panel.higher_is_better))
    order = sorted(lines, key=lambda line: view.y(line.points[-1][1]))
    places = apart([view.y(line.points[-1][1]) for line in order])
    found = [frame(panel, view)]
    for line, place in zip(order, places):
        found.append(path(line, colour(panel.lines.index(line), len(panel.lines), line.strong), view, place))
    return "".join(found)


@dataclass(frozen=True)
class View:
    """From values to pixels; x in powers of ten."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return WIDTH * (math.log10(max(value, 1e-9)) - self.left) / max(self.right - self.left, 1e-9)

    def y(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / max(self.high - self.low, 1e-9)
        return HEIGHT * (1 - share)


def room(ys: Sequence[float], higher_is_better: bool) -> tuple[float, float]:
    """The shown range: the better two thirds of all values and a little more; the worst would take all the room."""
    ordered = sorted(ys, reverse=higher_is_better)
    best, worst = ordered[0], ordered[min(len(ordered) - 1, len(ordered) * 2 // 3)]
    margin = 0.05 * abs(best - worst) or 1.0
    low, high = sorted((best, worst))
    return low - margin, high + margin


def apart(places: Sequence[float]) -> list[float]:
    """Rising places, at least a line's height from each other and as near to where they were as one pass allows."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + LINE_HEIGHT) if found else place)
    excess = max(0.0, found[-1] - HEIGHT - LINE_HEIGHT) if found else 0.0
    return [place - excess for place in found]


def colour(index: int, count: int, strong: bool) -> str:
    return "#000" if strong else f"hsl({360 * index // max(count, 1)},70%,{38 + 10 * (index % 2)}%)"


def path(line: Line, stroke: str, view: View, place: float) -> str:
    """The line, a bar for the spread at its end, and its name."""
    pixels = [(view.x(x), view.y(y)) for x, y, _ in line.points]
    end, (_, y, spread) = pixels[-1], line.points[-1]
    dash = ' stroke-dasharray="5 3"' if line.dashed else ""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    bar = f"M{end[0]:.1f} {view.y(y - spread):.1f}V{view.y(y + spread):.1f}"
    to_name = f"M{end[0]:.1f} {end[1]:.1f}L{WIDTH + 12} {place:.1f}"
    wide = 2.4 if line.strong else 1.4
    return (
        f'<g stroke="{stroke}" fill="none"><polyline points="{points}" stroke-width="{wide}"{dash}/>'
        f'<path d="{bar}"/><path d="{to_name}" stroke-width="0.5"/></g>'
        f'<text x="{WIDTH + 14}" y="{place + 4:.1f}" style="fill:{stroke}">{escape(line.name)} {y:.4g}</text>'
    )


def frame(panel: Panel, view: View) -> str:
    """Title, axes and their marks."""
    found = [
        f'<text class="title" x="0" y="-14">{escape(panel.title)}</text>'
        f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="#999"/>'
        f'<text class="soft" x="{WIDTH / 2}" y="{HEIGHT + 36}" text-anchor="middle">{escape(panel.below)}</text>'
    ]
    for power in range(math.floor(view.left) - 1, math.ceil(view.right) + 1):
        for value in (digit * 10.0**power for digit in (1, 2, 5)):
            if view.left - 1e-9 <= math.log10(value) <= view.right + 1e-9:
                x = view.x(value)
                found.append(f'<text x="{x:.1f}" y="{HEIGHT + 18}" text-anchor="middle">{value:,.4g}</text>')
                found.append(f'<path d="M{x:.1f} {HEIGHT}v4" stroke="#999"/>')
    step = nice((view.high - view.low) / 5)
    for i in range(math.ceil(view.low / step), math.floor(view.high / step) + 1):
        y = view.y(i * step)
        found.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{i * step:.4g}</text>')
        found.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#eee"/>')
    return "".join(found)


def nice(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step - 1e-12)

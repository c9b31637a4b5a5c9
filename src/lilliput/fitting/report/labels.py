"""Where the names of points in a chart go, so that they cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

LETTER, LINE, GAP = 6.9, 16.0, 11.0  # pixels: width of a letter and height of a line at size 12, distance from a point
_SIDES = [
    (1, 0),
    (-1, 0),
    (0, 1),
    (0, -1),
    (1, 1),
    (1, -1),
    (-1, 1),
    (-1, -1),
    (0, 2.2),
    (0, -2.2),
    (1, 2.2),
    (1, -2.2),
]

Box = tuple[float, float, float, float]  # left, bottom, right, top


class Label(NamedTuple):
    """A text and the point it names, in pixels from the lower left corner of the plotting area."""

    text: str
    x: float
    y: float


def place(
    labels: Sequence[Label],
    points: Sequence[tuple[float, float]],
    area: tuple[float, float],
    taken: Sequence[Box] = (),
) -> list[dict[str, Any] | None]:
    """For each label plotly's anchors and shifts, in the order of importance; None when there is no free place."""
    taken = list(taken)
    found: list[dict[str, Any] | None] = []
    for label in labels:
        costs = [(_cost(_box(label, side), label, taken, points, area), i) for i, side in enumerate(_SIDES)]
        cost, best = min(costs)
        if cost >= LINE * LETTER * 4:  # four letters would be covered
            found.append(None)
            continue
        taken.append(_box(label, _SIDES[best]))
        found.append(_anchors(_SIDES[best]))
    return found


def _box(label: Label, side: tuple[float, float]) -> Box:
    width, (right, up) = LETTER * len(label.text), side
    left = label.x + right * GAP - {1: 0.0, 0: width / 2, -1: width}[round(right)]
    middle = label.y + up * (GAP + LINE / 4)
    return left, middle - LINE / 2, left + width, middle + LINE / 2


def _cost(box: Box, label: Label, taken: Sequence[Box], points, area: tuple[float, float]) -> float:
    """Covered pixels: of other labels, of points, and of what would stick out of the area."""
    covered = sum(_shared(box, other) for other in taken)
    dots = [(x - 6, y - 6, x + 6, y + 6) for x, y in points if (x, y) != (label.x, label.y)]
    inside = _shared(box, (0.0, 0.0, *area))
    return covered + sum(_shared(box, dot) for dot in dots) + 3 * ((box[2] - box[0]) * (box[3] - box[1]) - inside)


def _shared(a: Box, b: Box) -> float:
    """Area that two boxes have in common."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _anchors(side: tuple[float, float]) -> dict[str, Any]:
    right, up = side
    x = {1: "left", 0: "center", -1: "right"}[round(right)]
    return {"xanchor": x, "xshift": right * GAP, "yanchor": "middle", "yshift": up * (GAP + LINE / 4)}

"""Groups of horizontal bars as an SVG picture, without a drawing library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 260, 190, 120  # pixels of the longest bar and of the names and figures around it
LINE, GAP, TOP = 17, 10, 30
COLOURS = ("#888", "#2a6fb0", "#d0802a")
STYLE = "text{font:11px sans-serif;fill:#222}.title{font-size:13px;font-weight:bold}"


@dataclass(frozen=True)
class Bar:
    """One figure with the ends of its spread; `group` is counted from 0 and gives the colour."""

    name: str
    value: float
    low: float
    high: float
    group: int = 0


def bars(panels: Mapping[str, Sequence[Bar]]) -> str:
    """The picture: panels side by side, all on the scale of the longest bar; a gap between groups."""
    longest = max(bar.high for panel in panels.values() for bar in panel)
    across = LEFT + WIDTH + RIGHT
    height = TOP + max(_height(panel) for panel in panels.values())
    drawn = (
        f'<g transform="translate({i * across},0)">{_panel(title, panel, WIDTH / longest)}</g>'
        for i, (title, panel) in enumerate(panels.items())
    )
    size = f"{len(panels) * across} {height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{len(panels) * across}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>{"".join(drawn)}</svg>\n'
    )


def _height(panel: Sequence[Bar]) -> int:
    return LINE * len(panel) + GAP * (panel[-1].group + 1)


def _panel(title: str, panel: Sequence[Bar], scale: float) -> str:
    found = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
    for i, bar in enumerate(panel):
        y, colour = TOP + i * LINE + bar.group * GAP, COLOURS[bar.group % len(COLOURS)]
        low, end, high = (LEFT + scale * x for x in (bar.low, bar.value, bar.high))
        found.append(
            f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(bar.name)}</text>'
            f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="13" fill="{colour}"/>'
            f'<path d="M{low:.1f} {y + 6.5}H{high:.1f}" stroke="#000"/>'
            f'<text x="{high + 6:.1f}" y="{y + 11}">{bar.value:.0f}</text>'
        )
    return "".join(found)

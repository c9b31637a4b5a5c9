"""The report's smaller charts, as plotly figures in plain dictionaries."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lilliput.fitting.report import words
from lilliput.fitting.report.drawing import AFTER, BEFORE, INK, LEGEND, Figure, Record, axis, layout, padded


def layers(record: Record) -> dict[str, Figure]:
    """ "bytes" (and "ms" where it is known) -> bars of every part of the model before and after."""
    rows = record.get("layers") or []
    kinds = {"bytes": "size_bytes", "ms": "token_ms" if "token_ms" in record["original"]["values"] else "latency_ms"}
    known = {
        kind: key
        for kind, key in kinds.items()
        if rows and all(words.finite(r.get(f"{side}_{kind}")) for r in rows for side in ("before", "after"))
    }
    return {kind: _layer_bars(rows, kind, key) for kind, key in known.items()}


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Last parts of the names when they are the numbered blocks of one list (and a head); with what they name."""
    split = [n.rpartition(".") for n in names]
    if len({path for path, _, last in split if last.isdigit()}) != 1:
        return list(names), "layer"
    return [last if last.isdigit() else last.removeprefix("lm_") for _, _, last in split], "block"


def _layer_bars(rows: Sequence[Record], kind: str, key: str) -> Figure:
    names, group = short_names([r["name"] for r in rows])
    scale, unit = words.unit_of(key, [r[f"{side}_{kind}"] for r in rows for side in ("before", "after")])
    labels = [words.plain(n) for n in names]

    def bars(side: str, colour: str, width: float) -> Figure:
        values = [r[f"{side}_{kind}"] for r in rows]
        return {
            "type": "bar",
            "name": side,
            "x": list(range(len(rows))),
            "y": [v / scale for v in values],
            "width": width,
            "marker": {"color": colour, "cornerradius": 3},
            "hovertext": [
                f"<b>{words.plain(r['name'])}</b><br>{side} {words.show(key, v)}" for r, v in zip(rows, values)
            ],
            "hoverinfo": "text",
        }

    ticks = {"tickmode": "array", "tickvals": list(range(len(rows))), "ticktext": labels, "showgrid": False}
    room = 980 / len(names)
    level = all((len(a) + len(b)) / 2 * 8 < room for a, b in zip(names, [*names[1:], ""]))
    turned = {"tickangle": 0 if level else -60}
    chart = layout(300 if level else 360) | {
        "barmode": "overlay",
        "xaxis": axis(group) | ticks | turned,
        "yaxis": axis(f"weights ({unit})" if kind == "bytes" else f"time ({unit}, predicted)"),
        "legend": LEGEND,
    }
    return {"data": [bars("before", BEFORE, 0.82), bars("after", AFTER, 0.5)], "layout": chart}


def quality(record: Record) -> Figure:
    """Score on test data before and after, with its 95 % interval."""
    scores = [
        ("fitted", record["verify"]["score_after"], AFTER),
        ("original", record["verify"]["score_before"], BEFORE),
    ]
    scores = [s for s in scores if all(words.finite(s[1][k]) for k in ("value", "low", "high"))]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [s["high"] - s["value"] for _, s, _ in scores],
        "arrayminus": [s["value"] - s["low"] for _, s, _ in scores],
        "color": INK,
        "thickness": 1.4,
        "width": 6,
    }
    texts = [
        f"{words.number(s['value'])}{s['unit']}  [{words.number(s['low'])}, {words.number(s['high'])}]"
        for _, s, _ in scores
    ]
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": [s["value"] for _, s, _ in scores],
        "y": [name for name, _, _ in scores],
        "marker": {"color": [colour for _, _, colour in scores], "cornerradius": 3},
        "width": 0.55,
        "error_x": error,
        "hovertext": texts,
        "hoverinfo": "text",
    }
    name, unit = record["verify"]["score_before"]["name"], record["verify"]["score_before"]["unit"]
    label = words.plain(f"{name} ({unit})" if unit else name)
    chart = layout(170) | {"xaxis": axis(label) | {"rangemode": "tozero"}, "yaxis": axis() | {"showgrid": False}}
    return {"data": [bar], "layout": chart}


def predicted(record: Record, key: str) -> Figure | None:
    """Predicted against measured over the built candidates; `key` is a cost or "damage". None below two points."""
    rows = []
    for c in record.get("candidates") or []:
        guess, found = (c.get("predicted") or {}).get(key), c["damage"] if key == "damage" else c["measured"].get(key)
        if words.finite(guess) and words.finite(found):
            rows.append((c, guess, found))
    if len(rows) < 2:
        return None
    values = [v for _, guess, found in rows for v in (guess, found)]
    scale, unit = (1.0, "nats") if key == "damage" else words.unit_of(key, values)
    wide = min(values) > 0 and max(values) > 30 * min(values)
    span = padded([math.log10(v / scale) if wide else v / scale for v in values], 0.1)
    spread = {"type": "log", "range": span, "dtick": 1} if wide else {"range": span}
    chart = layout(260) | {
        "showlegend": False,
        "xaxis": axis(f"predicted ({unit})") | spread,
        "yaxis": axis(f"measured ({unit})") | spread,
        "margin": {"l": 20, "r": 10, "t": 8, "b": 20},
    }
    return {
        "data": [_diagonal([10**v for v in span] if wide else span), _dots(record, rows, scale, unit)],
        "layout": chart,
    }


def _diagonal(ends: Sequence[float]) -> Figure:
    line = {"color": BEFORE, "dash": "dot", "width": 1}
    return {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "line": line, "hoverinfo": "skip"}


def _dots(record: Record, rows: Sequence[tuple[Record, float, float]], scale: float, unit: str) -> Figure:
    """(candidate, predicted, measured) as points; the chosen one is a star."""
    stars = [c["number"] == record.get("chosen") for c, _, _ in rows]
    texts = [
        f"<b>{words.plain(c['name'])}</b><br>predicted {guess / scale:.3g}, measured {found / scale:.3g} {unit}"
        for c, guess, found in rows
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [guess / scale for _, guess, _ in rows],
        "y": [found / scale for _, _, found in rows],
        "marker": {
            "size": [13 if star else 8 for star in stars],
            "symbol": ["star" if star else "circle" for star in stars],
            "color": AFTER,
            "opacity": 0.85,
        },
        "hovertext": texts,
        "hoverinfo": "text",
    }

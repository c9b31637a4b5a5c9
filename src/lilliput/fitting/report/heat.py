"""The map of settings: which option each layer or block took, and how much that takes away."""

from __future__ import annotations

import re
from typing import Any

from lilliput.fitting.report import words
from lilliput.fitting.report.drawing import Record

GONE = {"text": words.MISSING, "strength": 0.0, "kind": "parts", "dark": False}


def heat(record: Record) -> dict[str, Any] | None:
    """The settings as a grid of cells (rows: blocks or layers, columns: parts) and those outside it."""
    units = record.get("heat") or []
    if not units:
        return None
    blocks = any(u["block"] is not None for u in units)
    inside = [u for u in units if u["block"] is not None] if blocks else units
    outside = [u for u in units if u["block"] is None] if blocks else []
    columns = list(dict.fromkeys(u["part"] for u in inside))
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for u in inside:
        rows.setdefault(_row_name(u, blocks), {})[u["part"]] = _cell(u)
    order = [r["name"] for r in record.get("layers") or []]
    listed = sorted(rows.items(), key=lambda row: order.index(row[0]) if row[0] in order else -1)
    for cells in rows.values():
        if any(cell["text"] == "drop" for cell in cells.values()):  # nothing else matters of a block that is gone
            cells.update({part: GONE for part, cell in cells.items() if cell["text"] != "drop"})
    return {
        "axis": "block" if blocks else "layer",
        "columns": columns,
        "rows": [(name, [cells.get(c) for c in columns]) for name, cells in listed],
        "outside": [(_row_name(u, False), _cell(u)) for u in outside],
        "kinds": sorted({cell["kind"] for cell in map(_cell, units) if cell["strength"]}),
    }


def _row_name(unit: Record, blocks: bool) -> str:
    if blocks:
        return str(unit["block"])
    return str(unit.get("unit", unit["part"])).removesuffix(" " + unit["part"]) or unit["part"]


def _cell(unit: Record) -> dict[str, Any]:
    value = strength(unit)
    text = words.pretty(unit["setting"])
    return {"text": text, "strength": round(value, 3), "kind": kind(unit["setting"]), "dark": value > 0.78}


def kind(setting: str) -> str:
    """Whether a setting takes bits, ranks, or whole parts away."""
    if re.match(r"(int|table|float|fp|bf)\d", setting):
        return "bits"
    return "rank" if "rank" in setting else "parts"


def strength(unit: Record) -> float:
    """How much a setting takes away, from 0 (nothing) to 1, read from its label; else its place among the options."""
    if not unit["option"]:
        return 0.0
    label = unit["setting"]
    if bits := re.match(r"(?:int|table)(\d+)", label):
        return {8: 0.3, 4: 0.6, 3: 0.8, 2: 1.0}.get(int(bits[1]), 0.5)
    if share := re.match(r"-(\d+(?:\.\d+)?)%", label):
        return min(1.0, 0.15 + float(share[1]) / 60)
    if rank := re.match(r"rank (\d+(?:\.\d+)?)%", label):
        return min(1.0, 0.15 + (100 - float(rank[1])) / 80)
    return unit["option"] / max(1, unit.get("options", unit["option"] + 1) - 1)

"""Rows for the lists and pages of methods, papers and devices; the same rows make the tables in docs."""

from __future__ import annotations

import sys
from typing import Any

from lilliput.method import find_method, method_names
from lilliput.paper import Evidence, find_paper, paper_names


def method_row(name: str) -> dict[str, Any]:
    """Facts and settings of one method."""
    cls: Any = find_method(name)
    facts = cls.facts
    doc = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
    return {
        "name": name,
        "class": cls.__name__,
        "summary": doc.strip().splitlines()[0].split("   ")[0].rstrip(),
        "stage": facts.stage,
        "needs": sorted(facts.needs),
        "takes": sorted(facts.takes),
        "gives": sorted(facts.gives),
        "keeps": sorted(facts.keeps),
        "data": facts.data,
        "effect": facts.effect,
        "paper": getattr(cls, "paper", ""),
        "settings": {
            key: {
                "default": cls.defaults().get(key),
                "help": k.help,
                "low": k.low,
                "high": k.high,
                "choices": k.choices,
            }
            for key, k in cls.knobs().items()
        },
    }


def method_rows(pattern: str = "*") -> list[dict[str, Any]]:
    """Facts and settings of every method that matches."""
    return [method_row(name) for name in method_names(pattern)]


def method_page(name: str) -> str:
    """One method as text."""
    row = method_row(name)
    doc = (sys.modules[find_method(name).__module__].__doc__ or "").strip()
    lines = [f"{name} (lilliput.methods.{name.rpartition('.')[0]}.{row['class']})", "", doc, "", "settings"]
    for key, s in row["settings"].items():
        lines.append(f"  {key} = {s['default']}  ({_span(s)})  {s['help']}")
    facts = ("stage", "needs", "takes", "gives", "keeps", "data", "effect", "paper")
    shown = {k: ", ".join(row[k]) if isinstance(row[k], list) else row[k] for k in facts}
    return "\n".join([*lines, "", "facts", *(f"  {k}: {v or '-'}" for k, v in shown.items())])


def _span(setting: dict[str, Any]) -> str:
    """The range of a setting in words."""
    low, high = setting["low"], setting["high"]
    if setting["choices"]:
        return f"one of {', '.join(map(str, setting['choices']))}"
    if low is None or high is None:
        return "any" if low is high else f"from {low}" if high is None else f"up to {high}"
    return f"{low} .. {high}"


def paper_rows(pattern: str = "*") -> list[dict[str, Any]]:
    """What every matching paper claims."""
    return [{"slug": slug, **vars(find_paper(slug).paper)} for slug in paper_names(pattern)]


def evidence_text(slug: str, evidence: Evidence) -> str:
    """Evidence as a table."""
    lines = [f"{slug}: {'holds' if evidence.holds else 'does NOT hold'} here", f"  {evidence.figure}"]
    for row in evidence.rows:
        values = ", ".join(
            f"{k} {v:.4g}" + (f" ± {row.spread[k]:.2g}" if k in row.spread else "") for k, v in row.values.items()
        )
        lines.append(f"  {row.name:32} {values}")
    return "\n".join([*lines, f"  setup: {evidence.setup}", f"  limits: {evidence.limits}"])


def device_rows() -> list[dict[str, Any]]:
    """This machine and the devices that come with the package."""
    from lilliput.device import Device

    found = [("here", Device.here()), *((name, Device.load(name)) for name in Device.names())]
    return [
        {
            "name": name,
            "cores": d.cores,
            "memory_bytes": d.memory_bytes,
            "measured": d.measured,
            "summary": f"{d.cores} cores, {d.memory_bytes / 1e9:.3g} GB, {d.bandwidth(1e12) / 1e9:.3g} GB/s, "
            f"{d.peak('int8') / 1e9:.4g} int8 GOP/s ({'measured' if d.measured else 'modelled'})",
        }
        for name, d in found
    ]


def fpga_rows() -> list[dict[str, Any]]:
    """The FPGAs that come with the package, for `fit --device` and budgets of look-up tables."""
    from lilliput.methods.circuits._fpga import Fpga

    found = [Fpga.load(name) for name in Fpga.names()]
    return [
        vars(chip)
        | {
            "summary": f"FPGA, {chip.luts} look-up tables, {chip.block_rams} memories, {chip.multipliers} multipliers, "
            f"{chip.clock_mhz:g} MHz where the budget names no clock"
        }
        for chip in found
    ]

"""Writes `report.html` from a run's record."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from lilliput.cache import write_atomically


def write_report(record: dict[str, Any], path: Path) -> None:
    """Render the record as one HTML file."""
    rows = "".join(
        f"<tr><td>{html.escape(c['name'])}</td><td>{c['damage']:.4g}</td></tr>" for c in record["candidates"]
    )
    write_atomically(path, f"<!doctype html><title>Lilliput</title><table>{rows}</table>".encode())

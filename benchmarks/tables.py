"""Writes rows of measurements as CSV with the facts of the machine."""

from __future__ import annotations

import csv
import io
import platform
from pathlib import Path
from typing import Any

from lilliput.cache import write_atomically
from lilliput.device import Device


def write_rows(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Rows with the same columns, each with the machine's facts behind them."""
    device = Device.here()
    facts = {**facts, "machine": f"{device.cores} cores {platform.machine()}, {' '.join(device.isa)}"}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*rows[0], *facts])
    writer.writeheader()
    writer.writerows({**row, **facts} for row in rows)
    write_atomically(path, text.getvalue().encode())
    print(f"wrote {path}")

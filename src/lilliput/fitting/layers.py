"""Where the bytes are, part by part, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lilliput.anatomy import anatomy
from lilliput.metrics.memory import weight_bytes


def bytes_by_part(before: nn.Module, after: nn.Module, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows {"name", "before_bytes", "after_bytes"} for every block (or leaf layer) of the original."""
    names = [b.name for b in anatomy(before).blocks] or [n for n, m in before.named_modules() if _leaf(m)]
    head = anatomy(before).head
    names += [head] if head and head not in names else []
    dropped = {n.removesuffix(" block") for n, label in labels.items() if label == "drop"}
    rows, shift = [], 0
    for name in names:
        if name in dropped:
            shift += 1
            rows.append({"name": name, "before_bytes": weight_bytes(before.get_submodule(name)), "after_bytes": 0})
            continue
        parent, _, index = name.rpartition(".")
        moved = f"{parent}.{int(index) - shift}" if index.isdigit() and shift else name
        parts = [m.get_submodule(n) for m, n in ((before, name), (after, moved))]
        rows.append({"name": name, "before_bytes": weight_bytes(parts[0]), "after_bytes": weight_bytes(parts[1])})
    return rows


def _leaf(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)

"""Where the bytes and the time are, part by part, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lilliput.anatomy import anatomy
from lilliput.metrics.memory import weight_bytes

Times = Mapping[str, float]  # part -> milliseconds


def bytes_by_part(
    before: nn.Module, after: nn.Module, labels: Mapping[str, str], times: tuple[Times, Times] | None = None
) -> list[dict[str, Any]]:
    """Rows {"name", "before_bytes", "after_bytes"} for every block (or leaf layer) of the original.

    With `times` of both (`DecoderSpace.layer_ms`), parts that are in them get "before_ms" and "after_ms" too.
    """
    names = [b.name for b in anatomy(before).blocks] or [n for n, m in before.named_modules() if _leaf(m)]
    head = anatomy(before).head
    names += [head] if head and head not in names else []
    dropped = {n.removesuffix(" block") for n, label in labels.items() if label == "drop"}
    rows, shift = [], 0
    for name in names:
        row: dict[str, Any] = {"name": name, "before_bytes": weight_bytes(before.get_submodule(name)), "after_bytes": 0}
        if name in dropped:
            shift += 1
        else:
            parent, _, index = name.rpartition(".")
            moved = f"{parent}.{int(index) - shift}" if index.isdigit() and shift else name
            row["after_bytes"] = _bytes_at(after, moved)
        if times and name in times[0]:
            row |= {"before_ms": times[0][name], "after_ms": times[1].get(name, 0.0)}
        rows.append(row)
    return rows


def _bytes_at(model: nn.Module, name: str) -> int:
    """Bytes of the weights of a part; none of one that is in a block that became an identity."""
    try:
        return weight_bytes(model.get_submodule(name))
    except AttributeError:
        return 0


def _leaf(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)

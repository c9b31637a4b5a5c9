"""Rows of the projections of an attention, and their numbers in a model's configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy


def rows(layer: Any) -> Tensor:
    """(outputs, inputs) weight in float64, with the bias as one more column if there is one."""
    weight = layer.weight.double()
    return weight if layer.bias is None else torch.cat([weight, layer.bias.double()[:, None]], 1)


def set_rows_(layer: Any, rows: Tensor) -> None:
    """The inverse of `rows`, in the layer's own type; their number may be another."""
    if layer.bias is not None:
        layer.bias = nn.Parameter(rows[:, -1].to(layer.bias.dtype), layer.bias.requires_grad)
        rows = rows[:, :-1]
    set_weight_(layer, rows)


def set_weight_(layer: Any, weight: Tensor) -> None:
    """Another weight (outputs, inputs), in the layer's own type."""
    weight = weight.to(layer.weight.dtype).contiguous()
    layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape


def note_in_config_(model: nn.Module) -> None:
    """The number of key-value heads in the model's configuration, when all layers have the same."""
    counts = {b.attention.kv_heads for b in anatomy(model).blocks if b.attention}
    config: Any = getattr(model, "config", None)
    if config is not None and len(counts) == 1:
        config.get_text_config(decoder=True).num_key_value_heads = counts.pop()

"""Keys at other rotary positions: turning a key by the difference gives the key it would have had there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lilliput.errors import UserError

FIXED = ("default", "linear", "llama3", "yarn")  # their frequencies are the same at every length of text


def frequencies(model: Any, policy: str) -> Tensor:
    """Angles per position (d / 2,) of a model's rotary embedding. Raises UserError when they are not fixed."""
    config = model.config.get_text_config(decoder=True)
    embedding = next((m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)), None)
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if embedding is None or kind not in FIXED:
        what = "no rotary positions" if embedding is None else f"rotary positions of the kind {kind!r}"
        raise UserError(f"{policy}: {type(model).__name__} has {what}; give reset_positions=False")
    return embedding.inv_freq.detach().float()  # pyright: ignore


def turned(keys: Tensor, by: Tensor, freqs: Tensor) -> Tensor:
    """Keys (B, heads, n, d) moved `by` (B, heads, n) positions. Pairs are the halves of the first 2 len(freqs) numbers,
    as in Llama; the others carry no position."""
    angles = by[..., None].float() * freqs
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = keys.float().split([len(freqs), len(freqs), keys.shape[-1] - 2 * len(freqs)], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(keys.dtype)

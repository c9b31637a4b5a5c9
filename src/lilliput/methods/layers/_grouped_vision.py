"""Attention of the zoo's vision transformers whose heads share queries, or keys and values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import Attention, in_out
from lilliput.methods.layers._span_layers import spread
from lilliput.zoo import nets


class GroupedSelfAttention(nets.Attention):
    """Head n of `heads` has queries n mod `query_heads` and keys and values n div (heads / `kv_heads`)."""

    def __init__(self, dim: int, heads: int, query_heads: int, kv_heads: int, head_dim: int):
        super().__init__(dim, heads)
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.q = nn.Linear(dim, query_heads * head_dim)
        self.k, self.v = (nn.Linear(dim, kv_heads * head_dim) for _ in range(2))
        self.out = nn.Linear(heads * head_dim, dim)

    @classmethod
    def of(cls, model: nn.Module, a: Attention) -> GroupedSelfAttention:
        """The same in the place of an attention whose layers have the new sizes already; `a` says how many heads."""
        old: Any = model.get_submodule(a.name)
        dim, asked = in_out(old.q)  # pyright: ignore
        with torch.device("meta"):
            made = cls(dim, a.heads, asked // a.head_dim, a.kv_heads, a.head_dim)
        for name in ("q", "k", "v", "out"):
            made.add_module(name, getattr(old, name))
        return made

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        dim, asked = in_out(self.q)  # pyright: ignore
        sizes = {"query_heads": asked // self.head_dim, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {"dim": dim, "heads": self.heads} | sizes

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of all heads (B, heads, T, d), keys and values (B, kv heads, T, d)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        return spread(q, self.heads), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads with the same keys stand behind each other as further queries, so that no key is copied."""
        heads = F.scaled_dot_product_attention(q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3), k, v)
        heads = heads.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
        return self.out(heads.transpose(1, 2).flatten(2))

"""Blocks of the zoo's vision transformers that order their tokens by importance, and blocks that some tokens skip.

Attention sees a set, and positions were added before the first block: tokens may stand in any order as long as the
class token stays the first. So the important ones are put in front, the blocks behind run on the front, and those that
skip need no way back.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.anatomy import in_out
from lilliput.zoo.nets import TransformerBlock

SCORES = ("cls", "norm", "random")
SERVING = ("skip", "all")


def importance(score: str, x: Tensor, q: Tensor, k: Tensor, kv_heads: int) -> Tensor:
    """(B, T - 1) of the tokens behind the first in a block's output x (B, T, dim), from its queries and keys.

    "cls": the attention that the first token, the class, pays them, mean over heads; "norm": their length; "random".
    """
    if score == "cls":
        asked = q[:, :, :1].unflatten(1, (kv_heads, -1)) * q.shape[-1] ** -0.5
        return (asked @ k[:, :, None].transpose(-1, -2)).softmax(-1).mean((1, 2))[:, 0, 1:]
    return x[:, 1:].norm(dim=-1) if score == "norm" else torch.rand_like(x[:, 1:, 0])


def ordered(x: Tensor, scores: Tensor) -> Tensor:
    """Tokens (B, T, dim) by falling scores (B, T - 1), the first where it is."""
    order = F.pad(scores, (1, 0), value=float("inf")).argsort(1, descending=True)
    rows = order + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(x.shape)


def kept_tokens(tokens: int, drop: float) -> int:
    """How many run: the class, and of the others all but the share `drop`, one at least."""
    return 1 + max(1, tokens - 1 - int(drop * (tokens - 1) + 0.5))


class _Block(TransformerBlock):
    """A block with the layers of another; `serving` says whether tokens skip outside of training too."""

    def __init__(self, dim: int, heads: int, hidden: int, serving: str):
        super().__init__(dim, heads, hidden)
        self.hidden, self.serving = hidden, serving

    @classmethod
    def of(cls, block: TransformerBlock, *settings: Any) -> Self:
        """One in the place of a plain block."""
        hidden = in_out(block.mlp.fc1)[1]  # pyright: ignore
        with torch.device("meta"):
            made = cls(block.norm1.normalized_shape[0], block.attn.heads, hidden, *settings)
        for name, child in block.named_children():
            made.add_module(name, child)
        return made

    @property
    def skips(self) -> bool:
        """Whether tokens skip now."""
        return self.training or self.serving == "skip"

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        sizes = {"dim": self.norm1.normalized_shape[0], "heads": self.attn.heads, "hidden": self.hidden}
        return sizes | {"serving": self.serving}


class OrderingBlock(_Block):
    """A block for all tokens, which leaves them in the order of their importance."""

    def __init__(self, dim: int, heads: int, hidden: int, serving: str, score: str):
        super().__init__(dim, heads, hidden, serving)
        self.score = score

    def rebuild_config(self) -> dict[str, Any]:
        return super().rebuild_config() | {"score": self.score}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.split(self.norm1(x))
        x = x + self.attn.attend(q, k, v)
        x = x + self.mlp(self.norm2(x))
        if not self.skips:
            return x
        kv_heads = getattr(self.attn, "kv_heads", self.attn.heads)
        return ordered(x, importance(self.score, x, q, k, kv_heads).detach())


class SkippedBlock(_Block):
    """A block that runs on the tokens in front; the share `drop` of them goes around it."""

    def __init__(self, dim: int, heads: int, hidden: int, serving: str, drop: float):
        super().__init__(dim, heads, hidden, serving)
        self.drop = drop

    def rebuild_config(self) -> dict[str, Any]:
        return super().rebuild_config() | {"drop": self.drop}

    def forward(self, x: Tensor) -> Tensor:
        if not self.skips:
            return super().forward(x)
        kept = kept_tokens(x.shape[1], self.drop)
        return torch.cat([super().forward(x[:, :kept]), x[:, kept:]], 1)

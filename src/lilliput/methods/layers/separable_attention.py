"""Attention that costs as much for each token however many there are.   out = W_o (relu(W_v x) * g)

    c = softmax over tokens of w x,    g = W_k sum_n c_n x_n      one context for all tokens, weighted by one score each

Paper: Separable Self-attention for Mobile Vision Transformers (MobileViTv2; Mehta and Rastegari, 2022, arXiv
2206.02680). The paper sums the keys, sum_n c_n W_k x_n; the scores sum to one, so summing tokens first gives the same
context with a single product instead of one for each token. Every token sees every other through the context, later
ones too: this is for pictures, not for text that is continued.

The method puts it in the place of the attention of a vision transformer. A network loses most of its accuracy until it
is trained, or taught by the original with distill.logits; that it then starts from the old values, keys and output is
ours (reconstructed). Few tokens gain nothing: attention is fast where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import Attention, needs_blocks
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, NONE, OUTPUT_SHAPE, Facts, Method, knob
from lilliput.methods.prune._surgery import plain
from lilliput.workload import Workload

__all__ = ["SeparableAttention", "SeparableSelfAttention"]
KEPT, FRESH = "kept", "fresh"


class SeparableSelfAttention(nn.Module):
    """Tokens (..., N, dim) to tokens of the same shape in N steps; leading dimensions, such as the pixels of patches,
    have a context each."""

    def __init__(self, dim: int, inner: int | None = None, bias: bool = True):
        super().__init__()
        self.dim, self.inner = dim, inner or dim
        self.score = nn.Linear(dim, 1, bias=False)  # a number added to all scores changes nothing
        self.key, self.value = (nn.Linear(dim, self.inner, bias=bias) for _ in range(2))
        self.out = nn.Linear(self.inner, dim, bias=bias)

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"dim": self.dim, "inner": self.inner, "bias": self.out.bias is not None}

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Tokens x (..., N, dim); with `source` (..., M, dim) the context is that of other tokens."""
        source = x if source is None else source
        weights = self.score(source).softmax(-2)
        context = self.key(weights.transpose(-1, -2) @ source)  # (..., 1, inner)
        return self.out(F.relu(self.value(x)) * context)


@dataclass(frozen=True)
class SeparableAttention(Method):
    """Replace the attention of a vision transformer by one whose time grows with the tokens, not with their square."""

    start: str = knob(KEPT, choices=(KEPT, FRESH), help="kept: values, keys and output of the old attention; or fresh")
    seed: int = knob(0, low=0, high=2**31 - 1, help="of new weights")

    paper: ClassVar[str] = "separable_attention"
    facts: ClassVar[Facts] = Facts(
        stage="factorize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=NONE,
        effect="smaller, faster with many tokens; at a loss of quality until it is trained",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the attentions. Raises UserError for other models than vision transformers."""
        yield from attentions(model, self.name())

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        found = attentions(model, self.name())
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for name, settings in layers.items():
                set_module(model, name, separable(model, found[name], settings.start == KEPT))
        return model


def attentions(model: nn.Module, method: str) -> dict[str, Attention]:
    """Name -> parts of the attentions that map tokens to tokens and hold nothing but their projections."""
    found = needs_blocks(model, method)
    if found.kind != "vit":
        raise UserError(
            f"{method} gives every token the context of all tokens, also of later ones; it is for vision "
            f"transformers, and {type(model).__name__} is none"
        )
    return {b.attention.name: b.attention for b in found.blocks if b.attention and _fits(model, b.attention)}


def _fits(model: nn.Module, a: Attention) -> bool:
    """Whether nothing is lost with this module but its projections: no norms, position biases or other arguments."""
    layers = (a.q, a.k, a.v, a.o)
    module = model.get_submodule(a.name)
    if type(module).__module__.startswith("transformers.") or not a.o.startswith(f"{a.name}.") or a.heads != a.kv_heads:
        return False
    own = {id(p) for name in layers for p in model.get_submodule(name).parameters()}
    return plain(model, layers) and own == {id(p) for p in module.parameters()}


@torch.no_grad()
def separable(model: nn.Module, a: Attention, kept: bool) -> SeparableSelfAttention:
    """What takes the place of an attention; `kept` copies its keys, values and output."""
    k, v, o = layers = [model.get_submodule(name) for name in (a.k, a.v, a.o)]
    inner, bias = a.heads * a.head_dim, any(layer.bias is not None for layer in layers)
    rows = {"key": _rows(k, inner, 1, a.fused), "value": _rows(v, inner, 2, a.fused), "out": _rows(o, None, 0, False)}
    made = SeparableSelfAttention(rows["key"][0].shape[1], inner, bias).to(rows["key"][0].dtype)
    if kept:
        for name, (weight, shift) in rows.items():
            layer = made.get_submodule(name)
            layer.weight.copy_(weight)  # pyright: ignore
            if bias:
                layer.bias.copy_(torch.zeros(len(weight)) if shift is None else shift)  # pyright: ignore
    return made


def _rows(layer: Any, inner: int | None, part: int, fused: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection, or of one of the three in a fused one."""
    place = slice(part * inner, (part + 1) * inner) if fused and inner is not None else slice(None)
    return layer.weight[place], None if layer.bias is None else layer.bias[place]

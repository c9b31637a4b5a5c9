"""Heads: remove attention heads (rows of q, k and v, columns of the output projection).

Paper: Are Sixteen Heads Really Better than One? (Michel et al., 2019, arXiv 1905.10650) removes whole heads; the score
here is the exact expected squared error of the attention's output, from the second moment C of what the heads give:

    score_u = E ||W_o[:, u] x_u||^2 = trace(W_o[:, u] C_u W_o[:, u]^T)

A unit u is a key-value head with all its query heads, or one query head of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.anatomy import HEADS, KV_HEADS, Attention, anatomy, needs_blocks, to_linear_
from lilliput.graph import kept_count
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.prune._surgery import average_inputs, keep_columns_, keep_rows_, plain, refuse_replaced, select
from lilliput.workload import Workload


def head_scores(output: Tensor, moments: Tensor) -> Tensor:
    """(out, u * w) output projection and (u, w, w) second moments of its input -> (u,) expected squared error."""
    units, width = moments.shape[:2]
    blocks = output.float().reshape(-1, units, width)
    return torch.einsum("ouv,uvw,ouw->u", blocks, moments.float(), blocks)


def norm_scores(output: Tensor, value: Tensor, units: int) -> Tensor:
    """(out, u * w) output and (heads * d, in) value projection -> (u,) product of squared norms, without data.

    A value head that serves several units counts for each of them.
    """
    outer = output.float().square().sum(0).reshape(units, -1).sum(1)
    rows = value.float().square().sum(1)
    inner = rows.reshape(units, -1) if units <= len(rows) and len(rows) % units == 0 else rows[None].expand(units, -1)
    return outer * inner.sum(1)


def rows_of(heads: Tensor, head_dim: int) -> Tensor:
    """Indices of heads -> indices of their rows."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


@dataclass(frozen=True)
class Heads(Method):
    """Remove the attention heads that the output misses least; the width of a head stays."""

    ratio: float = knob(0.25, low=0.0, high=0.95, per_layer=True, help="share of a block's heads to remove")
    unit: str = knob(
        "group",
        choices=("group", "query"),
        help="group: a key-value head with all its query heads; query: as many query heads in every group",
    )

    facts: ClassVar[Facts] = Facts(
        stage="prune",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="faster, smaller, smaller KV-cache when whole groups go",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the attention modules (anatomy's `Attention.name`). Raises UserError without transformer blocks."""
        found = [b.attention for b in needs_blocks(model, self.name()).blocks if b.attention]
        fit = _attentions(model)
        if not fit:
            refuse_replaced(model, [n for a in found for n in (a.q, a.k, a.v, a.o)], self.name())
        yield from fit

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        to_linear_(model)
        attentions = {name: a for name, a in _attentions(model).items() if name in layers}
        scores = _scores(model, workload, attentions)
        for name, attention in attentions.items():
            _cut_(model, attention, *choose(attention, layers[name], scores[name]))
        return model


def choose(attention: Attention, settings: Heads, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(heads,) scores -> indices of the query heads and of the key-value heads that stay; never none."""
    per_group = scores.reshape(attention.kv_heads, -1)
    groups, queries = per_group.shape
    everything = torch.arange(attention.heads).reshape(groups, queries)
    if settings.unit == "query" and queries > 1:
        keep = kept_count(queries, settings.ratio)
        stays = torch.stack([everything[g, select(per_group[g], keep)] for g in range(groups)])
        return stays.flatten(), torch.arange(groups)
    kept = select(per_group.sum(1), kept_count(groups, settings.ratio))
    return everything[kept].flatten(), kept


def _attentions(model: nn.Module) -> dict[str, Attention]:
    """Name -> parts of every attention made of ordinary linear layers whose heads are known."""
    found = [b.attention for b in anatomy(model).blocks if b.attention]
    fit = [a for a in found if a.heads and a.kv_heads and a.heads % a.kv_heads == 0]
    return {a.name: a for a in fit if plain(model, {a.q, a.k, a.v, a.o})}


def _layer(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _scores(model: nn.Module, workload: Workload | None, attentions: Mapping[str, Attention]) -> dict[str, Tensor]:
    """Name -> (heads,) scores; from norms alone when there is no data."""
    if workload is None:
        return {name: _norm_scores(model, a) for name, a in attentions.items()}
    heads = {a.o: a.heads for a in attentions.values()}

    def statistic(name: str, _: nn.Module, x: Tensor) -> Tensor:
        rows = x.reshape(-1, heads[name], x.shape[-1] // heads[name])
        return torch.einsum("nuv,nuw->uvw", rows, rows) / len(rows)

    moments = average_inputs(model, workload, heads, statistic)
    return {n: head_scores(_layer(model, a.o).weight.detach(), moments[a.o]) for n, a in attentions.items()}


def _norm_scores(model: nn.Module, a: Attention) -> Tensor:
    value = _layer(model, a.v).weight.detach()[-a.kv_heads * a.head_dim :]
    value = value.reshape(a.kv_heads, a.head_dim, -1).repeat_interleave(a.heads // a.kv_heads, 0).flatten(0, 1)
    return norm_scores(_layer(model, a.o).weight.detach(), value, a.heads)


def _cut_(model: nn.Module, a: Attention, queries: Tensor, kv: Tensor) -> None:
    if len(queries) == a.heads:
        return
    q, k = rows_of(queries, a.head_dim), rows_of(kv, a.head_dim)
    if a.fused:
        q_rows, k_rows = a.heads * a.head_dim, a.kv_heads * a.head_dim
        keep_rows_(_layer(model, a.q), torch.cat((q, q_rows + k, q_rows + k_rows + k)))
    else:
        keep_rows_(_layer(model, a.q), q)
        if len(kv) < a.kv_heads:
            keep_rows_(_layer(model, a.k), k)
            keep_rows_(_layer(model, a.v), k)
    keep_columns_(_layer(model, a.o), q)
    _set_counts_(_layer(model, a.name), len(queries), len(kv), a.head_dim)


def _set_counts_(module: nn.Module, heads: int, kv_heads: int, head_dim: int) -> None:
    """The numbers an attention's forward reads, whichever of them it has; its shared config is left alone."""
    counts = dict.fromkeys(HEADS, heads) | dict.fromkeys(KV_HEADS, kv_heads)
    counts |= {"num_key_value_groups": heads // kv_heads}
    counts |= dict.fromkeys(("all_head_size", "split_size", "inner_dim"), heads * head_dim)
    for name, value in counts.items():
        if type(getattr(module, name, None)) is int:
            setattr(module, name, value)

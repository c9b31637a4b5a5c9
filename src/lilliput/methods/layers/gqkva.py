"""Grouped queries, and grouped keys and values: heads are pairs of a few distinct queries and a few distinct states.

Paper: GQKVA: Efficient Pre-training of Transformers by Grouping Queries, Keys, and Values (Javadi et al., 2023, arXiv
2311.03426). Of h heads, with g_q distinct projections of queries and g_kv of keys and values,

    head_n = softmax(Q_i K_j^T / sqrt(d)) V_j,      i = n mod g_q,      j = n div (h / g_kv),      g_q g_kv >= h

No two heads are alike: with g_q g_kv = h each query meets each key. Multi-head attention is (h, h), grouped-query
attention (h, g), multi-query attention (h, 1), grouped keys and values alone or queries alone lie between. The order of
the pairs, where the paper names only the cases, and the start from trained heads are ours (reconstructed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.anatomy import Attention
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, Facts, Method, knob
from lilliput.methods.layers._grouped_vision import GroupedSelfAttention
from lilliput.methods.layers._head_rows import note_in_config_, rows, set_rows_
from lilliput.methods.layers._known import known_attentions
from lilliput.methods.layers._span_layers import GroupedAttention
from lilliput.methods.prune._surgery import plain, refuse_replaced
from lilliput.workload import Workload
from lilliput.zoo import nets


@dataclass(frozen=True)
class Gqkva(Method):
    """Let heads share queries, or keys and values; for Llama-type decoders and the zoo's vision transformers.

    With both numbers 0 the pair with the fewest weights is taken. Train the model afterwards, or give an untrained one
    with `init="first"`. One whose queries are all distinct stays an ordinary model of its family.
    """

    queries: int = knob(0, low=0, high=256, per_layer=True, help="distinct queries; 0: as few as states allow")
    states: int = knob(0, low=0, high=256, per_layer=True, help="distinct keys and values; 0: as few as queries allow")
    init: str = knob(
        "mean",
        choices=("mean", "first"),
        help="mean: of the heads of a group, for a trained model; first: one of them, as wide as an untrained one's",
    )

    paper: ClassVar[str] = "gqkva"
    facts: ClassVar[Facts] = Facts(
        stage="factorize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        effect="smaller KV-cache, smaller; at a loss of quality until it is trained",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the attentions with several heads. Raises UserError for unknown kinds and replaced layers."""
        found = known_attentions(model, self.name(), nets.Attention)
        fit = [name for name, a in found.items() if a.heads > 1 and plain(model, (a.q, a.k, a.v, a.o))]
        if not fit:
            refuse_replaced(model, [n for a in found.values() for n in (a.q, a.k, a.v, a.o)], self.name())
        yield from fit

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        found = known_attentions(model, self.name(), nets.Attention)
        for name, settings in layers.items():
            regroup_(model, found[name], *settings.groups(found[name]), settings.init)
        note_in_config_(model)
        return model

    def groups(self, a: Attention) -> tuple[int, int]:
        """(distinct queries, distinct keys and values) of an attention. Raises UserError for what does not fit it."""
        pairs = [pair for pair in possible(a) if self.queries in (0, pair[0]) and self.states in (0, pair[1])]
        if not pairs:
            known = ", ".join(f"{q} and {s}" for q, s in possible(a))
            raise UserError(
                f"queries={self.queries}, states={self.states} do not give {a.heads} different heads of {a.name!r}, "
                f"which has {a.kv_heads} keys and values; give one of: {known}"
            )
        return min(pairs, key=lambda pair: (pair[0] + 2 * pair[1], -pair[1]))


def possible(a: Attention) -> list[tuple[int, int]]:
    """Every (distinct queries, distinct keys and values) whose pairs make `a.heads` different heads."""
    return [(q, s) for q in divisors(a.heads) for s in divisors(a.kv_heads) if q * s >= a.heads]


def divisors(n: int) -> list[int]:
    """The whole numbers that divide n, rising."""
    return [i for i in range(1, n + 1) if n % i == 0]


@torch.no_grad()
def regroup_(model: nn.Module, a: Attention, queries: int, states: int, init: str) -> None:
    """Fewer rows in the projections of an attention, and in its place one that pairs them."""
    if (queries, states) == (a.heads, a.kv_heads):
        return
    heads = torch.arange(a.heads)
    pooled_(model.get_submodule(a.q), heads.view(-1, queries).T, a.head_dim, init)
    for name in (a.k, a.v):
        pooled_(model.get_submodule(name), torch.arange(a.kv_heads).view(states, -1), a.head_dim, init)
    attention: Any = model.get_submodule(a.name)
    new = replace(a, kv_heads=states)
    if type(attention) is nets.Attention:
        set_module(model, a.name, GroupedSelfAttention.of(model, new))
    elif queries < a.heads:
        set_module(model, a.name, GroupedAttention.of(model, new))
    else:
        attention.num_key_value_groups = a.heads // states


def pooled_(layer: nn.Module, groups: Tensor, head_dim: int, init: str) -> None:
    """One head for each group (groups, members) of the heads of a projection."""
    members = rows(layer).unflatten(0, (-1, head_dim))[groups]  # (groups, members, d, inputs)
    set_rows_(layer, (members.mean(1) if init == "mean" else members[:, 0]).flatten(0, 1))

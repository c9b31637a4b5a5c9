"""Fewer key-value heads: one in the place of each group of t, fitted to the keys and values that the group cached.

Paper: Effectively Compress KV Heads for LLM (Yu et al., 2024, arXiv 2406.07056): what a group caches has low rank, so
the leading singular vectors of the activations, not the mean of the heads, make the head that stays for it.

    values   [V_1 .. V_t] ~ [V_1 .. V_t] P P^T,  P (t d, d) orthonormal:     W_v <- P^T W_v,     W_o,i <- W_o,i P_i
    keys     z_ij ~ u_ij s_j,  s_j = sum_i conj(u_ij) z_ij,  |u_j| = 1:     W_k <- u^H W_k,     W_q,i <- conj(u_i) W_q,i

z_ij is the j-th rotary pair of key head i as one complex number. RoPE turns it by an angle that depends on the position
and on j alone, so it commutes with u: what is cached, after RoPE, is exactly the projection of what was cached before,
and u_j, the leading singular vector of the pairs j of all heads, is the best of all such projections. The result is an
ordinary model with fewer heads. That the keys are reconstructed pair by pair is ours (reconstructed): the paper has a
treatment of keys under RoPE of its own. Heal the model afterwards with distill.logits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import Attention
from lilliput.errors import UserError
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.layers._head_rows import note_in_config_, rows, set_rows_, set_weight_
from lilliput.methods.layers._known import known_attentions
from lilliput.methods.prune._surgery import average_inputs, plain, refuse_replaced
from lilliput.workload import Workload, need_workload

Groups = list[tuple[int, ...]]


@dataclass(frozen=True)
class KvHeads(Method):
    """Compress the key-value heads of a rotary decoder to fewer, so that its cache is as much smaller.

    `fit="mean"` is the conversion of the GQA paper (arXiv 2305.13245): the mean of the heads, the rest unchanged. The
    config says the new number when all layers have it.
    """

    heads: int = knob(1, low=1, high=256, per_layer=True, help="key-value heads that stay; must divide those there are")
    fit: str = knob("svd", choices=("svd", "mean"), help="svd: of cached keys and values; mean: of the heads' weights")
    grouping: str = knob(
        "similar",
        choices=("similar", "adjacent", "random"),
        help="similar: heads that lose least together; adjacent: neighbours; random: drawn by the seed",
    )
    seed: int = knob(0, low=0, help="of random groups")

    paper: ClassVar[str] = "kv_heads"
    facts: ClassVar[Facts] = Facts(
        stage="factorize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="smaller KV-cache, smaller",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the attentions with two key-value heads or more. Raises UserError for layers that were replaced."""
        found = known_attentions(model, self.name())
        fit = [name for name, a in found.items() if a.kv_heads > 1 and plain(model, (a.q, a.k, a.v, a.o))]
        if not fit:
            refuse_replaced(model, [n for a in found.values() for n in (a.q, a.k, a.v, a.o)], self.name())
        yield from fit

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        found = {name: a for name, a in known_attentions(model, self.name()).items() if name in layers}
        for name, a in found.items():
            _check(name, a, layers[name].heads)
        wanted = {name: a for name, a in found.items() if layers[name].needs_data}
        grams = _grams(model, need_workload(workload, self.name(), "to see keys and values"), wanted) if wanted else {}
        for name, a in found.items():
            if layers[name].heads < a.kv_heads:
                groups = layers[name].groups(a, grams.get(name))
                maps = [layers[name].head_map(a, grams.get(name), members) for members in groups]
                fold_(model, a, groups, maps)
        note_in_config_(model)
        return model

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is looked at."""
        return self.fit == "svd" or self.grouping == "similar"

    def groups(self, a: Attention, grams: Grams | None) -> Groups:
        """Which of the old heads each new one stands for."""
        order = list(range(a.kv_heads))
        if self.grouping == "random":
            order = torch.randperm(a.kv_heads, generator=torch.Generator().manual_seed(self.seed)).tolist()
        size = a.kv_heads // self.heads
        groups = [tuple(sorted(order[i : i + size])) for i in range(0, a.kv_heads, size)]
        return groups if self.grouping != "similar" or grams is None else exchanged(groups, grams.lost)

    def head_map(self, a: Attention, grams: Grams | None, members: tuple[int, ...]) -> HeadMap:
        """The new head of one group."""
        if self.fit == "mean" or grams is None:
            return mean_map(len(members), a.head_dim)
        return svd_map(grams.keys_of(members), grams.values_of(members))


def _check(name: str, a: Attention, heads: int) -> None:
    if a.kv_heads % heads:
        known = ", ".join(str(n) for n in range(1, a.kv_heads + 1) if a.kv_heads % n == 0)
        raise UserError(f"heads is {heads!r}, but {name!r} has {a.kv_heads} key-value heads; give one of {known}")


# --- what a group caches, and the head that stands for it ------------------------------------------------------------


@dataclass(eq=False)
class Grams:
    """Second moments of the keys and of the values of one attention, (heads, d, heads, d) each."""

    keys: Tensor
    values: Tensor

    def keys_of(self, members: Sequence[int]) -> Tensor:
        return _block(self.keys, members)

    def values_of(self, members: Sequence[int]) -> Tensor:
        return _block(self.values, members)

    @functools.cached_property
    def lost(self) -> Callable[[tuple[int, ...]], float]:
        """Members of a group -> share of the keys' energy plus share of the values' that one head for them loses."""
        energies = [float(gram.flatten(2).flatten(0, 1).diagonal().sum()) for gram in (self.keys, self.values)]
        of_keys, of_values = (max(energy, 1e-30) for energy in energies)

        @functools.cache
        def share(members: tuple[int, ...]) -> float:
            keys = torch.linalg.eigvalsh(pair_moments(self.keys_of(members)))[:, :-1].sum()
            width = self.values.shape[1]
            values = torch.linalg.eigvalsh(self.values_of(members).flatten(2).flatten(0, 1))[:-width].sum()
            return float(keys) / of_keys + float(values) / of_values

        return share


def _block(gram: Tensor, members: Sequence[int]) -> Tensor:
    chosen = torch.tensor(members)
    return gram[chosen][:, :, chosen]


def pair_moments(gram: Tensor) -> Tensor:
    """(t, d, t, d) second moments of keys -> (d / 2, t, t) complex E[z_j z_j^H] of the rotary pairs of all heads."""
    first, second = gram.chunk(2, dim=1)
    (aa, ab), (ba, bb) = ([part.diagonal(dim1=1, dim2=3) for part in half.chunk(2, dim=3)] for half in (first, second))
    return torch.complex(aa + bb, ba - ab).movedim(-1, 0)


class HeadMap(NamedTuple):
    """One head for t old ones: s = sum_i down_i z_i and z_i ~ up_i s, for the rotary pairs and for the values."""

    key_down: Tensor  # (t, d / 2) complex
    key_up: Tensor  # (t, d / 2) complex
    value_down: Tensor  # (t, d, d)
    value_up: Tensor  # (t, d, d)


def svd_map(keys: Tensor, values: Tensor) -> HeadMap:
    """The map with the smallest squared error, from second moments (t, d, t, d)."""
    heads, width = values.shape[:2]
    up = torch.linalg.eigh(pair_moments(keys)).eigenvectors[..., -1].T
    vectors = torch.linalg.eigh(values.flatten(2).flatten(0, 1)).eigenvectors[:, -width:].unflatten(0, (heads, width))
    return HeadMap(up.conj(), up, vectors.transpose(1, 2), vectors)


def mean_map(heads: int, width: int) -> HeadMap:
    """The mean of the heads, which then stands for each of them."""
    ones, same = torch.ones(heads, width // 2, dtype=torch.complex128), torch.eye(width, dtype=torch.float64)
    each = same.expand(heads, width, width)
    return HeadMap(ones / heads, ones, each / heads, each)


def exchanged(groups: Groups, lost: Callable[[tuple[int, ...]], float]) -> Groups:
    """The groups after every exchange of two heads that lowers what is lost, until none does."""
    groups, going = list(groups), True
    while going:
        going = False
        for a, b in itertools.combinations(range(len(groups)), 2):
            for x, y in itertools.product(groups[a], groups[b]):
                pair = _swap(groups[a], x, y), _swap(groups[b], y, x)
                if sum(map(lost, pair)) < lost(groups[a]) + lost(groups[b]) - 1e-12:
                    groups[a], groups[b] = pair
                    going = True
                    break
    return groups


def _swap(group: tuple[int, ...], old: int, new: int) -> tuple[int, ...]:
    return tuple(sorted(new if member == old else member for member in group))


def _grams(model: nn.Module, work: Workload, attentions: Mapping[str, Attention]) -> dict[str, Grams]:
    """Second moments before RoPE; those of rotary pairs are the same after it."""

    def gram(name: str, layer: Any, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.float()
        cached = F.linear(x, layer.weight.float(), bias).flatten(0, -2).double()
        return cached.T @ cached / len(cached)

    names = [layer for a in attentions.values() for layer in (a.k, a.v)]
    found = average_inputs(model, work, names, gram)
    shapes = {name: (a.kv_heads, a.head_dim) * 2 for name, a in attentions.items()}
    return {n: Grams(found[a.k].view(shapes[n]), found[a.v].view(shapes[n])) for n, a in attentions.items()}


# --- the weights -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_(model: nn.Module, a: Attention, groups: Groups, maps: Sequence[HeadMap]) -> None:
    """Put the new heads into the four projections; query heads move to stand behind the head that they now read."""
    q, k, v, o = (model.get_submodule(name) for name in (a.q, a.k, a.v, a.o))
    queries = rows(q).unflatten(0, (a.kv_heads, -1, a.head_dim))  # (kv heads, queries of each, d, inputs)
    keys, values = (rows(layer).unflatten(0, (a.kv_heads, a.head_dim)) for layer in (k, v))
    columns = o.weight.double().unflatten(1, (a.kv_heads, -1, a.head_dim))  # pyright: ignore
    new: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "o": []}
    for members, one in zip(map(list, groups), maps):
        new["q"].append(_real(one.key_up.conj()[:, None, :, None] * _pairs(queries[members])))
        new["k"].append(_real((one.key_down[..., None] * _pairs(keys[members])).sum(0)))
        new["v"].append(torch.einsum("tab,tbn->an", one.value_down, values[members]))
        new["o"].append(torch.einsum("otrb,tba->otra", columns[:, members], one.value_up))
    set_rows_(q, torch.cat(new["q"]).flatten(0, 2))
    set_rows_(k, torch.cat(new["k"]))
    set_rows_(v, torch.cat(new["v"]))
    set_weight_(o, torch.cat(new["o"], 1).flatten(1))
    attention: Any = model.get_submodule(a.name)
    attention.num_key_value_groups = a.heads // len(groups)


def _pairs(x: Tensor) -> Tensor:
    """(..., d, n) -> (..., d / 2, n) complex: the halves of a head that RoPE turns together."""
    return torch.complex(*x.chunk(2, -2))


def _real(z: Tensor) -> Tensor:
    """The inverse of `_pairs`."""
    return torch.cat([z.real, z.imag], -2)

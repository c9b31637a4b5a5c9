"""Which layers form a span, and the method that makes spans; what they reuse is said by the two that extend it.

A layer reuses what the nearest layer before it that does not reuse has handed on: a span is a run of such layers behind
the one that they all follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import Attention
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating
from lilliput.method import Method, knob
from lilliput.methods.layers._known import known_attentions
from lilliput.methods.layers._span_layers import SpanAttention, past_seen
from lilliput.workload import Batch, Workload, need_workload

WINDOWS = 8  # calibration windows on which attention is compared
UNFIT = float("-inf")


@dataclass(frozen=True)
class Spans(Method):
    """Base of the methods by which layers reuse what an earlier one computes: the settings and the surgery."""

    share: float = knob(0.25, low=0.01, high=0.95, help="share of layers that reuse; unused when layers names them")
    choice: str = knob(
        "similar",
        choices=("similar", "last"),
        help="similar: where attention is most alike on the calibration data; last: the last layers, one span",
    )
    leading: ClassVar[type[SpanAttention]]
    following: ClassVar[type[SpanAttention]]

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the attentions but the first, which has none to reuse. Raises UserError for unknown kinds."""
        yield from list(known_attentions(model, self.name(), self.leading))[1:]

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        self.share_(model, self.plan(model, workload, list(layers)))
        return model

    def plan(self, model: nn.Module, workload: Workload | None, layers: Sequence[str]) -> dict[str, str]:
        """The attentions that reuse another's -> whose: those of `layers`, or when these are all that can, of `share`.

        Raises UserError where one cannot serve the other.
        """
        found = known_attentions(model, self.name(), self.leading)
        named = len(layers) < len(found) - 1
        chosen = followers(list(found), layers) if named else self._chosen(model, workload, found)
        for follower, leader in chosen.items():
            if not fit(model, found[leader], found[follower]):
                raise UserError(f"{follower!r} cannot reuse what {leader!r} computes: their heads or windows differ")
        return chosen

    def share_(self, model: nn.Module, chosen: Mapping[str, str], idle: bool = False) -> None:
        """Put a plan into effect; with `idle` those that reuse keep the layers that are no longer called."""
        found = known_attentions(model, self.name(), self.leading)
        for leader in dict.fromkeys(chosen.values()):
            set_module(model, leader, self.leading.of(model, found[leader]))
        for follower in chosen:
            set_module(model, follower, self.following.of(model, found[follower], idle))

    def _chosen(self, model: nn.Module, workload: Workload | None, found: Mapping[str, Attention]) -> dict[str, str]:
        names = list(found)
        count = min(len(names) - 1, max(1, round(self.share * len(names))))
        if self.choice == "last":
            return followers(names, names[-count:])
        if any(type(model.get_submodule(name)) is self.leading for name in names):
            raise UserError(f"{self.name()} compared the layers of this model before; name the layers or choice='last'")
        work = need_workload(workload, self.name(), "to compare the layers' attention (or choice='last')")
        return {names[f]: names[s] for f, s in spans(similarities(model, work, found), count).items()}


def followers(names: Sequence[str], reusing: Sequence[str]) -> dict[str, str]:
    """Each of the layers that reuse -> the nearest before it that does not. The first of all cannot be among them."""
    leader, found = names[0], {}
    for name in names[1:]:
        if name in reusing:
            found[name] = leader
        else:
            leader = name
    return found


def fit(model: nn.Module, leader: Attention, follower: Attention) -> bool:
    """Whether two attentions have the same heads and see the same part of the past."""

    def kind(a: Attention) -> tuple:
        module: Any = model.get_submodule(a.name)
        return a.heads, a.kv_heads, a.head_dim, module.scaling, *past_seen(module)

    return kind(leader) == kind(follower)


def spans(similarity: Tensor, count: int) -> dict[int, int]:
    """The `count` layers that reuse another's attention -> whose, so that the sum of their similarities is largest.

    similarity (layers, layers): of a layer (row) and a later one (column), UNFIT where one cannot serve the other. By
    dynamic programming over where spans begin. Raises UserError when so many cannot reuse.
    """
    layers = len(similarity)
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{0: (0.0, ())}]  # reusing so far -> sum, starts of spans
    for end in range(1, layers + 1):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start in range(end):
            gain, more = float(similarity[start, start + 1 : end].sum()), end - start - 1
            for used, (total, starts) in best[start].items():
                if used + more <= count and total + gain > reached.get(used + more, (UNFIT,))[0]:
                    reached[used + more] = total + gain, (*starts, start)
        best.append(reached)
    if count not in best[-1]:
        raise UserError(f"{count} of {layers} layers cannot reuse the attention of a layer before them; lower share")
    ends = [*best[-1][count][1], layers]
    return {i: start for start, end in itertools.pairwise(ends) for i in range(start + 1, end)}


@torch.no_grad()
def similarities(model: Any, work: Workload, found: Mapping[str, Attention]) -> Tensor:
    """(layers, layers) for `spans`: the mean over heads and windows of the cosine of two layers' attention matrices."""
    names, seen = list(found), dict[str, Tensor]()
    pairs = [(i, j) for i, j in itertools.combinations(range(len(names)), 2)
             if fit(model, found[names[i]], found[names[j]])]  # fmt: skip
    total, windows = torch.full((len(names), len(names)), UNFIT), _windows(work)
    for i, j in pairs:
        total[i, j] = 0.0
    with _probabilities(model, names, seen.__setitem__), evaluating(model):
        for window in windows:
            work.forward(model, window)
            for i, j in pairs:
                a, b = (seen[names[k]].float().flatten(2) for k in (i, j))
                total[i, j] += F.cosine_similarity(a, b, dim=-1).mean() / len(windows)
    return total


def _windows(work: Workload) -> list[Batch]:
    """Calibration windows one by one, so that the attention of all layers fits into memory."""
    rows = ({k: v[i : i + 1] for k, v in b.items()} for b in work.calibration for i in range(len(b["input_ids"])))
    return list(itertools.islice(rows, WINDOWS))


@contextmanager
def _probabilities(model: Any, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `see(name, attention)` whenever an attention runs, which it does in transformers' eager implementation."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: see(name, out[1]))
        for name in names
    ]
    try:
        with attached(handles):
            yield
    finally:
        model.set_attn_implementation(before)

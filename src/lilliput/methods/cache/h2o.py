"""Heavy hitters: the tokens that drew the most attention so far, beside the last ones.   s_i = sum over queries of p_i

Each head of keys adds up its own attention probabilities, the mean over the query heads that share it. Old tokens have
had more queries to collect from; `cache.roco` takes the mean instead. What it costs: a second product of queries and
keys beside the model's own attention, and its softmax in float32 (see `_attention`).

Paper: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lilliput.method import CachePolicy, Facts, knob
from lilliput.methods.cache._cache import PolicyCache
from lilliput.methods.cache._evicting import EvictingLayer, evicting_cache


class HeavyHitterLayer(EvictingLayer):
    """The entry with the smallest sum of attention goes first, but the last `newest` tokens stay."""

    scores = ("total",)
    watches = True
    total: Tensor

    def __init__(self, budget: int, newest: int):
        super().__init__(budget)
        self.newest = newest

    def observe(self, probability: Tensor) -> None:
        self.total += probability.sum(2)

    def priority(self) -> Tensor:
        return self.total.masked_fill(self.among_last(self.newest), float("inf"))


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Keep the tokens with the largest accumulated attention and the last ones."""

    budget: int = knob(256, low=1, help="tokens that are kept")
    recent: float = knob(0.5, low=0.0, high=1.0, help="share of them for the last tokens, at least one")

    facts: ClassVar[Facts] = Facts(stage="serve", effect="smaller cache")

    def cache(self, model: nn.Module) -> PolicyCache:
        newest = max(1, int(self.budget * self.recent))
        return evicting_cache(self, model, lambda: HeavyHitterLayer(self.budget, newest))

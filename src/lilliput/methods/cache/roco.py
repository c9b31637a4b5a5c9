"""RoCo: lowest mean attention goes first, except where attention varies most.   m_i = s_i / n_i, d_i = std of p_i

n_i counts the queries that saw token i, so an old token has no advantage over a young one. Tokens whose probabilities
vary much are kept whatever their mean: their importance is not settled. The last tokens are kept too, as their
statistics rest on few queries. How many of each are protected is (reconstructed). What it costs: a second product of
queries and keys beside the model's own attention, and its softmax in float32 (see `_attention`).

Paper: On the Efficacy of Eviction Policy for Key-Value Constrained Generative Language Model Inference (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import CachePolicy, Facts, knob
from lilliput.methods.cache._cache import PolicyCache
from lilliput.methods.cache._evicting import EMPTY, EvictingLayer, evicting_cache


class MeanAttentionLayer(EvictingLayer):
    """The entry with the smallest mean of attention goes first, but the `varied` ones with the largest standard
    deviation and the last `newest` tokens stay."""

    scores = ("total", "squares")
    watches = True
    total: Tensor
    squares: Tensor

    def __init__(self, budget: int, varied: int, newest: int):
        super().__init__(budget)
        self.varied, self.newest = varied, newest

    def observe(self, probability: Tensor) -> None:
        self.total += probability.sum(2)
        self.squares += probability.square().sum(2)

    def priority(self) -> Tensor:
        count = (self.length[:, None, None] - self.positions).clamp_min(1)  # its own query is the first that sees it
        mean = self.total / count
        deviation = (self.squares / count - mean.square()).clamp_min(0).sqrt()
        newest = self.among_last(self.newest)
        varied = deviation.masked_fill(newest | (self.positions == EMPTY), -1.0).topk(self.varied, sorted=False).indices
        return mean.masked_fill(newest.scatter(2, varied, True), float("inf"))


@dataclass(frozen=True)
class RoCo(CachePolicy):
    """Keep the tokens with the largest mean attention, those whose attention varies most, and the last ones."""

    budget: int = knob(256, low=1, help="tokens that are kept")
    varied: float = knob(0.25, low=0.0, high=1.0, help="share of them with the largest deviation of attention")
    recent: float = knob(0.25, low=0.0, high=1.0, help="share of them for the last tokens, at least one")

    facts: ClassVar[Facts] = Facts(stage="serve", effect="smaller cache")

    def __post_init__(self):
        super().__post_init__()
        if self.varied + self.recent > 1:
            raise UserError(f"RoCo.varied is {self.varied} and recent {self.recent}; give shares of at most 1 together")

    def cache(self, model: nn.Module) -> PolicyCache:
        newest = max(1, int(self.budget * self.recent))
        varied = min(int(self.budget * self.varied), self.budget - newest)
        return evicting_cache(self, model, lambda: MeanAttentionLayer(self.budget, varied, newest))

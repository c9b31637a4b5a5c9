"""A window of the last tokens, and the first ones as attention sinks.

Models put attention that they have no use for on the first tokens; a window without them breaks down, with them it
goes on as long as the positions do. The paper counts positions inside the cache; here they stay those of the text.

Paper: Efficient Streaming Language Models with Attention Sinks (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import CachePolicy, Facts, knob
from lilliput.methods.cache._cache import PolicyCache
from lilliput.methods.cache._evicting import EvictingLayer, evicting_cache


class SlidingLayer(EvictingLayer):
    """The oldest entry goes first, but the first `sinks` tokens stay."""

    def __init__(self, budget: int, sinks: int):
        super().__init__(budget)
        self.sinks = sinks

    def priority(self) -> Tensor:
        return self.positions.float().masked_fill(self.positions < self.sinks, float("inf"))


@dataclass(frozen=True)
class Sliding(CachePolicy):
    """Keep the first few tokens of a text and a window of the last ones."""

    budget: int = knob(256, low=1, help="tokens that are kept: the sinks and the window")
    sinks: int = knob(4, low=0, help="how many of them are the first ones")

    facts: ClassVar[Facts] = Facts(stage="serve", effect="smaller cache")

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1:
            raise UserError(
                f"Sliding.sinks is {self.sinks}, which leaves a window of {self.window} tokens in a budget of "
                f"{self.budget}; give fewer sinks or a larger budget"
            )

    @property
    def window(self) -> int:
        """How many of the last tokens are kept."""
        return self.budget - self.sinks

    def cache(self, model: nn.Module) -> PolicyCache:
        return evicting_cache(self, model, lambda: SlidingLayer(self.budget, self.sinks))

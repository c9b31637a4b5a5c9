"""Which expert leaves memory when another needs its place. Policies for `lilliput.paged_store`.

Keys are layer * experts + expert. Among equals the lowest key leaves. `enter` says where in the model a pass is; the
store itself calls `touch` for every key of a request and `victim` when it is full.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any


class ExpertPolicy:
    """The expert of highest `staleness` leaves; those that are in use now stay."""

    def __init__(self, layers: int, experts: int):
        self.layers, self.experts = layers, experts
        self.layer, self.in_use, self.ahead = 0, frozenset[int](), False
        self.used: dict[int, int] = {}  # key -> step of its last request

    def enter(self, layer: int, in_use: frozenset[int], ahead: bool = False) -> None:
        """What the next request of the store is for: this layer, which needs `in_use`, or with `ahead` later ones."""
        self.layer, self.in_use, self.ahead = layer, in_use, ahead

    def touch(self, key: int, step: int) -> None:
        """`key` was asked for at `step`."""
        self.used[key] = step

    def victim(self, keys: Set[int], step: int) -> int:
        """The one of `keys` that leaves."""
        return max(sorted(keys - self.in_use or keys), key=lambda key: self.staleness(key, step))

    def staleness(self, key: int, step: int) -> Any:
        """What is compared; the highest leaves."""
        raise NotImplementedError


class Lru(ExpertPolicy):
    """Least recently used."""

    def staleness(self, key: int, step: int) -> int:
        return -self.used[key]


class Lfu(ExpertPolicy):
    """Least frequently used since the store was opened, evicted or not; among equals the least recently used."""

    def __init__(self, layers: int, experts: int):
        super().__init__(layers, experts)
        self.uses: Counter[int] = Counter()

    def touch(self, key: int, step: int) -> None:
        super().touch(key, step)
        self.uses[key] += not self.ahead

    def staleness(self, key: int, step: int) -> tuple[int, int]:
        return -self.uses[key], -self.used[key]


class Fifo(ExpertPolicy):
    """First in, first out."""

    def __init__(self, layers: int, experts: int):
        super().__init__(layers, experts)
        self.entered: dict[int, int] = {}

    def touch(self, key: int, step: int) -> None:
        self.entered.setdefault(key, step)

    def victim(self, keys: Set[int], step: int) -> int:
        found = super().victim(keys, step)
        del self.entered[found]
        return found

    def staleness(self, key: int, step: int) -> int:
        return -self.entered[key]


class LeastStale(ExpertPolicy):
    """The expert whose layer comes round last leaves (SpecMD, arXiv 2602.03921).

    Experts of the layer that runs and of those before it were used in this pass or are left over, and a layer just
    passed is the farthest from coming round; experts of layers ahead stay, the nearest longest. The paper's exact rule
    is not public: this one is reconstructed from its description, and so is the order within a layer, the least
    recently used first.
    """

    def staleness(self, key: int, step: int) -> tuple[int, int]:
        rounds = (key // self.experts - self.layer) % self.layers or self.layers
        return rounds, -self.used[key]


class Belady(ExpertPolicy):
    """The expert that is needed again last leaves: the best possible without fetching ahead, for a known future.

    `future` holds the keys that each step asks for, from step 1 on.
    """

    def __init__(self, layers: int, experts: int, future: Sequence[Sequence[int]]):
        super().__init__(layers, experts)
        self.steps: dict[int, list[int]] = {}
        for step, keys in enumerate(future, 1):
            for key in keys:
                self.steps.setdefault(key, []).append(step)

    def staleness(self, key: int, step: int) -> float:
        steps = self.steps.get(key, [])
        place = bisect_right(steps, step)
        return steps[place] if place < len(steps) else float("inf")


POLICIES: Mapping[str, type[ExpertPolicy]] = {"least_stale": LeastStale, "lru": Lru, "lfu": Lfu, "fifo": Fifo}
BELADY = "belady"

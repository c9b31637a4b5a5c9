"""Experts that a cache of limited bytes holds: what each layer needs is brought in, what later ones may need ahead.

The same code drives the store on disk (`lilliput.paged_store`) and the store without content that replays use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from lilliput.errors import UserError
from lilliput.methods.experts._policies import ExpertPolicy

Guess = tuple[int, int]  # layer, expert
Use = Callable[[Sequence[int], Any], None]  # experts of a layer that are in memory now, and their places


class Store(Protocol):
    """What a pager needs of a paged store."""

    slots: int

    def __contains__(self, key: int, /) -> bool: ...

    def hold(self, keys: list[int], step: int) -> Any:
        """Bring the records of `keys` into memory and give their places."""
        ...


@dataclass
class Tally:
    """Counts of experts. A hit was in memory when its layer asked for it; `foreseen` of the hits were fetched ahead."""

    hits: int = 0
    misses: int = 0
    foreseen: int = 0
    collisions: int = 0  # of the misses: fetched ahead in this pass, and gone before they were used
    fetched_ahead: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the asked experts that were in memory, 0 when none was asked."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def loads(self) -> int:
        """Experts that were read."""
        return self.misses + self.fetched_ahead


class Pager:
    """Serves the layers of one model from a store. Passes of one token are counted as decoding, others as prefill."""

    def __init__(self, store: Store, policy: ExpertPolicy, threads: bool = False):
        self.store, self.policy = store, policy
        self.prefill, self.decode = Tally(), Tally()
        self.step = 0
        self.before: dict[int, list[int]] = {}  # what each layer needed when it ran last
        self._awaited: set[int] = set()  # fetched ahead and not used yet
        self._lost: set[int] = set()  # of these, what left again
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="experts") if threads else None
        self._waiting: Future | None = None

    def visit(self, layer: int, needed: Sequence[int], guesses: Sequence[Guess], tokens: int, use: Use) -> None:
        """Run `use` on the experts that a layer needs, in pieces that fit; `guesses` are brought in meanwhile."""
        self.settle()
        tally = self.decode if tokens == 1 else self.prefill
        parts = list(pieces(needed, self.store.slots))
        for part in parts:
            keys = [self._key(layer, expert) for expert in part]
            self.step += 1
            self._count(keys, tally)
            self.policy.enter(layer, frozenset(keys))
            places = self.store.hold(keys, self.step)
            self._note_losses()
            if part is parts[-1]:
                self._fetch_ahead(layer, frozenset(keys), guesses, tally)
            use(part, places)
        self.before[layer] = sorted(needed)
        self._pass(layer)

    def settle(self) -> None:
        """Wait for what is being fetched ahead."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.result()
            self._note_losses()

    def close(self) -> None:
        """End the thread that fetches ahead; the store stays open."""
        self.settle()
        if self._worker is not None:
            self._worker.shutdown()

    def _key(self, layer: int, expert: int) -> int:
        return layer * self.policy.experts + expert

    def _count(self, keys: Sequence[int], tally: Tally) -> None:
        for key in keys:
            hit = key in self.store
            tally.hits += hit
            tally.misses += not hit
            tally.foreseen += hit and key in self._awaited
            tally.collisions += key in self._lost
        self._awaited.difference_update(keys)
        self._lost.difference_update(keys)

    def _fetch_ahead(self, layer: int, in_use: frozenset[int], guesses: Sequence[Guess], tally: Tally) -> None:
        room = self.store.slots - len(in_use)
        wanted = list(dict.fromkeys(self._key(*guess) for guess in guesses))[:room]
        if not wanted:
            return
        missing = [key for key in wanted if key not in self.store]
        tally.fetched_ahead += len(missing)
        self._awaited.update(missing)
        self._lost.difference_update(missing)
        self.policy.enter(layer, in_use, ahead=True)
        if self._worker is None:
            self.store.hold(wanted, self.step)
            self._note_losses()
        else:
            self._waiting = self._worker.submit(self.store.hold, wanted, self.step)

    def _note_losses(self) -> None:
        gone = {key for key in self._awaited if key not in self.store}
        self._awaited -= gone
        self._lost |= gone

    def _pass(self, layer: int) -> None:
        """What was fetched for this layer and not used was a wrong guess: it may stay, but nobody waits for it."""
        self._awaited = {key for key in self._awaited if key // self.policy.experts != layer}
        self._lost = {key for key in self._lost if key // self.policy.experts != layer}


def pieces(needed: Sequence[int], slots: int) -> Iterator[Sequence[int]]:
    """The experts of a layer, in ascending order, as many at a time as fit."""
    if slots < 1:
        raise UserError("the memory for experts does not hold a single one; give more bytes")
    ordered = sorted(needed)
    return (ordered[i : i + slots] for i in range(0, len(ordered), slots))

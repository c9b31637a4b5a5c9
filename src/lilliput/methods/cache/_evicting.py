"""A cache layer of fixed size: when it is full, the entry of lowest priority makes room, in every head on its own.

Keys keep the absolute rotary positions they were made with, and new tokens go on counting: a query is as far from a
kept key as it is in the text. A prompt is read with full attention and cut to the budget afterwards; give
`prefill_chunk_size` to `generate` when it shall never be whole in memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.method import CachePolicy
from lilliput.methods.cache._attention import SeenLayer, probabilities, watch_
from lilliput.methods.cache._cache import PolicyCache, policy_layers

EMPTY = -1  # the position of a slot without a token: padding, or an evicted entry whose slot waits for the next token


def evicting_cache(policy: CachePolicy, model: Any, layer: Callable[[], EvictingLayer]) -> PolicyCache:
    """A cache with such layers. Raises UserError for a model that it does not fit."""
    layers = policy_layers(model, policy.name(), layer)
    watch_(model, policy.name())
    return PolicyCache(layers)


class EvictingLayer(SeenLayer):
    """At most `budget` tokens a head between two steps, in `budget` + 1 slots so that one can come before one goes.

    `positions` (B, heads, slots) are those of the row's own tokens, without padding; `length` (B,) counts them.
    """

    positions: Tensor
    length: Tensor
    scores: tuple[str, ...] = ()  # names of float tensors (B, heads, slots) that travel with the entries
    watches = False  # whether `observe` wants the probabilities of the attention

    def __init__(self, budget: int):
        super().__init__()
        self.budget = budget

    @abstractmethod
    def priority(self) -> Tensor:
        """What an entry is worth, (B, heads, slots); the lowest goes first. Slots that are EMPTY do not count."""

    def observe(self, probability: Tensor) -> None:
        """Take note of attention probabilities (B, heads, some queries, slots); those of padding are 0."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        none = key_states.new_zeros((*key_states.shape[:2], 0), dtype=torch.float32)
        self.positions, self.length = none.int(), none.new_zeros(len(none), dtype=torch.int32)
        for name in self.scores:
            setattr(self, name, none)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The model masks the new tokens among themselves; `mask` adds the kept ones."""
        return query_length, self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values (B, heads, tokens, d) put beside the kept ones: what the attention may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.length):
            raise UserError(f"the cache holds {len(self.length)} rows, {len(key_states)} were given; call its reset()")
        self.seen += (count := key_states.shape[2])
        self._slot = self._empty_slot() if count == 1 else None
        if self._slot is None:
            self.keys = torch.cat([self.keys, key_states], 2)
            self.values = torch.cat([self.values, value_states], 2)
        else:
            self._put(self.keys, key_states)
            self._put(self.values, value_states)
        return self.shown(self.keys), self.values

    def _empty_slot(self) -> Tensor | None:
        """An empty slot of every head (B, heads, 1), None unless all have one."""
        if self.positions.shape[2] == 0:
            return None
        lowest, slot = self.positions.min(-1, keepdim=True)
        return slot if bool((lowest == EMPTY).all()) else None

    def _put(self, held: Tensor, new: Tensor) -> None:
        """One entry into the chosen slot, in place."""
        assert self._slot is not None
        index = self._slot if held.ndim == 3 else self._slot[..., None].expand(-1, -1, 1, held.shape[-1])
        held.scatter_(2, index, new.to(held.dtype))

    def mask(self, given: Tensor | None, queries: int) -> Tensor | None:
        kept = self.positions.shape[2]
        self._enter(given, queries)
        if kept == 0:
            return given
        visible = (self.positions != EMPTY)[:, :, None]
        if queries == 1:
            return None if bool(visible.all()) else visible
        if given is None:
            given = torch.ones(1, 1, queries, queries, dtype=torch.bool, device=visible.device).tril()
        old = visible[..., :kept].expand(-1, -1, queries, -1)
        return torch.cat([old, given.expand(*old.shape[:2], -1, -1)], -1)

    def _enter(self, given: Tensor | None, count: int) -> None:
        """Positions and scores of the new entries; those that the mask hides from the last query are padding."""
        rows = len(self.length)
        shape = rows, self.positions.shape[1], count
        real = torch.ones(rows, count, dtype=torch.bool, device=self.positions.device)
        if given is not None:
            if given.dtype != torch.bool or given.shape[2:] != (count, count):
                raise UserError(f"a mask of {tuple(given.shape)} was given; give one of padding, (rows, tokens)")
            real = real & given[:, 0, -1]
        new = (self.length[:, None] + real.cumsum(1) - 1).masked_fill(~real, EMPTY)
        self.length = (self.length + real.sum(1)).int()
        entries = {"positions": new[:, None].expand(shape)}
        entries |= {name: new.new_zeros(shape) for name in self.scores}
        for name, entry in entries.items():
            held = getattr(self, name)
            if self._slot is None:
                setattr(self, name, torch.cat([held, entry.to(held.dtype)], 2))
            else:
                self._put(held, entry)
        self._real = real if given is not None else None

    @torch.no_grad()
    def attended(self, query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float) -> None:
        if self.watches:
            first = 0
            for probability in probabilities(query, keys, mask, scaling):
                rows = slice(first, first := first + probability.shape[2])
                real = self._real
                self.observe(probability if real is None else probability * real[:, None, rows, None])
        self.waiting, self._slot, self._real = False, None, None
        self._evict()

    def _evict(self) -> None:
        slots = self.positions.shape[2]
        if slots <= self.budget:
            return
        worth = self.priority().masked_fill(self.positions == EMPTY, float("-inf"))
        if slots == self.budget + 1:
            self.positions.scatter_(2, worth.argmin(-1, keepdim=True), EMPTY)
        else:
            self.keep(worth.topk(self.budget).indices.sort().values)

    def keep(self, chosen: Tensor) -> None:
        """Only the chosen slots (B, heads, n), in that order."""
        for name in ("positions", *self.scores):
            setattr(self, name, getattr(self, name).gather(2, chosen))
        index = chosen[..., None]
        self.keys, self.values = (t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in (self.keys, self.values))

    def among_last(self, count: int) -> Tensor:
        """Which entries are among the last `count` tokens of their row, (B, heads, slots)."""
        return self.positions >= (self.length - count)[:, None, None]

"""InfiniPot: read a text of any length into a pot; whenever it is full, distil it, and go on.

Distilling leaves a share of the tokens of each head: those that a catalyst prompt, read behind the pot and forgotten
again, attends to most, and for a part of them those that the model, reading with its compressed past, found hardest to
predict. The kept keys then move together: they are turned to the positions just before the next token, so that
distances never exceed the pot (the paper counts positions from 0; only distances matter to rotary positions).
`reset_positions=False` leaves them where they were in the text.

    cache = InfiniPot().cache(model, catalyst=tokenizer("Summarize the text.", return_tensors="pt").input_ids)
    model.generate(**inputs, past_key_values=cache, prefill_chunk_size=128)

(reconstructed): how the two scores share the pot, and that without a catalyst prompt the last `window` tokens are read
once more in its place. It costs the logits of every token of the prompt and one reading of the catalyst prompt for
each distillation. `cache` leaves hooks at the model that act on caches of this policy alone.

Paper: InfiniPot: Infinite Context Processing on Memory-Constrained LLMs (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import CachePolicy, Facts, knob
from lilliput.methods.cache._attention import probabilities, watch_
from lilliput.methods.cache._cache import PolicyCache, policy_layers
from lilliput.methods.cache._evicting import EMPTY, EvictingLayer
from lilliput.methods.cache._rotary import frequencies, turned


class PotLayer(EvictingLayer):
    """Entries in the order of the text; nothing leaves but by `distil`. Padding is refused: rows would be full at
    different times."""

    scores = ("novelty",)
    novelty: Tensor
    tasting = False  # while the catalyst prompt is read: nothing is kept of it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.tasting:
            return super().update(key_states, value_states)
        return self.shown(torch.cat([self.keys, key_states], 2)), torch.cat([self.values, value_states], 2)

    def mask(self, given: Tensor | None, queries: int) -> Tensor | None:
        if self.tasting:
            seen = torch.ones(queries, queries + self.positions.shape[2], dtype=torch.bool, device=self.device)
            return seen.tril(self.positions.shape[2])[None, None]
        mask = super().mask(given, queries)
        if bool((self.positions == EMPTY).any()):
            raise UserError(
                "cache.infinipot takes no padding; generate for texts of one length together, or one by one"
            )
        return mask

    @torch.no_grad()
    def attended(self, query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float) -> None:
        if not self.tasting:
            super().attended(query, keys, mask, scaling)
            return
        self.waiting = False
        seen = torch.cat(list(probabilities(query, keys, mask, scaling)), 2)
        self.taste = seen[..., : self.positions.shape[2]].mean(2)

    def priority(self) -> Tensor:
        """The order of the text; it decides nothing, as `_evict` does nothing."""
        return self.positions

    def _evict(self) -> None:
        """Only `distil` makes room."""

    def note(self, surprise: Tensor) -> None:
        """Surprise (B, tokens) of the tokens that came last; the first of a text surprises nobody."""
        last = slice(-surprise.shape[1], None)
        self.novelty[..., last] = surprise[:, None].masked_fill(self.positions[..., last] == 0, 0.0)

    def distil(self, kept: int, share: float, freqs: Tensor | None) -> None:
        """Keep the entries of highest taste and, for a share of them, those of highest novelty among the others."""
        by_taste = self.taste.topk(kept - int(kept * share)).indices
        self.keep(self.novelty.scatter(2, by_taste, float("inf")).topk(kept).indices.sort().values)
        del self.taste
        if freqs is not None:
            self._move_together(freqs)

    def _move_together(self, freqs: Tensor) -> None:
        """Turn the keys to consecutive positions that end before the next token."""
        rank = torch.arange(self.positions.shape[2], device=self.device, dtype=torch.int32)
        moved = (self.length[:, None, None] - len(rank) + rank).expand_as(self.positions)
        self.keys = turned(self.keys, moved - self.positions, freqs)
        self.positions = moved.contiguous()


class PotCache(PolicyCache):
    """A pot in every layer, the catalyst prompt, and what the hooks at the model need between two steps."""

    layers: list[PotLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, policy: InfiniPot, layers: list[PotLayer], catalyst: Tensor | None, freqs: Tensor | None):
        super().__init__(layers)
        self.policy, self.catalyst, self.freqs = policy, catalyst, freqs
        self.tasting = False
        self.wanted: Any = 0  # logits_to_keep of the caller
        self.last_logits: Tensor | None = None  # (B, V), of the last token read
        self.last_ids: Tensor | None = None  # (B, up to window)

    def reset(self) -> None:
        super().reset()
        self.last_logits = self.last_ids = None

    def before(self, model: Any, ids: Tensor) -> None:
        """Make room for the tokens `ids` (B, count) that the model is about to read."""
        pot, kept, count, held = self.policy.budget, self.policy.kept, ids.shape[1], self.held
        if count > (pot - kept if held else pot):
            raise UserError(
                f"{count} tokens come at once, the pot takes up to {pot - kept}; "
                f"give generate prefill_chunk_size={pot - kept}, or a larger budget"
            )
        if held + count > pot:
            self._distil(model)

    @property
    def held(self) -> int:
        """Tokens in the pot."""
        layer = self.layers[0]
        return layer.positions.shape[2] if layer.is_initialized else 0

    @torch.no_grad()
    def _distil(self, model: Any) -> None:
        ids, first = self.last_ids, self.layers[0]
        assert ids is not None
        if self.catalyst is not None:
            ids = self.catalyst.to(ids.device).expand(len(ids), -1)
        places = first.length[:, None] + torch.arange(ids.shape[1], device=ids.device)
        self._taste(True)
        try:
            model(input_ids=ids, position_ids=places, past_key_values=self, use_cache=True, logits_to_keep=1)
        finally:
            self._taste(False)
        for layer in self.layers:
            layer.distil(self.policy.kept, self.policy.novelty, self.freqs)

    def _taste(self, now: bool) -> None:
        self.tasting = now
        for layer in self.layers:
            layer.tasting = now

    @torch.no_grad()
    def after(self, ids: Tensor, logits: Tensor) -> None:
        """Score the tokens `ids` (B, count) by the logits (B, count, V) that the model gave with its past."""
        first = (
            logits.new_zeros(len(ids), 1, logits.shape[2]) if self.last_logits is None else self.last_logits[:, None]
        )
        guesses = torch.cat([first, logits[:, :-1]], 1).float()
        novelty = F.cross_entropy(guesses.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        for layer in self.layers:
            layer.note(novelty)
        self.last_logits = logits[:, -1].clone()
        past = ids if self.last_ids is None else torch.cat([self.last_ids, ids], 1)
        self.last_ids = past[:, -self.policy.window :].clone()

    def own_rows(self, change: Any) -> None:
        """Apply `change` to what the cache itself holds of each row."""
        if self.last_logits is not None and self.last_ids is not None:
            self.last_logits, self.last_ids = change(self.last_logits), change(self.last_ids)

    def reorder_cache(self, beam_idx: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self.own_rows(lambda tensor: tensor.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.own_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.own_rows(lambda tensor: tensor[indices])


def _before(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook: room in the pot, and the logits of all tokens."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, PotCache) or cache.tasting:
        return None
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None:
        raise UserError("cache.infinipot reads token ids; give input_ids, not inputs_embeds")
    cache.before(model, ids)
    cache.wanted = kwargs.get("logits_to_keep", 0)
    return args, {**kwargs, "logits_to_keep": 0}


def _after(model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook: novelty of what was read; the caller gets the logits it asked for."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, PotCache) or cache.tasting:
        return
    cache.after(args[0] if args else kwargs["input_ids"], output.logits)
    wanted = cache.wanted
    output.logits = output.logits[:, slice(-wanted, None) if isinstance(wanted, int) else wanted]


@dataclass(frozen=True)
class InfiniPot(CachePolicy):
    """Read a long text in pieces into a pot that is distilled whenever it is full."""

    budget: int = knob(256, low=2, help="tokens that the pot holds at most")
    keep: float = knob(0.5, low=0.0, high=0.9, help="share of them that a distillation leaves, at least one token")
    novelty: float = knob(0.25, low=0.0, high=1.0, help="share of those chosen by surprise, not by the catalyst prompt")
    window: int = knob(16, low=1, help="last tokens that are read again when there is no catalyst prompt")
    reset_positions: bool = knob(True, choices=(True, False), help="move the kept keys together")

    facts: ClassVar[Facts] = Facts(stage="serve", effect="smaller cache")

    @property
    def kept(self) -> int:
        """Tokens that a distillation leaves."""
        return max(1, int(self.budget * self.keep))

    def cache(self, model: nn.Module, catalyst: Tensor | None = None) -> PotCache:
        """An empty pot. `catalyst` (n,) or (1, n) are the token ids of a catalyst prompt."""
        layers = policy_layers(model, self.name(), lambda: PotLayer(self.budget), mixed=False)
        freqs = frequencies(model, self.name()) if self.reset_positions else None
        watch_(model, self.name())
        if _before not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(_before, with_kwargs=True)
            model.register_forward_hook(_after, with_kwargs=True)
        return PotCache(self, layers, None if catalyst is None else catalyst.reshape(1, -1), freqs)

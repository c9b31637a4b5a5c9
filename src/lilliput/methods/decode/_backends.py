"""What the verify loop runs on: a model that reads tokens behind those it holds, and forgets the last ones again.

`TorchBackend` is a causal model of transformers with a cache that can be cropped; it reads trees too. `LeanBackend` is
the decoder of `lilliput.kernels.decoder`, which reads chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.hooks import watching
from lilliput.kernels.decoder import decoder_for
from lilliput.methods.decode._draft import NOTHING, Draft

RUNTIMES = ("torch", "lean")
MASKED = ("sdpa", "eager")  # attentions of transformers that take a mask of (queries, keys)


class Backend:
    """Reads tokens and forgets them."""

    # (1 + n, d): what the head read for the last logits, or whatever else a drafter wants to know of each of them
    hidden: Tensor | Sequence[Tensor | None] | None = None

    @property
    def filled(self) -> int:
        """Tokens that it holds."""
        raise NotImplementedError

    def extend(self, fresh: Tensor, draft: Draft = NOTHING) -> Tensor:
        """Logits (1 + n, V) after the last of the `fresh` tokens (T,) and after each of the n drafted ones."""
        raise NotImplementedError

    def gather(self, start: int, nodes: list[int]) -> None:
        """Puts those nodes of the draft that stands from `start` on to its front; the rest may be anything."""
        raise UserError(f"{type(self).__name__} reads chains of tokens; run trees on transformers (runtime='torch')")

    def fill(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Holds, empty before, T tokens that it has not read: keys and values (kv_heads, T, head_dim) of each block."""
        raise NotImplementedError

    def rewind(self, length: int) -> None:
        """Holds the first `length` tokens alone."""
        raise NotImplementedError


class TorchBackend(Backend):
    """A model of transformers; `look` keeps what its head reads."""

    def __init__(self, model: Any, cache: Any = None, look: bool = False):
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=model.config)
        if not getattr(cache, "is_croppable", False):
            raise UserError(f"a {type(cache).__name__} cannot forget tokens; decode with a DynamicCache")
        cache.activate_past_recording()
        self.model, self.cache = model, cache
        self.watched = [head_name(model)] if look else []
        self.options = {"use_cache": True, "past_key_values": cache}
        self.keeps = "logits_to_keep" if model._supports_logits_to_keep() else ""

    @property
    def filled(self) -> int:
        return int(self.cache.get_seq_length())

    @torch.no_grad()
    def extend(self, fresh: Tensor, draft: Draft = NOTHING) -> Tensor:
        tokens = torch.cat([fresh, fresh.new_tensor(draft.tokens)])
        rows = len(draft.tokens) + 1
        options = self.options | ({self.keeps: rows} if self.keeps else {})
        if not draft.is_chain:
            options |= self._tree(len(fresh), draft)
        with watching(self.model, self.watched, lambda name, layer, x: self._look(x[0, -rows:])):
            return self.model(input_ids=tokens[None], **options).logits[0, -rows:]

    def _look(self, x: Tensor) -> None:
        self.hidden = x

    def _tree(self, fresh: int, draft: Draft) -> dict[str, Tensor]:
        seen, places = self.view(fresh, draft)
        return {"attention_mask": additive(seen, self.model.dtype), "position_ids": places[None]}

    def view(self, fresh: int, draft: Draft) -> tuple[Tensor, Tensor]:
        """What T tokens, fresh ones and a tree behind them, see of themselves and the held ones (T, filled + T), and
        their places in the text (T,). Raises UserError for attention that takes no mask."""
        check_masked(self.model, self.cache)
        start, device = self.filled, self.model.device
        size = start + fresh + len(draft.tokens)
        seen = torch.ones(size, size, dtype=torch.bool, device=device).tril()[start:]
        seen[fresh:, start + fresh :] = draft.lineage().to(device)
        places = [*range(start, start + fresh), *(start + fresh + depth for depth in draft.depths())]
        return seen, torch.tensor(places, device=device)

    def gather(self, start: int, nodes: list[int]) -> None:
        places, end = [start + node for node in nodes], start + len(nodes)
        for layer in (layer for layer in self.cache.layers if layer.is_initialized):
            for kept in (layer.keys, layer.values):
                kept[..., start:end, :] = kept[..., places, :]

    def rewind(self, length: int) -> None:
        if self.filled:
            self.cache.crop(length - self.filled)

    def fill(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for i, (keys, values) in enumerate(pairs):
            self.cache.update(keys[None], values[None], i)


class LeanBackend(Backend):
    """The native decoder, or its plain reference for layers that it has no product for; `length` is its cache's."""

    def __init__(self, model: Any, length: int):
        self.decoder = decoder_for(model)
        self.cache = self.decoder.cache(length)

    @classmethod
    def of(cls, session: Any) -> Self:
        """On the decoder and the cache of a session of `runtimes.lean`."""
        found = cls.__new__(cls)
        found.decoder, found.cache = session.decoder, session.cache
        return found

    @property
    def filled(self) -> int:
        return self.cache.filled

    def extend(self, fresh: Tensor, draft: Draft = NOTHING) -> Tensor:
        if not draft.is_chain:
            self.gather(self.filled, [])
        if not draft.tokens:
            return self.decoder(fresh, self.cache)
        drafted = fresh.new_tensor(draft.tokens)
        if len(fresh) > 1:  # a prompt is read as in plain decoding, and the logits inside it are not needed
            return torch.cat([self.decoder(fresh, self.cache), self.decoder(drafted, self.cache, every=True)])
        return self.decoder(torch.cat([fresh, drafted]), self.cache, every=True)

    def rewind(self, length: int) -> None:
        self.cache.filled = length

    def fill(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        tokens = pairs[0][0].shape[1]
        self.cache.need_room(tokens)
        for i, (keys, values) in enumerate(pairs):
            self.cache.keys[i][:, :tokens], self.cache.values[i][:, :tokens] = keys, values
        self.cache.filled = tokens


def backend(runtime: str, model: Any, length: int, cache: Any = None, look: bool = False) -> Backend:
    """The back end called `runtime`, for texts of up to `length` tokens."""
    return LeanBackend(model, length) if runtime == "lean" else TorchBackend(model, cache, look)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask (1, 1, q, t) that attention adds to its scores, for rows that see columns (q, t)."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def check_masked(model: Any, cache: Any) -> None:
    """Raises UserError for a model whose attention cannot be told who sees whom."""
    attention = model.config._attn_implementation
    if attention not in MASKED or any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise UserError(
            f"a tree of tokens needs full attention by {' or '.join(MASKED)}, this model has {attention} or a "
            "sliding window; draft chains (decode.ngram, decode.draft_model)"
        )


def head_name(model: Any) -> str:
    """The name of the layer that gives a language model's logits. Raises UserError for a model without one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise UserError(f"decoding is for language models of transformers, not for a {type(model).__name__}")
    return next(name for name, module in model.named_modules() if module is head)

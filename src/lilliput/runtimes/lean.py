"""A lean decode path for Llama-type models: a token is one native call through all blocks (`kernels/decoder.py`).

Formats may differ per layer. A model with a layer of a kind that the native decoder has no product for runs on its
plain torch reference, which calls whatever modules stand at the projections.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.kernels.decoder import decoder_for, slow_because
from lilliput.kernels.decoder_parts import refusals
from lilliput.runtimes import Runtime, Session
from lilliput.workload import ROOM, Batch, Workload

NOTHING = torch.zeros(0, dtype=torch.int64)


class LeanSession(Session):
    """A prepared decoder. `session(batch)` gives logits (B, T, V); `generate` yields greedy tokens one by one.

    It borrows the weights of the model, see `lilliput.kernels.decoder`.
    """

    def __init__(self, model: nn.Module, max_length: int):
        self.max_length = max_length
        self.decoder, self.note = decoder_for(model), slow_because(model)
        self.blocks, self.head = self.decoder.parts.blocks, self.decoder.parts.head
        self.cache = self.decoder.cache(max_length)
        self.held = NOTHING  # the prompt that the cache begins with

    def __call__(self, batch: Batch) -> Tensor:
        return torch.stack([self._logits(row) for row in batch["input_ids"]])

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values, for as many tokens as they have room for."""
        return sum(tensor.nbytes for tensor in (*self.cache.keys, *self.cache.values))

    def generate(self, ids: Tensor, tokens: int, reuse: bool = False) -> Iterator[int]:
        """Greedy tokens after the prompt ids (1, T); the first one costs the whole prompt, with `reuse` only its last
        token where the cache begins with the same prompt.

        Raises UserError when prompt and tokens do not fit the cache; the last token needs no place in it.
        """
        self.begin(ids, tokens, reuse)
        row = ids[0, self.cache.filled :]
        for _ in range(tokens):
            row = self.decoder(row, self.cache).argmax(-1)
            self.held = ids[0]
            yield int(row)

    def begin(self, ids: Tensor, tokens: int, reuse: bool = False) -> None:
        """Forget the text before, but for what `reuse` keeps of the same prompt, and see that there is room."""
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
            what = "empty" if ids.numel() == 0 else f"of the shape {tuple(ids.shape)}"
            raise UserError(f"the prompt is {what}; lean takes one prompt, token ids of the shape (1, length)")
        kept = ids.shape[1] - 1 if reuse and torch.equal(self.held, ids[0]) else 0
        self.cache.filled = 0
        self.cache.need_room(ids.shape[1] + max(tokens - 1, 0))
        self.cache.filled, self.held = kept, NOTHING

    def _logits(self, ids: Tensor) -> Tensor:
        self.cache.filled, self.held = 0, NOTHING
        return self.decoder(ids, self.cache, every=True)


class Lean(Runtime):
    """Llama, Qwen2 and Gemma 3 decoders, one prompt at a time, float32 activations between layers."""

    name = "lean"
    rank = 0
    keeps_text = True

    def supports(self, model: nn.Module, workload: Workload | None = None) -> list[str]:
        """Why this model cannot run here; empty when it can."""
        return refusals(model)

    def prepare(
        self, model: nn.Module, workload: Workload, threads: int | None = None, max_length: int = 512
    ) -> LeanSession:
        """A session over the model's own weights; nothing is copied but the cache is made. Raises UserError."""
        if threads:
            torch.set_num_threads(threads)
        longest = max(b["input_ids"].shape[1] for b in (workload.example, workload.validation[0], workload.test[0]))
        return LeanSession(model.eval(), max(max_length, longest + ROOM))

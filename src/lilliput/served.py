"""How a language model is served: plainly by a runtime, with drafts from the text, or with the cache of a policy.

    session = prepare(runtime, model, workload, setting=Ngram())      # or LowBit(bits=4), None
    for token in session.generate(ids, tokens): ...

A setting is what a plan or an artifact names under `serving`. Drafts are checked by the native decoder and give the
text of plain decoding. A policy runs in transformers, whose caches these are: a prompt is read PIECE tokens at a time,
so that no policy ever holds all of a long one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.method import CachePolicy, Decoder
from lilliput.methods.decode import Tally
from lilliput.methods.decode._backends import LeanBackend
from lilliput.methods.decode._verify import Loop
from lilliput.runtimes import Runtime, Session
from lilliput.workload import Batch, Workload

Setting = Decoder | CachePolicy | None
PIECE = 128  # tokens of a prompt that a policy's cache takes at a time


def prepare(
    runtime: Runtime,
    model: nn.Module,
    workload: Workload,
    threads: int | None = None,
    setting: Setting = None,
    **options: Any,
) -> Session:
    """A session of the runtime over the model, or one that serves it with `setting`; `options` are the runtime's.

    Where the runtime keeps no text there is nothing to check drafts in: they are left out, which changes no token.
    """
    if isinstance(setting, CachePolicy):
        return Caching(model, setting, threads)
    session: Any = runtime.prepare(model, workload, threads, **options)
    return Drafting(session, setting) if setting is not None and runtime.keeps_text else session


def label(setting: Setting) -> str:
    """A setting in a few words: "plain", "decode.ngram", "cache.low_bit (bits 4)", with what differs from defaults."""
    if setting is None:
        return "plain"
    changed = {k for k, v in setting.defaults().items() if getattr(setting, k) != v}
    shown = (changed | {"bits", "budget"}) - {"runtime"}
    values = ", ".join(f"{k} {getattr(setting, k)}" for k in setting.knobs() if k in shown)
    return f"{setting.name()} ({values})" if values else setting.name()


class Drafting(Session):
    """The texts of a session of `runtimes.lean`, in fewer passes: what a decoder drafts is checked there."""

    def __init__(self, plain: Any, decoder: Any):
        self.plain, self.decoder = plain, decoder
        self.note, self.tally = plain.note, Tally()

    def __call__(self, batch: Batch | None = None, **inputs: Tensor) -> Tensor:
        return self.plain(batch, **inputs)

    @property
    def cache_bytes(self) -> int:
        """As of the plain session."""
        return self.plain.cache_bytes

    def generate(self, ids: Tensor, tokens: int, reuse: bool = False) -> Iterator[int]:
        """Greedy tokens after the prompt ids (1, T), as `LeanSession.generate`; those of a pass come at once."""
        self.plain.begin(ids, tokens, reuse)
        end = ids.shape[1] + tokens
        loop = Loop(
            LeanBackend.of(self.plain),
            self.decoder.drafter(),
            processors=lambda text, scores: scores,
            criteria=lambda text, scores: torch.tensor([text.shape[1] >= end]),
            longest=end,
        )
        read = ids.shape[1]
        for text in loop.passes(ids, self.tally) if tokens else ():
            self.plain.held = ids[0]
            yield from text[0, read:].tolist()
            read = text.shape[1]


class Caching(Session):
    """Greedy decoding by transformers with a policy's cache, a new one for each text. Raises UserError for a model that
    the policy does not fit."""

    note = "decoded by transformers, whose caches policies are: the native decoder has none"

    def __init__(self, model: Any, policy: CachePolicy, threads: int | None = None):
        if threads:
            torch.set_num_threads(threads)
        self.model, self.policy = model.eval(), policy
        self.cache = policy.cache(model)

    def __call__(self, batch: Batch | None = None, **inputs: Tensor) -> Tensor:
        """Logits (B, T, V) of whole texts, which no cache takes part in."""
        given = inputs if batch is None else batch
        with torch.inference_mode():
            return self.model(input_ids=given["input_ids"], use_cache=False).logits

    @property
    def cache_bytes(self) -> int:
        """Bytes that the cache of the last text holds."""
        from lilliput.methods.cache._cache import held_bytes

        return held_bytes(self.cache)

    def generate(self, ids: Tensor, tokens: int) -> Iterator[int]:
        """Greedy tokens after the prompt ids (1, T), one by one; the first one costs the whole prompt."""
        self.cache = self.policy.cache(self.model)
        for _ in range(tokens):
            ids = read(self.model, ids, self.cache)[:, -1:].argmax(-1)
            yield int(ids)


@torch.inference_mode()
def read(model: Any, ids: Tensor, cache: Any, piece: int = PIECE, every: bool = False) -> Tensor:
    """Logits of the tokens ids (B, T) that follow those in a cache of transformers, read in pieces: (B, 1, V) of the
    last one, of `every` token (B, T, V)."""
    rows = []
    for part in ids.split(piece, 1):
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=0 if every else 1).logits
        rows = [*rows, logits] if every else [logits]
    return torch.cat(rows, 1)


@contextmanager
def attention_as_before(model: Any) -> Iterator[None]:
    """Within the block policies may put their attention into the model; afterwards it has its own again."""
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    try:
        yield
    finally:
        if before is not None and model.config._attn_implementation != before:
            model.set_attn_implementation(before)

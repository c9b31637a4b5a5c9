"""The verify loop of all decoders of this family: draft, one pass of the model over the draft, keep what holds.

Greedy, every token is the argmax of the model's logits at its place; sampled, it is drawn from the model's distribution
behind all logits processors. These are called as in plain generation, once per token of the text and in its order. With
chosen drafts a seed gives the tokens of plain sampling, with drawn ones another draw from the same distribution.

The logits of a chunk of float layers differ from those of single tokens in the last bits, since sums run in another
order. So greedy float32 texts are equal until two tokens are level within that rounding, which `tests/methods/decode`
check. Packed layers on the native decoder give the same bits either way, for drafts of up to 14 tokens and without
sliding windows. `same_text` in `benchmarks/generate.py` counts texts that are equal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.methods.decode import Tally
from lilliput.methods.decode._backends import Backend, backend
from lilliput.methods.decode._draft import NOTHING, Draft, pick

USUAL = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")  # options of a call


class Drafter:
    """Proposes tokens."""

    look = False  # whether it wants what the model's head reads

    def engine(self, runtime: str, model: Any, length: int, cache: Any) -> Backend:
        """What runs the model, for texts of up to `length` tokens; a drafter that rides along gives its own."""
        return backend(runtime, model, length, cache, self.look)

    def propose(self, ids: Tensor, room: int, hidden: Tensor | None) -> Draft:
        """Up to `room` levels of tokens after the text ids (T,); `hidden` is what the back end keeps of its last token
        but one, as a rule what the head read there (d,), None before the first pass."""
        raise NotImplementedError


def speculate(
    model: Any,
    input_ids: Tensor,
    drafter: Drafter,
    runtime: str,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    tally: Tally | None = None,
    prefill: Callable[[Backend, Tensor], None] | None = None,
    **options: Any,
) -> Tensor:
    """Token ids (1, length) of prompt and continuation; the arguments are those of transformers' own loops.

    `prefill(backend, ids)` may make the empty back end hold the beginning of the prompt ids (T,) in its own way.

    Raises UserError for several prompts, padding, beams and whatever else the loop cannot follow exactly.
    """
    check_call(model, input_ids, generation_config, options)
    cache, length = options.get("past_key_values"), generation_config.max_length
    if runtime == "lean" and (cache.get_seq_length() or getattr(cache, "_is_user_defined", False)):
        raise UserError("lean keeps its own keys and values; give no past_key_values, or decode with runtime='torch'")
    loop = Loop(drafter.engine(runtime, model, length, cache), drafter, logits_processor, stopping_criteria)
    loop.sample, loop.longest, loop.streamer = generation_config.do_sample, min(length, context_of(model)), streamer
    if prefill is not None:
        if held := loop.backend.filled:
            raise UserError(f"past_key_values holds {held} tokens already; give an empty cache, or none")
        prefill(loop.backend, input_ids[0])
    ids = loop.run(input_ids, tally or Tally())
    if streamer is not None:
        streamer.end()
    return ids


@dataclass
class Loop:
    """One generation. `longest` is the length of a text from which on nothing is drafted."""

    backend: Backend
    drafter: Drafter
    processors: Any
    criteria: Any
    sample: bool = False
    longest: int = 0
    streamer: Any = None

    def run(self, ids: Tensor, tally: Tally) -> Tensor:
        """The text ids (1, T) and what follows it."""
        return deque(self.passes(ids, tally), maxlen=1)[0]

    def passes(self, ids: Tensor, tally: Tally) -> Iterator[Tensor]:
        """The text (1, T) after every pass of the model."""
        hidden, stopped = None, False
        held = min(self.backend.filled, ids.shape[1] - 1)
        self.backend.rewind(held)
        while not stopped:
            room = self.longest - ids.shape[1] - 1
            draft = self.drafter.propose(ids[0], room, hidden) if room > 0 else NOTHING
            end = ids.shape[1]
            logits = self.backend.extend(ids[0, self.backend.filled :], draft)
            ids, path, stopped = self._walk(logits, draft, ids)
            if path != list(range(len(path))):
                self.backend.gather(end, path)
            self.backend.rewind(ids.shape[1] - 1)
            if self.backend.hidden is not None:
                hidden = self.backend.hidden[path[-1] + 1 if path else 0]
            tally.steps, tally.drafted = tally.steps + 1, tally.drafted + len(draft.tokens)
            tally.tokens += ids.shape[1] - end
            yield ids

    def _walk(self, logits: Tensor, draft: Draft, ids: Tensor) -> tuple[Tensor, list[int], bool]:
        """The text with the tokens that hold, the drafted nodes among them, and whether it ends there."""
        path: list[int] = []
        while True:
            node = path[-1] if path else -1
            scores = self.processors(ids, logits[node + 1 : node + 2].to(torch.float32, copy=True))
            token, child = pick(scores, draft, node, self.sample)
            ids = torch.cat([ids, ids.new_tensor([[token]])], 1)
            if self.streamer is not None:
                self.streamer.put(ids[0, -1:].cpu())
            if child is not None:
                path.append(child)
            stopped = bool(self.criteria(ids, None).all())
            if stopped or child is None:
                return ids, path, stopped


def context_of(model: Any) -> int:
    """Tokens that a model reads at most."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**40


def check_call(model: Any, input_ids: Tensor, generation_config: Any, options: dict[str, Any]) -> None:
    """Raises UserError for a call of `generate` that the loop cannot follow."""
    rows, length = input_ids.shape
    mode, context = generation_config.get_generation_mode().value, context_of(model)
    if mode not in ("greedy_search", "sample"):
        raise UserError(f"this decoder is greedy or samples, it has no {mode.replace('_', ' ')}; drop that option")
    if generation_config.return_dict_in_generate:
        raise UserError("return_dict_in_generate is set, but this decoder returns token ids alone; drop it")
    if rows != 1:
        raise UserError(f"{rows} texts are to be generated; this decoder takes one prompt and gives one answer")
    if length == 0 or options.get("inputs_embeds") is not None:
        raise UserError("the prompt is empty or made of inputs_embeds; give at least one token as input_ids")
    if length > context:
        raise UserError(f"the prompt has {length} tokens, but the model reads {context}; shorten it")
    if model.training:
        raise UserError("the model is in training mode, where dropout would change its text; call model.eval()")
    _check_options(length, options)


def _check_options(length: int, options: dict[str, Any]) -> None:
    mask, positions = options.get("attention_mask"), options.get("position_ids")
    if mask is not None and not bool((mask == 1).all()):
        raise UserError("the attention mask hides tokens of the prompt; give the prompt without padding")
    if positions is not None and positions[0].tolist() != list(range(length - positions.shape[1], length)):
        raise UserError("position_ids are given; this decoder counts positions from the start of the prompt")
    if options.get("past_key_values") is None:
        raise UserError("this decoder needs a cache; generate with use_cache=True")
    if others := sorted(key for key, value in options.items() if value is not None and key not in USUAL):
        raise UserError(f"this decoder takes token ids alone; drop {', '.join(others)}")

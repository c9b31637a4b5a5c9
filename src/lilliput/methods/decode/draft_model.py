"""Draft with a smaller model of the same vocabulary (speculative decoding).

Papers: Leviathan, Kalman and Matias, Fast Inference from Transformers via Speculative Decoding, 2023 (arXiv
2211.17192); Chen et al., Accelerating Large Language Model Decoding with Speculative Sampling, 2023 (arXiv 2302.01318).
The draft may be the model itself with fewer bits or blocks. A draft ends early where the small model is unsure; that is
decided by its distribution before a token is drawn, so the outcome stays exact.

A draft model of another tokenizer is refused, also one with as many tokens where both tokenizers lie beside the weights
or are given: `generate(..., draft_model=small, tokenizers=(tokenizer, draft_tokenizer))`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.method import OUTPUT_SHAPE, Decoder, Facts, knob
from lilliput.methods.decode import Tally
from lilliput.methods.decode._backends import RUNTIMES, Backend, backend
from lilliput.methods.decode._draft import Draft
from lilliput.methods.decode._verify import Drafter, context_of, speculate
from lilliput.methods.decode._vocabulary import UNKNOWN, check_vocabulary


@dataclass(frozen=True)
class DraftModel(Decoder):
    """A small model writes a few tokens ahead, the large one checks them: `generate(..., draft_model=small)`."""

    tokens: int = knob(4, low=1, high=64, help="tokens drafted a step")
    sure: float = knob(0.3, low=0.0, high=1.0, help="end a draft where the small model's best token is less likely")
    runtime: str = knob("torch", choices=RUNTIMES, help="what runs the model: transformers, or the native decoder")
    draft_runtime: str = knob("torch", choices=RUNTIMES, help="what runs the small model")
    facts: ClassVar[Facts] = Facts(stage="serve", keeps={OUTPUT_SHAPE}, effect="same text in fewer steps")

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        draft_model: Any = None,
        tokenizers: Any = UNKNOWN,
        tally: Tally | None = None,
        **call: Any,
    ) -> Tensor:
        check_draft(model, draft_model, tokenizers)
        config = call["generation_config"]
        drafter = _Small(self, backend(self.draft_runtime, draft_model, config.max_length), context_of(draft_model))
        if config.do_sample:
            drafter.warpers = warpers(call["logits_processor"])
        return speculate(model, input_ids, drafter, self.runtime, tally=tally, **call)


class _Small(Drafter):
    """Draws from its warped distribution when there are `warpers`, else takes its best token."""

    warpers: Any = None

    def __init__(self, settings: DraftModel, backend: Backend, context: int):
        self.settings, self.backend, self.context = settings, backend, context
        self.held = torch.zeros(0, dtype=torch.int64)  # tokens that the back end holds

    def propose(self, ids: Tensor, room: int, hidden: Tensor | None) -> Draft:
        self._forget(ids)
        found: list[int] = []
        proposals: list[Tensor] = []
        text = ids
        while len(found) < min(self.settings.tokens, room, self.context - len(ids)):
            scores = self.backend.extend(text[self.backend.filled :]).to(torch.float32, copy=True)
            q = (scores if self.warpers is None else self.warpers(text[None], scores)).softmax(-1)
            if float(q.max()) < self.settings.sure:
                break
            token = q.argmax(-1) if self.warpers is None else torch.multinomial(q, 1)[0]
            found.append(int(token))
            proposals.append(q[0])
            text = torch.cat([text, token])
        self.held = text[: self.backend.filled]
        return Draft.chain(found, None if self.warpers is None or not found else torch.stack(proposals))

    def _forget(self, ids: Tensor) -> None:
        """Rewind to what it holds of the text, its last token left out: that one has to be read for its logits."""
        both = min(len(self.held), len(ids) - 1)
        same = (self.held[:both] == ids[:both]).long().cumprod(0).sum()
        self.backend.rewind(int(same))


def warpers(processors: Any) -> Any:
    """The processors that shape a distribution by its own values; others may count the tokens they have seen."""
    return type(processors)(p for p in processors if type(p).__name__.endswith("LogitsWarper"))


def check_draft(model: Any, draft: Any, tokenizers: Any = UNKNOWN) -> None:
    """Raises UserError for a draft model that is missing, trains, or has another vocabulary."""
    if draft is None:
        raise UserError("there is no draft model; call generate(..., custom_generate=DraftModel(), draft_model=small)")
    if draft.training:
        raise UserError("the draft model is in training mode; call draft_model.eval()")
    check_vocabulary(model, draft, "the draft model", tokenizers)

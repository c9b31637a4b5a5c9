"""Which experts a text asks for, pass by pass, and which ones an earlier layer would have guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.methods.experts._pager import Guess
from lilliput.methods.experts._routing import Routed, at_routers, equal_routers_of

ROUTERS, HISTORY, ORACLE, NOTHING = "routers", "history", "oracle", "none"
WHO = "a trace of experts"


@dataclass(frozen=True)
class ExpertTrace:
    """Passes of a model over a text: the first reads the prompt, each of the others one token."""

    needed: Tensor  # (passes, layers, E) bool
    foreseen: Tensor  # (passes, layers, ahead, E): probabilities in the layers 1 .. ahead on; 0 behind the last
    tokens: tuple[int, ...]  # of each pass
    top_k: int

    @classmethod
    def record(cls, model: Any, ids: Tensor, prompt: int, ahead: int = 3) -> ExpertTrace:
        """The trace of a text ids (T,) whose first `prompt` tokens are read at once and the others one by one."""
        if ids.ndim != 1 or not 0 < prompt <= len(ids):
            raise UserError(
                f"the text has the shape {tuple(ids.shape)}, its prompt {prompt} tokens; give ids (T,) with a prompt "
                "of 1 to T"
            )
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), evaluating(model), recording(model, ahead) as recorder:
            for piece in ids.split([prompt, *[1] * (len(ids) - prompt)]):
                model(input_ids=piece[None], past_key_values=cache, use_cache=True)
        return recorder.trace()

    @cached_property
    def _needed(self) -> list[list[list[int]]]:
        return [[row.nonzero().flatten().tolist() for row in one] for one in self.needed]

    @cached_property
    def _ranked(self) -> list[list[list[list[int]]]]:
        return [[[likeliest(scores) for scores in row] for row in one] for one in self.foreseen]

    def experts(self, at: int, layer: int) -> list[int]:
        """What a layer needed in pass `at`."""
        return self._needed[at][layer]

    def guesses(self, at: int, layer: int, predictor: str, ahead: int, width: int) -> list[Guess]:
        """What layer `layer` would fetch for the layers behind it in pass `at`, the nearest layer first.

        `width` experts a layer and token by the routers; for history those of the pass before, for the oracle those
        that will be needed. Raises UserError for more layers than were recorded.
        """
        if predictor == ROUTERS and ahead > self.foreseen.shape[2]:
            raise UserError(f"ahead is {ahead}, the trace was recorded with {self.foreseen.shape[2]}; record it anew")
        found: list[Guess] = []
        for distance in range(1, min(ahead, self.needed.shape[1] - 1 - layer) + 1):
            target = layer + distance
            if predictor == ROUTERS:
                experts = self._ranked[at][layer][distance - 1][: width * self.tokens[at]]
            elif predictor == HISTORY:
                experts = self.experts(at - 1, target) if at else []
            else:
                experts = self.experts(at, target) if predictor == ORACLE else []
            found += [(target, expert) for expert in experts]
        return found


def likeliest(scores: Tensor) -> list[int]:
    """The experts by their scores (E,), the likeliest first; those of score 0 are left out."""
    order = scores.argsort(descending=True, stable=True)
    return order[scores[order] > 0].tolist()


@torch.no_grad()
def foresight(routers: Sequence[Any], x: Tensor) -> Tensor:
    """(len(routers), E): the highest probability of each expert over the tokens x (..., d) that an earlier layer reads.

    The routers are asked past their hooks, so that nobody takes the guess for a choice.
    """
    return torch.stack([router.forward(x)[0].float().softmax(-1).max(0).values for router in routers])


@dataclass
class Recorder:
    """Collects what `recording` sees."""

    routers: list[Any]
    ahead: int
    needed: list[list[Tensor]] = field(default_factory=list)
    foreseen: list[list[Tensor]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def see(self, layer: int, x: Tensor, routed: Routed) -> None:
        if layer == 0:
            self.needed.append([])
            self.foreseen.append([])
            self.tokens.append(len(routed.chosen))
        experts = routed.logits.shape[-1]
        self.needed[-1].append(torch.bincount(routed.chosen.flatten().cpu(), minlength=experts) > 0)
        guesses = torch.zeros(self.ahead, experts)
        if later := self.routers[layer + 1 : layer + 1 + self.ahead]:
            guesses[: len(later)] = foresight(later, x)
        self.foreseen[-1].append(guesses)

    def trace(self) -> ExpertTrace:
        """All passes so far. Raises UserError when the model did not run."""
        if not self.needed:
            raise UserError("the model did not run while its experts were recorded")
        needed, foreseen = (torch.stack([torch.stack(p) for p in found]) for found in (self.needed, self.foreseen))
        return ExpertTrace(needed, foreseen, tuple(self.tokens), self.routers[0].top_k)


@contextmanager
def recording(model: nn.Module, ahead: int = 3) -> Iterator[Recorder]:
    """Records every pass of a model inside the block, also those of `model.generate`."""
    routers = equal_routers_of(model, WHO)
    recorder = Recorder(routers, ahead)
    with at_routers(routers, recorder.see):
        yield recorder

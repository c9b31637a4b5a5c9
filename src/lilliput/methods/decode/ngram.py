"""Draft what followed the last words of the text when they stood in it before (prompt lookup).

The longest ending of the text, up to `longest` tokens, that occurs earlier in it is looked up, its last occurrence is
taken, and the tokens behind that are proposed; a copy that runs into the end of the text goes on in itself, as in LZ77.
Drafts grow while they hold and shrink when they do not, so that text without repetitions costs little.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

from torch import Tensor

from lilliput.errors import UserError
from lilliput.method import OUTPUT_SHAPE, Decoder, Facts, knob
from lilliput.methods.decode import Tally
from lilliput.methods.decode._backends import RUNTIMES
from lilliput.methods.decode._draft import NOTHING, Draft
from lilliput.methods.decode._verify import Drafter, speculate

FIRST = 2  # tokens of the first draft


@dataclass(frozen=True)
class Ngram(Decoder):
    """Copy from the text itself: no second model, no training, for texts that repeat themselves."""

    tokens: int = knob(8, low=1, high=256, help="most tokens drafted a step")
    longest: int = knob(3, low=1, high=64, help="most tokens of the ending that is looked up")
    shortest: int = knob(2, low=1, high=64, help="fewest tokens of it; a shorter match drafts nothing")
    runtime: str = knob("torch", choices=RUNTIMES, help="what runs the model: transformers, or the native decoder")
    facts: ClassVar[Facts] = Facts(stage="serve", keeps={OUTPUT_SHAPE}, effect="same text in fewer steps")

    def __post_init__(self):
        super().__post_init__()
        if self.shortest > self.longest:
            raise UserError(f"Ngram.shortest is {self.shortest}, above longest ({self.longest}); lower it")

    def __call__(self, model: Any, input_ids: Tensor, tally: Tally | None = None, **call: Any) -> Tensor:
        return speculate(model, input_ids, self.drafter(), self.runtime, tally=tally, **call)

    def drafter(self) -> Drafter:
        """What proposes tokens for one text; it needs nothing but the text."""
        return _Lookup(self)


class _Lookup(Drafter):
    """Copies; the next draft is twice as long after one that held, else one longer than what held of it."""

    def __init__(self, settings: Ngram):
        self.settings, self.length = settings, FIRST
        self.start, self.drafted = 0, []  # where the draft before stood, and its tokens

    def propose(self, ids: Tensor, room: int, hidden: Tensor | None) -> Draft:
        s = self.settings
        self._learn(ids)
        source = find_ending(ids, s.longest, s.shortest)
        if source is None:
            return NOTHING
        self.start, self.drafted = len(ids), copied(ids, source, min(self.length, s.tokens, room))
        return Draft.chain(self.drafted)

    def _learn(self, ids: Tensor) -> None:
        pairs = zip(self.drafted, ids[self.start :].tolist())
        held = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if self.drafted:
            self.length = min(2 * self.length, self.settings.tokens) if held == len(self.drafted) else held + 1
        self.drafted = []


def find_ending(ids: Tensor, longest: int, shortest: int) -> int | None:
    """Where the last earlier occurrence of the longest possible ending of ids (T,) ends, None when there is none."""
    for size in range(min(longest, len(ids) - 1), shortest - 1, -1):
        places = (ids[:-1].unfold(0, size, 1) == ids[-size:]).all(-1).nonzero()
        if len(places):
            return int(places[-1]) + size
    return None


def copied(ids: Tensor, source: int, count: int) -> list[int]:
    """`count` tokens from the place `source` of ids (T,) on; behind the end the copy itself is read."""
    tail = ids[source:].tolist()
    return [tail[i % len(tail)] for i in range(count)]

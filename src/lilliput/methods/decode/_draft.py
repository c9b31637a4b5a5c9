"""Tokens proposed after a text, as a chain or a tree, and the rule by which the model takes them.

Chosen tokens (an n-gram's, the best of a head): the model's own token is drawn from p as always, and the branch that
holds it is followed. Drawn tokens x ~ q (a draft model's): x is taken with probability min(1, p(x) / q(x)), otherwise
p becomes max(0, p - q) normed, for the next sibling and at last for the model's own draw (Leviathan, Kalman and Matias,
2023, arXiv 2211.17192; siblings: Miao et al., SpecInfer, 2023, arXiv 2305.09781). Either way what comes out follows p.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draft:
    """n tokens; `parents[i]` is the node that node i follows, an earlier one, or -1 for the end of the text.

    `proposals` (n, V) are the distributions q that the tokens were drawn from, None when they were chosen.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    proposals: Tensor | None = None

    @classmethod
    def chain(cls, tokens: list[int], proposals: Tensor | None = None) -> Draft:
        """Each token follows the one before it."""
        return cls(tokens, list(range(-1, len(tokens) - 1)), proposals)

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.tokens) - 1))

    def children(self, node: int) -> list[int]:
        """The nodes that follow a node."""
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def depths(self) -> list[int]:
        """Nodes above each node."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def lineage(self) -> Tensor:
        """(n, n): whether node j stands on the way to node i, or is it."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


NOTHING = Draft()


def pick(scores: Tensor, draft: Draft, node: int, sample: bool) -> tuple[int, int | None]:
    """The token after `node` by the model's scores (1, V), and the child of the node that proposed it, if one did."""
    children = draft.children(node)
    if sample and draft.proposals is not None:
        return _drawn(scores.softmax(-1)[0], draft, children)
    token = int(torch.multinomial(scores.softmax(-1), 1) if sample else scores.argmax(-1))
    return token, next((child for child in children if draft.tokens[child] == token), None)


def _drawn(p: Tensor, draft: Draft, children: list[int]) -> tuple[int, int | None]:
    """The same for tokens drawn from q: accept each or take its share of p away."""
    assert draft.proposals is not None
    for child in children:
        token, q = draft.tokens[child], draft.proposals[child]
        if float(torch.rand(())) * float(q[token]) < float(p[token]):
            return token, child
        rest = (p - q).clamp_min(0)
        p = rest / rest.sum() if float(rest.sum()) > 0 else p  # q = p up to rounding: nothing is left to take away
    return int(torch.multinomial(p, 1)), None

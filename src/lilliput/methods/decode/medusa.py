"""Draft with small heads that guess further ahead.   head_i(h) = U (h + silu(W_i h + b_i)),   U the model's own head

Paper: Cai et al., Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, 2024 (arXiv
2401.10774). There each head has an output matrix of its own and learns from the text; here all share the model's, and
they learn the model's own distributions (loss below). Head i reads what the model's head reads at a token and guesses
the token i + 1 places later. The tree of guesses grows best first by the product of the heads' probabilities.

    L = mean over i of 0.8^(i - 1) KL(model at t + i || head_i at t)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import watching
from lilliput.method import OUTPUT_SHAPE, UNLABELLED, Facts, knob
from lilliput.methods.decode import Tally
from lilliput.methods.decode._backends import head_name
from lilliput.methods.decode._draft import NOTHING, Draft
from lilliput.methods.decode._trained import DECAY, LearnedDecoder, Part
from lilliput.methods.decode._verify import Drafter, speculate
from lilliput.methods.distill.logits import distillation_loss
from lilliput.training import History
from lilliput.workload import Batch, Workload


class MedusaHeads(Part):
    """(..., d) -> (k, ..., d), what the model's head turns into logits; new ones repeat their input."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, width, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def rebuild_config(self) -> dict[str, int]:
        return {"heads": self.weight.shape[0], "width": self.weight.shape[-1]}

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(1, -1, hidden.shape[-1]).to(self.weight.dtype)
        x = torch.baddbmm(self.bias.unsqueeze(1), flat.expand(len(self.weight), -1, -1), self.weight.transpose(1, 2))
        return (flat + F.silu(x)).view(-1, *hidden.shape)


@dataclass(frozen=True)
class Medusa(LearnedDecoder):
    """Heads trained on the model's own answers draft a tree: `generate(..., heads=Medusa().train(workload))`.

    Keep them by `heads.save(file)` and `MedusaHeads.load(file)`.
    """

    heads: int = knob(3, low=1, high=16, help="heads that `train` makes: levels of the tree")
    nodes: int = knob(8, low=1, high=256, help="tokens of the tree, checked in one pass")
    branch: int = knob(4, low=1, high=64, help="tokens of a head that may stand below one node")
    facts: ClassVar[Facts] = Facts(
        stage="serve", keeps={OUTPUT_SHAPE}, data=UNLABELLED, effect="same text in fewer steps"
    )

    def __call__(
        self, model: Any, input_ids: Tensor, heads: MedusaHeads | None = None, tally: Tally | None = None, **call: Any
    ) -> Tensor:
        if heads is None:
            raise UserError("there are no heads; call generate(..., custom_generate=Medusa(), heads=heads) with those "
                            "that Medusa().train(workload) gives")  # fmt: skip
        if heads.weight.shape[-1] != width_of(model):
            raise UserError(
                f"the heads read {heads.weight.shape[-1]} values, this model has {width_of(model)}; train heads for it"
            )
        return speculate(model, input_ids, _Guesses(self, model, heads), "torch", tally=tally, **call)

    def new(self, model: Any) -> MedusaHeads:
        """Untrained heads for a model."""
        return MedusaHeads(self.heads, width_of(model))

    def train(self, workload: Workload) -> MedusaHeads:
        """New heads for the workload's model, trained on its training text (else its calibration text)."""
        return self.train_(self.new(workload.model), workload)[0]

    def train_(self, heads: MedusaHeads, workload: Workload) -> tuple[MedusaHeads, History]:
        """Train heads in place; also gives the losses."""
        model: Any = workload.model
        head, draws = model.get_submodule(head_name(model)), torch.Generator().manual_seed(self.seed)

        def loss(heads: MedusaHeads, batch: Batch) -> Tensor:
            hidden, taught = lesson(model, batch, len(heads.weight), self.places, draws)
            guessed = head(heads(hidden))
            weights = [DECAY**i for i in range(len(guessed))]
            losses = [w * distillation_loss(g, t, 1.0) for w, g, t in zip(weights, guessed, taught)]
            return torch.stack(losses).sum() / len(losses)

        history = self.learn_(heads, workload, loss)
        return heads, history


@torch.no_grad()
def lesson(model: Any, batch: Batch, heads: int, places: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the head reads at n random places (n, d), and the model's logits 1 .. k places later (k, n, V)."""
    ids, seen = batch["input_ids"], []
    if ids.shape[1] <= heads:
        raise UserError(f"windows of {ids.shape[1]} tokens teach no {heads} heads; give longer ones or fewer heads")
    with watching(model, [head_name(model)], lambda name, layer, x: seen.append(x)):
        logits = model(input_ids=ids, use_cache=False).logits
    usable = ids.shape[1] - heads  # places that have as many behind them
    picks = torch.randperm(len(ids) * usable, generator=draws)[:places]
    rows, columns = picks // usable, picks % usable
    return seen[0][rows, columns], torch.stack([logits[rows, columns + i + 1] for i in range(heads)])


class _Guesses(Drafter):
    look = True

    def __init__(self, settings: Medusa, model: Any, heads: MedusaHeads):
        self.settings, self.heads, self.head = settings, heads, model.get_submodule(head_name(model))

    @torch.no_grad()
    def propose(self, ids: Tensor, room: int, hidden: Tensor | None) -> Draft:
        if hidden is None:
            return NOTHING
        logits = self.head(self.heads(hidden).to(hidden.dtype)[:room]).float()
        best = logits.log_softmax(-1).topk(min(self.settings.branch, logits.shape[-1]))
        return grow(best.values.tolist(), best.indices.tolist(), self.settings.nodes)


def grow(scores: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]], nodes: int) -> Draft:
    """The `nodes` likeliest beginnings, when level i takes tokens[i] with log-probabilities scores[i], best first."""
    waiting, found, parents = [(-scores[0][0], 0, -1, 0, 0.0)], [], []
    while waiting and len(found) < nodes:
        cost, level, parent, rank, before = heapq.heappop(waiting)
        if rank + 1 < len(scores[level]):
            heapq.heappush(waiting, (before - scores[level][rank + 1], level, parent, rank + 1, before))
        if level + 1 < len(scores):
            heapq.heappush(waiting, (cost - scores[level + 1][0], level + 1, len(found), 0, cost))
        found.append(tokens[level][rank])
        parents.append(parent)
    return Draft(found, parents)


def width_of(model: Any) -> int:
    """Values that the head of a language model reads."""
    return model.get_submodule(head_name(model)).in_features

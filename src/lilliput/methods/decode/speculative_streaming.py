"""Draft with streams that branch off inside the model, in the pass that checks the last draft.

Paper: Bhendawade et al., Speculative Streaming: Fast LLM Inference without Auxiliary Models, 2024 (arXiv 2402.11131).
Before one of the upper blocks k streams join each token t: stream j starts from what that block reads at t, a thin
linear map of it added, and a vector of its own; it sees the tokens up to t and the streams up to j at t, and guesses
the token at t + 1 + j. Guesses grow a tree, best first by the product of their probabilities. Before streams are put
behind the nodes of a tree, an early estimate of the model, from what the entry block reads, tells which are weak.

    L = mean over j of 0.8^(j - 1) KL(model at t + j || head(stream j)) + KL(model at t || head(early estimate at t))

This is the lossless mode: streams have adapters of their own (low rank, in the upper blocks), no token sees a stream,
and the model's answers stay as they are to the bit. There the targets are the tokens of the text, here as in
`decode.medusa` the model's own distributions. Streams stand in the places of the tokens to come, weak nodes lose their
streams but are checked like the others, and the early estimate is a thin linear map before the model's own head: these
are ours. Trees run by transformers; the native decoder reads chains, and no rows that others must not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import OUTPUT_SHAPE, UNLABELLED, Facts, knob
from lilliput.methods.decode import Tally
from lilliput.methods.decode._ahead import (
    Reading,
    Rows,
    RowsBackend,
    adapted_sizes,
    blocks_of,
    check_rows,
    drawn_anchors,
    final_norm,
    places_behind,
)
from lilliput.methods.decode._backends import Backend, head_name
from lilliput.methods.decode._draft import NOTHING, Draft
from lilliput.methods.decode._trained import DECAY, LearnedDecoder
from lilliput.methods.decode._verify import Drafter, speculate
from lilliput.methods.decode.medusa import grow
from lilliput.methods.distill.logits import distillation_loss
from lilliput.training import History
from lilliput.workload import Batch, Workload


class ThinLinear(nn.Module):
    """x + up (down x) of (..., d), nothing but x when new."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.zeros(rank, width)), nn.Parameter(torch.zeros(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.down.dtype)
        return x + F.linear(F.linear(x, self.down), self.up)


class Streams(Rows):
    """What SpeculativeStreaming learns: the streams' vectors `first` (k, d), their adapters in the upper blocks, the
    map that they start by, and the early estimate."""

    def __init__(self, count: int, width: int, entry: int, rank: int, sizes: Any):
        super().__init__(count, width, entry, rank, sizes)
        self.branch, self.early = ThinLinear(width, rank), ThinLinear(width, rank)

    def start(self, read: Tensor) -> Tensor:
        return self.branch(read).unsqueeze(-2) + self.first


@dataclass(frozen=True)
class SpeculativeStreaming(LearnedDecoder):
    """Streams in the upper blocks draft a tree while the last one is checked: `generate(..., streams=streams)`.

    `streams = SpeculativeStreaming().train(workload)`; keep them by `streams.save(file)` and `Streams.load(file)`.
    """

    streams: int = knob(3, low=1, high=16, help="streams that `train` makes: levels of the tree")
    layers: int = knob(4, low=1, high=1024, help="upper blocks that streams pass through")
    rank: int = knob(8, low=1, high=1024, help="width of adapters and of the other linear maps")
    nodes: int = knob(8, low=1, high=256, help="tokens of the tree, checked in one pass")
    branch: int = knob(4, low=1, high=64, help="tokens of a stream that may stand below one node")
    kept: int = knob(8, low=0, high=256, help="nodes that get streams, the likeliest by the early estimate; the others "
                     "end a draft")  # fmt: skip
    lr: float = knob(4e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    facts: ClassVar[Facts] = Facts(
        stage="serve", keeps={OUTPUT_SHAPE}, data=UNLABELLED, effect="same text in fewer steps"
    )
    paper: ClassVar[str] = "speculative_streaming"

    def __call__(
        self, model: Any, input_ids: Tensor, streams: Streams | None = None, tally: Tally | None = None, **call: Any
    ) -> Tensor:
        drafter = _Guesses(self, check_rows(streams, model, "SpeculativeStreaming", "streams"), model)
        return speculate(model, input_ids, drafter, "torch", tally=tally, **call)

    @torch.no_grad()
    def new(self, model: Any) -> Streams:
        """Untrained streams for a model, which repeat what the token that they stand behind says.

        Raises UserError for a model without blocks as Llama has them, or with fewer than `layers`.
        """
        head, count = model.get_submodule(head_name(model)), len(blocks_of(model))
        if self.layers > count:
            raise UserError(f"streams should pass through {self.layers} blocks, the model has {count}; lower layers")
        entry = count - self.layers
        part = Streams(self.streams, head.in_features, entry, self.rank, adapted_sizes(model, entry))
        draws = torch.Generator().manual_seed(self.seed)
        part.draw_downs_(draws)
        for thin in (part.branch, part.early):
            thin.down.copy_(torch.randn(thin.down.shape, generator=draws) / thin.down.shape[1] ** 0.5)
        part.first.copy_(0.02 * torch.randn(part.first.shape, generator=draws))
        return part

    def train(self, workload: Workload) -> Streams:
        """New streams for the workload's model, trained on its training text (else its calibration text)."""
        return self.train_(self.new(workload.model), workload)[0]

    def train_(self, streams: Streams, workload: Workload) -> tuple[Streams, History]:
        """Train streams in place; also gives the losses."""
        model: Any = workload.model
        draws = torch.Generator().manual_seed(self.seed)

        def loss(part: Streams, batch: Batch) -> Tensor:
            ids = batch["input_ids"]
            return lesson_loss(model, part, ids, drawn_anchors(ids, part.count, self.places, draws))

        history = self.learn_(streams, workload, loss)
        return streams, history


def lesson_loss(model: Any, part: Streams, ids: Tensor, anchors: Tensor) -> Tensor:
    """The loss of streams, and of the early estimate, at the tokens number `anchors` (G,) of texts (B, T)."""
    head = model.get_submodule(head_name(model))
    reading = Reading(model, ids, part.entry)
    guessed = head(reading.ahead(part, anchors)).unflatten(1, (-1, part.count))
    taught = reading.logits[:, places_behind(anchors, part.count)].unflatten(1, (-1, part.count))
    streams = [DECAY**j * distillation_loss(guessed[:, :, j], taught[:, :, j], 1.0) for j in range(part.count)]
    early = head(reading.norm(part.early(reading.read[:, anchors]).to(reading.read.dtype)))
    return torch.stack(streams).mean() + distillation_loss(early, reading.logits[:, anchors], 1.0)


class _Guesses(Drafter):
    def __init__(self, settings: SpeculativeStreaming, streams: Streams, model: Any):
        self.settings, self.streams = settings, streams
        self.head, self.norm = model.get_submodule(head_name(model)), final_norm(model)

    def engine(self, runtime: str, model: Any, length: int, cache: Any) -> Backend:
        return RowsBackend(model, cache, self.streams, self.choose)

    def choose(self, read: Tensor, draft: Draft) -> list[int]:
        """The end of the text (0), and the nodes (number plus 1) that are likeliest to hold."""
        if len(draft.tokens) <= self.settings.kept:
            return list(range(len(read)))
        early = self.head(self.norm(self.streams.early(read).to(read.dtype))).float().log_softmax(-1)
        return likeliest(early, draft, self.settings.kept)

    @torch.no_grad()
    def propose(self, ids: Tensor, room: int, hidden: Tensor | None) -> Draft:
        if hidden is None:
            return NOTHING
        logits = self.head(hidden[:room]).float()
        best = logits.log_softmax(-1).topk(min(self.settings.branch, logits.shape[-1]))
        return grow(best.values.tolist(), best.indices.tolist(), self.settings.nodes)


def likeliest(scores: Tensor, draft: Draft, count: int) -> list[int]:
    """0, and the numbers plus 1 of the `count` nodes whose ways from the text have the highest log-probability, by the
    scores (1 + n, V) after the text's end and after each node; in their order."""
    sums = [0.0]
    for token, parent in zip(draft.tokens, draft.parents):
        sums.append(sums[parent + 1] + float(scores[parent + 1, token]))
    best = sorted(range(1, len(sums)), key=lambda node: -sums[node])[:count]
    return [0, *sorted(best)]

"""Draft with mask tokens that the model itself reads, through adapters that only they pass through.

Paper: Samragh et al., Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential, 2025 (arXiv
2507.11851). k masks stand behind a token x_n; mask j, in the place of x_{n+j}, guesses x_{n+j+1}. Its layers compute
y = W x + B A x, those of ordinary tokens y = W x, so the model's own answers stay as they are to the bit. A sampler
makes the guesses agree with each other: it reads what mask j came to, z_j, and the token guessed before.

    L = mean over j of KL(model at n + j || head(z_j)) + KL(model at n + j || head(sampler(x_{n+j}, z_j)))
        + mean (z_j - h_{n+j})^2,    h what the model's head reads there

Only masks, adapters and sampler learn. There the targets are the tokens of the text, here as in `decode.medusa` the
model's own distributions; equal weights of the terms, what masks start from and the residual way around the sampler's
two layers are ours. Quadratic decoding puts masks behind every drafted token, so that whatever holds has a draft ready;
linear decoding puts them behind the last one alone, and after a refusal makes a pass without a draft. Both read chains
by transformers: the native decoder knows no rows that the rest of a pass must not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    places_behind,
)
from lilliput.methods.decode._backends import Backend, head_name
from lilliput.methods.decode._draft import NOTHING, Draft
from lilliput.methods.decode._trained import LearnedDecoder
from lilliput.methods.decode._verify import Drafter, speculate
from lilliput.methods.distill.logits import distillation_loss
from lilliput.training import History
from lilliput.workload import Batch, Workload

QUADRATIC, LINEAR = "quadratic", "linear"


class MaskAdapters(Rows):
    """What GatedLoraMtp learns: the masks' embeddings `first` (k, d), their adapters in all blocks, and the sampler."""

    def __init__(self, count: int, width: int, entry: int, rank: int, sizes: Any):
        super().__init__(count, width, entry, rank, sizes)
        self.into, self.out = nn.Linear(2 * width, width), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def start(self, read: Tensor) -> Tensor:
        return self.first.expand(*read.shape[:2], -1, -1)

    def sampler(self, previous: Tensor, z: Tensor) -> Tensor:
        """What the head is to read for a mask's z (..., d) when the token before has the embedding `previous` (..., d);
        z itself when new."""
        previous, z = previous.to(self.first.dtype), z.to(self.first.dtype)
        both = torch.cat([F.rms_norm(previous, previous.shape[-1:]), z], -1)
        return z + self.out(F.silu(self.into(both)))


@dataclass(frozen=True)
class GatedLoraMtp(LearnedDecoder):
    """Mask tokens draft the next tokens in the pass that checks the last draft: `generate(..., adapters=adapters)`.

    `adapters = GatedLoraMtp().train(workload)`; keep them by `adapters.save(file)` and `MaskAdapters.load(file)`.
    """

    masks: int = knob(4, low=1, high=16, help="mask tokens that `train` makes: tokens of a draft")
    rank: int = knob(16, low=1, high=1024, help="width of the adapters")
    mode: str = knob(QUADRATIC, choices=(QUADRATIC, LINEAR), help="masks behind every drafted token, or the last alone")
    lr: float = knob(4e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    facts: ClassVar[Facts] = Facts(
        stage="serve", keeps={OUTPUT_SHAPE}, data=UNLABELLED, effect="same text in fewer steps"
    )
    paper: ClassVar[str] = "gated_lora_mtp"

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        adapters: MaskAdapters | None = None,
        tally: Tally | None = None,
        **call: Any,
    ) -> Tensor:
        drafter = _Guesses(check_rows(adapters, model, "GatedLoraMtp", "adapters"), model, self.mode)
        return speculate(model, input_ids, drafter, "torch", tally=tally, **call)

    @torch.no_grad()
    def new(self, model: Any) -> MaskAdapters:
        """Untrained adapters for a model: masks are its average token but for noise, and act as that would.

        Raises UserError for a model without blocks as Llama has them.
        """
        head, draws = model.get_submodule(head_name(model)), torch.Generator().manual_seed(self.seed)
        blocks_of(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            part = MaskAdapters(self.masks, head.in_features, 0, self.rank, adapted_sizes(model, 0))
        part.draw_downs_(draws)
        table = model.get_input_embeddings()
        some = table(torch.arange(0, table.num_embeddings, max(1, table.num_embeddings // 1024))).float()
        part.first.copy_(some.mean(0) + some.std() * torch.randn(part.first.shape, generator=draws))
        return part

    def train(self, workload: Workload) -> MaskAdapters:
        """New adapters for the workload's model, trained on its training text (else its calibration text)."""
        return self.train_(self.new(workload.model), workload)[0]

    def train_(self, adapters: MaskAdapters, workload: Workload) -> tuple[MaskAdapters, History]:
        """Train adapters in place; also gives the losses."""
        model: Any = workload.model
        draws = torch.Generator().manual_seed(self.seed)

        def loss(part: MaskAdapters, batch: Batch) -> Tensor:
            ids = batch["input_ids"]
            anchors = drawn_anchors(ids, part.count, self.places, draws)
            return lesson_loss(model, part, ids, anchors)

        history = self.learn_(adapters, workload, loss)
        return adapters, history


def lesson_loss(model: Any, part: MaskAdapters, ids: Tensor, anchors: Tensor) -> Tensor:
    """The loss of masks behind the tokens number `anchors` (G,) of texts (B, T)."""
    head, table = model.get_submodule(head_name(model)), model.get_input_embeddings()
    reading = Reading(model, ids, part.entry)
    z = reading.ahead(part, anchors)
    places = places_behind(anchors, part.count)
    taught = reading.logits[:, places]
    sampled = head(part.sampler(table(ids[:, places]), z).to(z.dtype))
    guesses = distillation_loss(head(z), taught, 1.0) + distillation_loss(sampled, taught, 1.0)
    return guesses + F.mse_loss(z.float(), reading.hidden[:, places].float())


class _Guesses(Drafter):
    """Reads the masks behind the last token that held; the sampler sees the tokens guessed on the way."""

    def __init__(self, adapters: MaskAdapters, model: Any, mode: str):
        self.adapters, self.mode = adapters, mode
        self.head, self.table = model.get_submodule(head_name(model)), model.get_input_embeddings()

    def engine(self, runtime: str, model: Any, length: int, cache: Any) -> Backend:
        return RowsBackend(model, cache, self.adapters, self.choose)

    def choose(self, read: Tensor, draft: Draft) -> list[int]:
        return list(range(len(read))) if self.mode == QUADRATIC else [len(read) - 1]

    @torch.no_grad()
    def propose(self, ids: Tensor, room: int, hidden: Tensor | None) -> Draft:
        if hidden is None:
            return NOTHING
        found, last = [], ids[-1]
        for z in hidden[:room]:
            last = self.head(self.adapters.sampler(self.table(last), z).to(z.dtype)).argmax(-1)
            found.append(int(last))
        return Draft.chain(found)

"""Let a small model read the prompt, and predict from it what the large one would keep of the prompt.

The auxiliary model reads all tokens but the last; linear maps turn its keys and values into those of the large model,
which reads the last token alone and goes on as always. The text is another one than without: it is good as far as the
prediction is. Training lets the large model answer with predicted keys and values at every place, itself unchanged:

    L = CE(large model, predicted keys and values) + CE(auxiliary) + c sum over blocks of mean |K - K*| + mean |V - V*|

Paper: Horton et al., KV Prediction for Improved Time to First Token, 2024 (arXiv 2410.08391). There the maps begin at
random; here they begin as the least-squares solution, and the paper's z-loss is left out. Keeping the first blocks
instead of evenly spread ones is a choice of our own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.anatomy import Block, anatomy, in_out, linear_parts, needs_blocks
from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import OUTPUT_SHAPE, UNLABELLED, Decoder, Facts, knob
from lilliput.methods.decode import Tally
from lilliput.methods.decode._backends import RUNTIMES, Backend, head_name
from lilliput.methods.decode._draft import NOTHING, Draft
from lilliput.methods.decode._kv_predictor import (
    KvPredictor,
    answer,
    base_parts,
    fit_maps_,
    key_value_names,
    key_widths,
    keys_and_values,
)
from lilliput.methods.decode._verify import Drafter, context_of, speculate
from lilliput.methods.decode._vocabulary import UNKNOWN, check_vocabulary, tokenizer_of
from lilliput.methods.distill.logits import batches_of, hard_loss, only
from lilliput.methods.prune.depth import Depth
from lilliput.training import History, train
from lilliput.workload import Batch, Workload

STARTING = 8  # batches that the maps are first fitted to
adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1)  # as in the paper


@dataclass(frozen=True)
class KvPrediction(Decoder):
    """A small model reads the prompt for the large one: `generate(..., predictor=KvPrediction().train(workload))`."""

    keep: float = knob(0.5, low=0.01, high=1.0, help="share of the model's blocks in the auxiliary that `train` makes")
    blocks: str = knob("spread", choices=("spread", "first"), help="which of them: evenly spread ones, or the first")
    runtime: str = knob("torch", choices=RUNTIMES, help="what runs both models: transformers, or the native decoder")
    steps: int = knob(300, low=0, high=1_000_000, help="updates of the weights in `train`")
    seconds: float = knob(0.0, low=0.0, help="end training after this long, whatever the steps; 0 sets no limit")
    distance: float = knob(1.0, low=0.0, high=100.0, help="weight of the distance of keys and values in the loss (c)")
    lr: float = knob(1e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    seed: int = knob(0, low=0, help="order of the data")
    facts: ClassVar[Facts] = Facts(
        stage="serve", keeps={OUTPUT_SHAPE}, data=UNLABELLED, effect="earlier first token, another text"
    )
    paper: ClassVar[str] = "kv_prediction"

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        predictor: KvPredictor | None = None,
        tokenizers: Any = UNKNOWN,
        tally: Tally | None = None,
        **call: Any,
    ) -> Tensor:
        ready = check_predictor(model, predictor, tokenizers)

        def prefill(engine: Backend, ids: Tensor) -> None:
            if len(ids) - 1 > (reads := context_of(ready.auxiliary)):
                raise UserError(f"the prompt has {len(ids)} tokens, but the auxiliary model reads {reads}; shorten it")
            if len(ids) > 1:
                engine.fill(ready.predict(model, ids[:-1], self.runtime))

        return speculate(model, input_ids, _Silent(), self.runtime, prefill=prefill, tally=tally, **call)

    def train(self, workload: Workload, auxiliary: Any = None) -> KvPredictor:
        """A predictor for the workload's model, trained on its training text (else its calibration text).

        `auxiliary` is a smaller model of the same tokenizer, of which a copy is trained; by default a copy of the model
        with fewer blocks.
        """
        return self.train_(self.begin(workload, auxiliary), workload)[0]

    def begin(self, workload: Workload, auxiliary: Any = None) -> KvPredictor:
        """The predictor before any training: its maps are the least-squares solution on a few batches."""
        model: Any = workload.model
        head_name(model)
        widths, tokenizer = key_widths(base_parts(model)), workload.tokenizer
        if auxiliary is None:
            small = self.auxiliary(model)
        else:
            check_vocabulary(model, auxiliary, "the auxiliary model", (tokenizer, None))
            small, tokenizer = copy.deepcopy(auxiliary), None
        predictor = KvPredictor(small, widths, tokenizer_of(small, tokenizer)).requires_grad_(True)
        with evaluating(model), evaluating(small):
            return fit_maps_(predictor, model, [batch["input_ids"] for batch in batches_of(workload)[:STARTING]])

    def auxiliary(self, model: nn.Module) -> nn.Module:
        """A copy of the model with the share `keep` of its blocks."""
        names = [block.name for block in needs_blocks(model, self.name()).blocks]
        kept = chosen(len(names), self.keep, self.blocks)
        return Depth().apply(model, layers=[name for i, name in enumerate(names) if i not in kept])

    def train_(self, predictor: KvPredictor, workload: Workload) -> tuple[KvPredictor, History]:
        """Train a predictor in place; also gives the losses."""
        model: Any = workload.model
        names = key_value_names(model)

        def loss(predictor: nn.Module, batch: Batch) -> Tensor:
            ids = batch["input_ids"]
            with torch.no_grad():
                true = keys_and_values(model, names, ids)
            predicted, small = predictor(ids)
            pairs = [(p, t) for ps, ts in zip(predicted, true) for p, t in zip(ps, ts)]
            away = torch.stack([(p - t).abs().mean() for p, t in pairs]).sum()
            told = hard_loss(workload, answer(model, names, ids, predicted), batch)
            return told + hard_loss(workload, small, batch) + self.distance * away

        with only(model, {}), evaluating(model):
            history = train(predictor, batches_of(workload), loss, steps=self.steps, seconds=self.seconds or None,
                            lr=self.lr, optimizer=adamw, clip_norm=1.0, seed=self.seed)  # fmt: skip
        return predictor.eval(), history


class _Silent(Drafter):
    """Drafts nothing: a token a step."""

    def propose(self, ids: Tensor, room: int, hidden: Tensor | None) -> Draft:
        return NOTHING


def chosen(count: int, keep: float, which: str) -> list[int]:
    """Indices of the blocks, of `count`, that stay: at least one."""
    kept = max(1, round(keep * count))
    return list(range(kept)) if which == "first" else [i * count // kept for i in range(kept)]


def check_predictor(model: Any, predictor: KvPredictor | None, tokenizers: Any = UNKNOWN) -> KvPredictor:
    """The predictor. Raises UserError for one that is missing, trains, or was made for another model or tokenizer."""
    if predictor is None:
        raise UserError("there is no predictor; call generate(..., custom_generate=KvPrediction(), predictor=predictor)"
                        " with what KvPrediction().train(workload) gives")  # fmt: skip
    if predictor.training:
        raise UserError("the predictor is in training mode; call predictor.eval()")
    predictor.parts_of(model)
    check_vocabulary(
        model,
        predictor.auxiliary,
        "the auxiliary model",
        (None, predictor.tokenizer) if tokenizers == UNKNOWN else tokenizers,
    )
    return predictor


# --- what the first token costs ----------------------------------------------------------------------------------


def first_token_flops(model: nn.Module, tokens: int, predictor: KvPredictor | None = None) -> int:
    """Operations up to the logits after a prompt, a multiply-add being two: products with weights and attention.

    With a predictor: its auxiliary model reads all tokens but the last without its head, the maps, and the model reads
    the last one. Norms, activations, the softmax and looking up embeddings are not counted.
    """
    if tokens < 1:
        raise UserError(f"the prompt has {tokens} tokens; give at least 1")
    if predictor is None:
        return _reading(model, tokens, 0) + _head(model)
    maps = sum(linear.weight.numel() for linear in (*predictor.key_maps, *predictor.value_maps))  # pyright: ignore
    before = _reading(predictor.auxiliary, tokens - 1, 0) + 2 * (tokens - 1) * maps
    return before + _reading(model, 1, tokens - 1) + _head(model)


def _reading(model: nn.Module, tokens: int, before: int) -> int:
    """Of all blocks, for some tokens behind others."""
    seen = tokens * before + tokens * (tokens + 1) // 2  # pairs of a query and a key
    return sum(2 * tokens * _weights(model, block) + 4 * _width(block) * seen for block in anatomy(model).blocks)


def _weights(model: nn.Module, block: Block) -> int:
    """Weights of a block's linear layers, factors counted one by one."""
    attention, mlp = block.attention, block.mlp
    names = ([attention.q, attention.k, attention.v, attention.o] if attention else []) + (
        [*mlp.into, mlp.down] if mlp else []
    )
    sizes = [in_out(part) for name in names for part in linear_parts(model.get_submodule(name))]
    return sum(size[0] * size[1] for size in sizes if size)


def _width(block: Block) -> int:
    """Numbers of a query, all heads together."""
    return block.attention.heads * block.attention.head_dim if block.attention else 0


def _head(model: Any) -> int:
    size = in_out(model.get_submodule(head_name(model)))
    return 2 * size[0] * size[1] if size else 0

"""Progressive sharing of activations: a training in which, from the last layer down, layers begin to reuse attention.

Layer by layer stops to compute queries and keys (`kind="qk"`) or keys and values ("kv") of its own and takes those of
the nearest layer before it that still does, until `share` of the layers reuse. Steps become cheaper while the training
goes on, and the trained model serves with any number of sharing layers up to that.

    sharing = Epas().callback(model)
    train(model, batches, loss, steps=1000, callbacks=[sharing])            # lilliput's own loop
    Trainer(model, args, callbacks=[sharing.for_trainer()])                 # transformers
    served = sharing.served(model)

Paper: EPAS: Efficient Training with Progressive Activation Sharing (Karim et al., 2026, arXiv 2601.19089). Where the
paper hands on queries and keys, the layers here hand on the probabilities made of them, the same function with fewer
products. When the first and the last layer switch is ours (reconstructed).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.distill.logits import batches_of, check_tokens
from lilliput.methods.layers._known import known_attentions
from lilliput.methods.layers._spans import Spans, followers
from lilliput.methods.layers.shared_attention import SharedAttention
from lilliput.methods.layers.shared_kv import SharedKv
from lilliput.training import Callback, State, train
from lilliput.workload import Workload, need_workload

KINDS: dict[str, type[Spans]] = {"qk": SharedAttention, "kv": SharedKv}


@dataclass(frozen=True)
class Epas(Method):
    """Train a Llama-type decoder while more and more of its layers reuse the attention of an earlier one.

    Applied to a workload it trains the model on its training data, which continues a pretraining.
    """

    share: float = knob(0.5, low=0.01, high=0.95, help="share of layers that reuse in the end; unused for named layers")
    kind: str = knob("qk", choices=tuple(KINDS), help="what is reused: queries with keys, or keys with values")
    start: float = knob(0.1, low=0.0, high=1.0, help="share of the training after which the first layers switch")
    end: float = knob(0.5, low=0.0, high=1.0, help="share of the training after which the last layers switch")
    group: int = knob(1, low=1, high=256, help="layers that switch at once")
    steps: int = knob(200, low=0, high=1_000_000, help="updates of the weights")
    lr: float = knob(1e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    seed: int = knob(0, low=0, help="order of the data")

    paper: ClassVar[str] = "epas"
    facts: ClassVar[Facts] = Facts(
        stage="train",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="shorter training steps, smaller KV-cache, smaller",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.start > self.end:
            raise UserError(f"Epas.start is {self.start}, after end, {self.end}; give a start that is not later")

    @property
    def spans(self) -> Spans:
        """The method that makes layers reuse, without a training."""
        return KINDS[self.kind](share=self.share, choice="last")

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the attentions but the first, which has none to reuse. Raises UserError for unknown kinds."""
        yield from self.spans.targets(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        work = need_workload(workload, self.name(), "whose data it learns from")
        check_tokens(work, model)
        sharing = Sharing(self, model, layers)
        train(model, batches_of(work), work.loss, steps=self.steps, lr=self.lr, clip_norm=1.0, seed=self.seed,
              callbacks=[sharing])  # fmt: skip
        return sharing.served(model)

    def callback(self, model: nn.Module, layers: Iterable[str] | None = None) -> Sharing:
        """A callback of `lilliput.training.train` for this model; `.for_trainer()` gives the one of transformers.

        `layers` are names or patterns of those that may reuse. Raises UserError for a model without known attention.
        """
        return Sharing(self, model, self.resolve(model, layers))

    def sharing_at(self, done: float, most: int) -> int:
        """How many of `most` layers reuse after a share of the training."""
        switches = -(-most // self.group)
        at = (self.start + (self.end - self.start) * i / max(switches - 1, 1) for i in range(switches))
        return min(most, sum(done + 1e-9 >= when for when in at) * self.group)


class Sharing(Callback):
    """Lets more and more layers of one model reuse attention; `order` are those that will, in the order of switching.

    While it trains, the model keeps the projections that are no longer called: its parameters have their names, and a
    checkpoint of it is that of the plain model.
    """

    def __init__(self, settings: Epas, model: nn.Module, layers: Iterable[str]):
        self.settings, self.spans = settings, settings.spans
        self.names = list(known_attentions(model, settings.name(), self.spans.leading))
        self.order = list(self.spans.plan(model, None, list(layers)))[::-1]
        self.plain = {name: model.get_submodule(name) for name in self.names}
        self.active = 0

    def share_(self, model: nn.Module, count: int) -> None:
        """Let the last `count` of the layers reuse, and no others."""
        self._undo_(model)
        self.spans.share_(model, followers(self.names, self.order[:count]), idle=True)
        self.active = count

    def see_(self, model: nn.Module, done: float) -> None:
        """Switch what is to be switched after a share of the training."""
        count = self.settings.sharing_at(done, len(self.order))
        if count != self.active:
            self.share_(model, count)

    def served(self, model: nn.Module, layers: int | None = None) -> nn.Module:
        """A copy that serves with so many sharing layers, all that the settings say if not given, and without the
        projections that those have left. Raises UserError for more."""
        count = len(self.order) if layers is None else layers
        if not 0 <= count <= len(self.order):
            raise UserError(f"layers is {layers}; this training lets up to {len(self.order)} layers share")
        self._undo_(model)
        made = copy.deepcopy(model)
        self.share_(model, self.active)
        self.spans.share_(made, followers(self.names, self.order[:count]))
        return made

    def _undo_(self, model: nn.Module) -> None:
        for name, attention in self.plain.items():
            if not set(model.get_submodule(name).children()) & set(attention.children()):
                raise UserError("this callback was made for another model; call Epas.callback with the one that trains")
            set_module(model, name, attention)

    def on_start(self, state: State) -> None:
        self.share_(state.model, max(self.active, self.settings.sharing_at(0.0, len(self.order))))

    def on_step(self, state: State) -> None:
        self.see_(state.model, state.done)

    def memory(self) -> dict[str, Any]:
        return {"active": self.active}

    def recall(self, memory: dict[str, Any]) -> None:
        self.active = memory["active"]

    def for_trainer(self) -> Any:
        """The same as a `transformers.TrainerCallback`."""
        from lilliput.methods.train._trainer_callback import TrainerSharing

        return TrainerSharing(self)

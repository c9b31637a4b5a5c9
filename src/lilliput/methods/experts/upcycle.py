"""A dense Llama-type model as a mixture of experts: its feed-forward parts split by neurons, or copied, and healed.

    split: neurons that fire together share an expert, weights of the chosen sum to k      copy: they sum to 1

Papers: Zhang et al., MoEfication (2022, arXiv 2110.01786) for the split; Komatsuzaki et al., Sparse Upcycling (2023,
arXiv 2212.05055) for copies. Healing distils the dense model into the new parts alone; a loss of `balance` times that
of the Switch transformer keeps all experts in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lilliput.anatomy import Mlp, needs_blocks
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.distill.logits import batches_of, distillation_loss, only, teacher_logits
from lilliput.methods.experts._mixture import Mixture, copied_mixture, split_mixture
from lilliput.methods.experts._neurons import (
    contributions,
    equal_clusters,
    firing_together,
    fitted_router,
    input_rows,
)
from lilliput.methods.experts._routing import Routed, at_routers, balance_loss, routers_of
from lilliput.methods.layers._feed_forward import check_same, structural_obstacle
from lilliput.methods.layers._rectified import activation_name
from lilliput.methods.prune._surgery import refuse_replaced
from lilliput.training import train
from lilliput.workload import Batch, Workload, need_workload

TOKENS = 2048  # of the calibration data that experts and routers are made from
SPLIT, COPY = "split", "copy"


@dataclass(frozen=True)
class Upcycle(Method):
    """Make the feed-forward parts of a model mixtures of experts, of which each token uses a few."""

    experts: int = knob(32, low=2, high=4096, help="experts of a part; its neurons must divide by them to split it")
    top_k: int = knob(8, low=1, high=4096, help="experts that a token uses")
    how: str = knob(SPLIT, choices=(SPLIT, COPY), help="split the neurons, or copy all of them into each expert")
    noise: float = knob(0.1, low=0.0, high=10.0, help="of copies: noise on their weights, in standard deviations")
    steps: int = knob(200, low=0, high=1_000_000, help="updates of the new parts; 0 leaves them as they are made")
    seconds: float = knob(0.0, low=0.0, help="end the updates after this long, whatever the steps; 0 sets no limit")
    lr: float = knob(1e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    balance: float = knob(0.01, low=0.0, high=10.0, help="weight of the loss that keeps all experts in use")
    seed: int = knob(0, low=0, help="first clusters, noise, and order of the data")
    facts: ClassVar[Facts] = Facts(
        stage="depth",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="fewer weights read for a token, at a loss of quality",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.top_k > self.experts:
            raise UserError(f"Upcycle.top_k is {self.top_k}, above the {self.experts} experts; lower it")

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the feed-forward modules. Raises UserError that says why none can be replaced."""
        mlps = [block.mlp for block in needs_blocks(model, self.name()).blocks if block.mlp]
        reasons = {mlp.name: _obstacle(model, mlp) for mlp in mlps}
        if all(reasons.values()):
            refuse_replaced(model, [n for m in mlps for n in (*m.into, m.down)], self.name())
            why = next(iter(reasons.values()), "there is no feed-forward part that all tokens run through")
            raise UserError(f"{self.name()} finds no feed-forward part it can replace in {type(model).__name__}: {why}")
        yield from (name for name, why in reasons.items() if not why)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        mlps = {b.mlp.name: b.mlp for b in needs_blocks(model, self.name()).blocks if b.mlp}
        split = [name for name, settings in layers.items() if settings.how == SPLIT]
        rows: dict[str, Tensor] = {}
        if split:
            work = need_workload(workload, self.name(), "to see which neurons fire together (or use how='copy')")
            rows = input_rows(model, work, split, TOKENS)
        for name, settings in layers.items():
            set_module(model, name, settings.mixture(model, mlps[name], rows.get(name)))
        if self.steps:
            self.heal_(model, need_workload(workload, self.name(), "to heal the model (or use steps=0)"), layers)
        return model

    def mixture(self, model: nn.Module, mlp: Mlp, x: Tensor | None) -> Mixture:
        """What takes the place of one feed-forward part; x (T, d) is what it read, needed for a split."""
        layers: list[Any] = [model.get_submodule(name) for name in (*mlp.into, mlp.down)]
        activation = _activation(model, mlp)
        assert activation is not None
        check_same(mlp.name, model.get_submodule(mlp.name), layers, ACT2FN[activation])
        if x is None:
            return copied_mixture(layers, self.experts, self.top_k, activation, self.noise, self.seed)
        if layers[0].out_features % self.experts:
            raise UserError(
                f"the {layers[0].out_features} neurons of {mlp.name!r} do not divide by {self.experts} experts; give "
                "experts=N that divides them, or how='copy'"
            )
        size = contributions(layers, ACT2FN[activation], x)
        owner = equal_clusters(firing_together(size), self.experts, self.seed)
        return split_mixture(layers, owner, self.top_k, activation, fitted_router(x, size, owner))

    def heal_(self, model: nn.Module, work: Workload, names: Mapping[str, object]) -> None:
        """Train the named mixtures of `model` to give the answers of the workload's model."""
        routed: list[Routed] = []
        routers = routers_of(model, self.name())

        def loss(student: nn.Module, batch: Batch) -> Tensor:
            routed.clear()
            with at_routers(routers, lambda index, x, found: routed.append(found)):
                logits = work.forward(student, batch)
            taught = distillation_loss(logits, teacher_logits(work, batch), 1.0)
            return taught + self.balance * torch.stack([balance_loss(r) for r in routed]).mean()

        inside = (n for n, _ in model.named_modules() if any(f"{n}.".startswith(f"{name}.") for name in names))
        with only(model, dict.fromkeys(inside)), evaluating(work.model):
            train(model, batches_of(work), loss, steps=self.steps, seconds=self.seconds or None, lr=self.lr,
                  clip_norm=1.0, seed=self.seed)  # fmt: skip
        routed.clear()


def _activation(model: nn.Module, mlp: Mlp) -> str | None:
    """What transformers calls the activation of a feed-forward part, None when it is not the one of the config."""
    name, config = activation_name(model, mlp), getattr(model, "config", None)
    named = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if name is None or named not in ACT2FN or type(ACT2FN[named]) is not type(model.get_submodule(name)):
        return None
    return named


def _obstacle(model: nn.Module, mlp: Mlp) -> str:
    """Why a feed-forward part cannot become a mixture, '' when it can."""
    if why := structural_obstacle(model, mlp):
        return why
    layers: list[Any] = [model.get_submodule(name) for name in (*mlp.into, mlp.down)]
    if not mlp.gated or any(layer.bias is not None for layer in layers):
        return f"{mlp.name!r} has no gate, or its layers have biases"
    if _activation(model, mlp) is None:
        return f"the activation of {mlp.name!r} is not the one that the model's config names; upcycle before relufy"
    return ""

"""A network hidden in random weights: which of them to keep is learned, their values never are.   W = random * kept

Paper: What's Hidden in a Randomly Weighted Neural Network? (Ramanujan et al., 2020, arXiv 1911.13299), edge-popup: each
weight has a score, the weights with the largest |score| of a layer are kept, and the gradient of what is kept goes
straight to the scores:

    W = w * top_k(|s|),   w = sign * sqrt(2 / (inputs k)),   dL/ds = dL/dW * w * sign(s)

What a layer had learned is dropped. Biases go, batch norms lose scale and shift when every layer is random, and all
else is frozen, so nothing but the choice is learned. A layer is stored as a seed and one bit per weight, from which
each pass makes the weights again: nothing runs faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
from torch import nn

from lilliput.anatomy import anatomy
from lilliput.edits import build_module, module_config, set_module
from lilliput.method import (
    BLOCK_COUNT,
    FLOAT_WEIGHTS,
    LABELLED,
    LAYER_SHAPES,
    OUTPUT_SHAPE,
    PACKED_WEIGHTS,
    Facts,
    Method,
    knob,
)
from lilliput.methods.distill.logits import batches_of, only
from lilliput.methods.prune._hidden import HiddenConv2d, HiddenLinear, has_hidden_form, hidden_layer, split_mix
from lilliput.training import train
from lilliput.workload import Workload, need_workload

__all__ = ["HiddenConv2d", "HiddenLinear", "HiddenNetworks"]
sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)


@dataclass(frozen=True)
class HiddenNetworks(Method):
    """Replace weights by random ones and learn which of them to keep; a seed and a bit per weight are stored."""

    kept: float = knob(0.5, low=0.01, high=1.0, per_layer=True, help="share of a layer's random weights that are kept")
    steps: int = knob(1000, low=0, high=10**7, help="updates of the scores; 0 keeps weights at random")
    lr: float = knob(0.1, low=1e-5, high=10.0, log=True, help="highest learning rate of the scores, by SGD")
    seed: int = knob(0, low=0, high=2**31 - 1, help="random weights, first scores and order of the data")

    paper: ClassVar[str] = "hidden_networks"
    facts: ClassVar[Facts] = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=LABELLED,
        effect="size only",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Linear layers and convolutions, without a head whose weight is also the embedding."""
        found = anatomy(model)
        for name, module in model.named_modules():
            if name and has_hidden_form(module) and not (found.tied and name == found.head):
                yield name

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        names = list(self.targets(model))
        seeds = dict(zip(names, (split_mix(self.seed, len(names)) >> 33).tolist()))  # 31 bits
        for name, settings in layers.items():
            set_module(model, name, hidden_layer(model.get_submodule(name), settings.kept, seeds[name]))
        if len(layers) == len(names):
            forget_norms_(model)
        if self.steps:
            why = "with labels, to learn which weights to keep (or use steps=0)"
            self._learn_(model, need_workload(workload, self.name(), why), layers)
        for name in layers:
            layer = model.get_submodule(name)
            assert isinstance(layer, HiddenLinear | HiddenConv2d)
            layer.settle_()
        return model

    def _learn_(self, model: nn.Module, work: Workload, layers: Mapping[str, Self]) -> None:
        with only(model, layers):
            train(model, batches_of(work), work.loss, steps=self.steps, lr=self.lr, optimizer=sgd, seed=self.seed)


def forget_norms_(model: nn.Module) -> None:
    """Batch norms without scale and shift in the place of all those there are, their statistics begun anew."""
    for name, norm in list(model.named_modules()):
        if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
            config = module_config(norm)
            assert config is not None
            set_module(model, name, build_module(config["type"], config["config"] | {"affine": False}))

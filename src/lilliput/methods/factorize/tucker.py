"""A k x k convolution as 1x1, small k x k and 1x1; a 1x1 convolution as two.

Paper: Kim et al., Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications,
arXiv 1511.06530.
Formula: W[s, c, h, w] = sum over o, i of E[s, o] G[o, i, h, w] F[i, c]; 1x1: W = U V by truncated SVD.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lilliput.edits import set_module
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, Facts, Method, knob
from lilliput.methods.factorize._factors import (
    branches_for,
    compose_layer,
    factor_layer,
    is_plain_conv,
    own_names,
    ranks_for,
)
from lilliput.workload import Workload

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tucker(Method):
    """Replace ungrouped convolutions by Tucker-2 factors that keep `ratio` of their weights.

    `branches` makes the core a grouped convolution (a sum of Tucker blocks): the ranks stay those of `ratio`, the core
    costs `branches` times less, and the error grows. The 1x1 layers around the core mix all branches, so no channel
    shuffle is needed. How much of each kernel was lost is logged at INFO.
    """

    ratio: float = knob(0.5, low=0.02, high=1.0, per_layer=True, help="kept share of the layer's weights")
    branches: int = knob(1, choices=(1, 2, 4, 8), per_layer=True, help="groups of the core; above 1 needs fine-tuning")
    sweeps: int = knob(3, low=0, high=50, help="rounds of orthogonal iteration after the higher-order SVD")
    snap: int = knob(1, choices=(1, 4, 8, 16, 32), help="round ranks to this multiple: the vector width of the device")

    facts: ClassVar[Facts] = Facts(
        stage="factorize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        effect="smaller; faster where channels are many and the picture is small",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        for name in own_names(model):
            if name and is_plain_conv(model.get_submodule(name)):
                yield name

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Tucker]) -> nn.Module:
        for name, settings in layers.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Conv2d)
            factors = settings.factor(layer)
            log.info("%s: %s", name, describe_loss(layer, factors))
            set_module(model, name, factors)
        return model

    def factor(self, layer: nn.Conv2d) -> nn.Sequential:
        """One convolution as factors."""
        branches = branches_for(layer, self.branches)
        ranks = ranks_for(layer, self.ratio, self.snap, branches)
        return factor_layer(layer, ranks, branches, int(self.sweeps))


def describe_loss(layer: nn.Conv2d, factors: nn.Sequential) -> str:
    """The relative error of the kernel, the branches of its core, and whether training is needed."""
    error = (compose_layer(factors).weight - layer.weight).norm() / layer.weight.norm().clamp_min(1e-12)
    core = factors[1]
    branches = core.groups if isinstance(core, nn.Conv2d) else 1
    advice = "; a branched core is an approximation that needs fine-tuning" if branches > 1 else ""
    return f"relative error of the kernel {error:.3f}, {branches} branch(es){advice}"

"""Fine-tuning with differentiable k-means in little memory (eDKM).   w~_i = sum_j softmax_j(-(w_i - c_j)^2 / tau) c_j

Paper: Cho, Alizadeh-Vahid, Fu, Adya, Del Mundo, Rastegari, Naik & Zatloukal, "eDKM: An Efficient and Accurate
Train-time Weight Clustering for Large Language Models", 2023, on DKM (Cho et al., 2022). Weights and centroids are
learnt together; at the end each weight takes its nearest centroid. Weights of equal 16-bit values share a row of the
attention, forward and backward, so that a layer keeps an index of 2 bytes per weight and a small table.
Scales per group, and a temperature in units of the centroids' distances, are ours. What is packed at the end, and how
fast that is, is `quantize.codebook`. A tied head trains with its embedding, on one weight.

Measured: `lilliput reproduce edkm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

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
from lilliput.methods.quantize._dkm import DKMLinear
from lilliput.methods.quantize._kernel_linear import replace_
from lilliput.methods.quantize._packed import quantizable
from lilliput.methods.quantize.codebook import whole_pieces
from lilliput.training import train
from lilliput.workload import Workload, need_workload


@dataclass(frozen=True)
class Dkm(Method):
    """Train weights as soft mixtures of the centroids of their layer, then keep the nearest centroid of each."""

    bits: int = knob(3, choices=(4, 3, 2), per_layer=True, help="bits per weight; a layer has 2**bits centroids")
    group: int = knob(64, choices=(32, 64, 128), per_layer=True, help="weights that share a scale")
    temperature: float = knob(
        0.03, low=1e-3, high=10.0, log=True, help="of the mixtures, in squared distances between centroids"
    )
    rounds: int = knob(3, low=1, high=10, help="k-means rounds of each step")
    steps: int = knob(200, low=1, high=10**6, log=True, help="training steps")
    lr: float = knob(3e-4, low=1e-6, high=1e-1, log=True, help="highest learning rate; it falls as a cosine")
    seed: int = knob(0, low=0, high=2**31 - 1, help="draws the order of the training data")
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=LABELLED,
        effect="faster, smaller",
    )
    paper: ClassVar[str] = "edkm"

    def targets(self, model: nn.Module) -> Iterator[str]:
        yield from quantizable(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        workload = need_workload(workload, self.name(), "to train on")
        clustered_(model, layers)
        train_(model, workload, self.steps, self.lr, self.seed)
        return finalise_(model, layers)


def clustered_(model: nn.Module, layers: Mapping[str, Dkm]) -> nn.Module:
    """Put a `DKMLinear` in the place of each named layer."""

    def make(name: str, linear: nn.Linear, s: Dkm) -> DKMLinear:
        return DKMLinear(linear, s.bits, whole_pieces(s.group, linear.in_features), s.temperature, s.rounds)

    return replace_(model, layers, make)


def train_(model: nn.Module, workload: Workload, steps: int, lr: float, seed: int) -> nn.Module:
    """Fine-tune all float weights on the training data; what the gradients were is forgotten."""
    batches = list(workload.training or ())
    train(model, batches, workload.loss, steps=steps, lr=lr, clip_norm=1.0, seed=seed)
    model.zero_grad(set_to_none=True)
    return model.eval()


def finalise_(model: nn.Module, layers: Mapping[str, Dkm]) -> nn.Module:
    """Put packed layers in the place of the trained ones."""
    return replace_(model, layers, lambda name, layer, settings: layer.finalise())

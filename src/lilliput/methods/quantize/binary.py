"""One bit per weight, real inputs or signs.   W ~ alpha sign(W),  x ~ sum_m g_m sign(r_m),  r_m+1 = r_m - g_m sign(r_m)

Papers: BinaryConnect and Binary-Weight-Networks (real inputs), XNOR-Net (one sign, scaled by alpha or by alpha K),
ReBNet (residual signs). A network must learn its signs: `steps` updates on the workload's labelled data, latent float
weights, gradients straight through; 0 only rounds.

Alone, on a model of your own:

    model = Binary(activations="sign").trainable(model)       # layers that train
    train(model, batches, loss_fn, steps=1000, callbacks=[KeepLatent()])
    model = pack(model)                                       # bits only, the same outputs

Signs lose all of an input that is never negative (what a ReLU gives). XNOR-Net puts a BatchNorm before each binary
layer; here `shift` gives each input channel a learned threshold instead, as later networks do (reconstructed), which
starts at its mean.

Measured, results/binary.csv (one thread, AVX-512 with VPOPCNTDQ, no AMX, activations packed inside the time): with
signs, matrix-vector products beyond the L2 cache take a fourth to a fifth of the time of our int4 kernel, large
products a third of torch's int8; convolutions are 4 to 24 times faster than torch's float32, about as OpenVINO's
BinaryConvolution. Nothing is won on matrices so small that the call takes the time (576 x 576), nor, but for the
bytes, with real inputs: one bit then beats int4 only from memory, and convolutions are slower than float. A machine
with AMX multiplies int8 faster than it counts bits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.edits import set_module
from lilliput.hooks import evaluating, watching
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
from lilliput.methods.quantize._binary import (
    ACTIVATIONS,
    SCALES,
    BinaryConv2d,
    BinaryLinear,
    KeepLatent,
    binary_copy,
    residual_sign,
    sign,
)
from lilliput.methods.quantize._binary_packed import PackedBinaryConv2d, PackedBinaryLinear
from lilliput.methods.quantize._coded import codable
from lilliput.training import train
from lilliput.workload import Batch, Workload, need_workload

__all__ = [
    "Binary",
    "BinaryConv2d",
    "BinaryLinear",
    "KeepLatent",
    "PackedBinaryConv2d",
    "PackedBinaryLinear",
    "calibrate_",
    "pack",
    "residual_sign",
    "sign",
]
LOOKS = 4  # calibration batches from which thresholds and coefficients start


@dataclass(frozen=True)
class Binary(Method):
    """One bit per weight, inputs real or as one to three signs, learned with straight-through gradients."""

    paper: ClassVar = "xnor_net"
    activations: str = knob("sign", choices=ACTIVATIONS, per_layer=True, help="what the inputs of a layer become")
    levels: int = knob(1, choices=(1, 2, 3), per_layer=True, help="signs per input (ReBNet); real inputs have none")
    scale: str = knob("alpha", choices=SCALES, help="factor of outputs: mean |w| of a row, times K, or one per layer")
    shift: bool = knob(True, choices=(True, False), help="a learned threshold for each input channel")
    ends: bool = knob(False, choices=(False, True), help="binary first and last layers, too")
    steps: int = knob(500, low=0, high=10**7, help="updates of the weights; 0 only rounds them")
    lr: float = knob(1e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    seed: int = knob(0, low=0, high=2**31, help="order of the data")
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=LABELLED,
        effect="smaller; faster where activations are signs",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        yield from _targets(model, self.ends)

    def trainable(self, model: nn.Module, workload: Workload | None = None) -> nn.Module:
        """A copy whose layers train as binary ones; a workload gives thresholds and coefficients to start with."""
        return binarize_(copy.deepcopy(model), workload, self.resolve(model))

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        binarize_(model, workload, layers)
        if self.steps:
            work = need_workload(workload, self.name(), "whose labelled data it learns from; steps=0 only rounds")
            _train_(model, work, self)
        return pack_(model)


def _targets(model: nn.Module, ends: bool) -> Iterator[str]:
    """Linear layers and ungrouped convolutions; without `ends` those inside blocks, or all but the first and last."""
    plan = anatomy(model)
    names = [n for n in codable(model) if n != plan.head or not plan.tied]  # an embedding is no product
    if not ends:
        inside = tuple(f"{block.name}." for block in plan.blocks)
        names = [n for n in names if n.startswith(inside)] if inside else names[1:-1]
    yield from (n for n in names if _has_binary_form(model.get_submodule(n)))


def _has_binary_form(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.groups == 1 and not isinstance(layer.padding, str)
    )


def binarize_(model: nn.Module, workload: Workload | None, layers: Mapping[str, Binary]) -> nn.Module:
    """Put training layers in the place of the named float ones."""
    new = {}
    for name, how in layers.items():
        float_layer = model.get_submodule(name)
        assert isinstance(float_layer, nn.Linear | nn.Conv2d)
        levels = how.levels if how.activations == "sign" else 1
        new[name] = binary_copy(
            float_layer, activations=how.activations, levels=levels, scale=how.scale, shift=how.shift
        )
    if workload is not None:
        calibrate_(model, workload, new)
    for name, layer in new.items():
        set_module(model, name, layer)
    return model


@torch.no_grad()
def calibrate_(model: nn.Module, workload: Workload, layers: Mapping[str, BinaryLinear | BinaryConv2d]) -> None:
    """Start thresholds at the mean of each input channel, and the m-th coefficient at the mean of |r_m|.

    That coefficient is the least-squares one of its level. `layers` are not yet in the model, whose own inputs count.
    """
    shifts: dict[str, list[Tensor]] = {name: [] for name in layers}
    sizes: dict[str, list[Tensor]] = {name: [] for name in layers}

    def look(name: str, _: nn.Module, x: Tensor) -> None:
        layer = layers[name]
        inputs = x.movedim(layer.inputs_dim, -1).flatten(0, -2).float()
        shifts[name].append(inputs.mean(0))
        moved = inputs if layer.shift is None else inputs - shifts[name][-1]
        sizes[name].append(_level_sizes(moved, 0 if layer.levels is None else len(layer.levels)))

    with evaluating(model), watching(model, layers, look):
        for batch in workload.calibration[:LOOKS]:
            workload.forward(model, batch)
    for name, layer in layers.items():
        if layer.shift is not None and shifts[name]:
            layer.shift.copy_(torch.stack(shifts[name]).mean(0))
        if layer.levels is not None and not layer.by_mean and sizes[name]:  # K is the size already
            layer.levels.copy_(torch.stack(sizes[name]).mean(0).clamp_min(1e-6))


def _level_sizes(r: Tensor, count: int) -> Tensor:
    found = []
    for _ in range(count):
        found.append(r.abs().mean())
        r = r - found[-1] * torch.where(r >= 0, 1.0, -1.0)
    return torch.stack(found) if found else r.new_zeros(0)


def _train_(model: nn.Module, work: Workload, how: Binary) -> None:
    def loss_fn(trained: nn.Module, batch: Batch) -> Tensor:
        return work.loss(trained, batch)

    batches = work.calibration if work.training is None else work.training
    batches = batches if isinstance(batches, Sequence) else list(batches)
    callbacks = [KeepLatent()]
    train(model, batches, loss_fn, steps=how.steps, lr=how.lr, clip_norm=1.0, callbacks=callbacks, seed=how.seed)
    for parameter in model.parameters():
        parameter.grad = None


def pack(model: nn.Module) -> nn.Module:
    """A copy whose binary layers hold bits only and give the same outputs."""
    return pack_(copy.deepcopy(model))


def pack_(model: nn.Module) -> nn.Module:
    """`pack` in place; a model that is a binary layer itself is returned packed."""
    if isinstance(model, BinaryLinear | BinaryConv2d):
        return _packed(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BinaryLinear | BinaryConv2d):
            set_module(model, name, _packed(layer))
    return model


def _packed(layer: BinaryLinear | BinaryConv2d) -> nn.Module:
    if isinstance(layer, BinaryLinear):
        return PackedBinaryLinear.from_layer(layer)
    return PackedBinaryConv2d.from_layer(layer)

"""Greedy path following: each weight is rounded so that the running error of the layer's output stays small (GPFQ).

Papers: Lybrand & Saab, "A Greedy Algorithm for Quantizing Neural Networks", 2020; Zhang, Zhou & Saab, "Post-training
Quantization for Neural Networks with Provable Guarantees", 2022.
    q_t = Q(<Y_t, u_(t-1) + w_t X_t> / |Y_t|^2),   u_t = u_(t-1) + w_t X_t - q_t Y_t,   u_0 = 0
with X_t the samples of input t in the float model and Y_t those in the model quantised so far. u is never formed here:
all that the rule needs of it follows from the sums Y^T Y and Y^T X, so any number of samples fits in memory.

What can be proved (Y = X, no clipping, step d). Each step obeys |u_t|^2 <= sin^2(a_t) |u_(t-1)|^2 + d^2/4 |X_t|^2 with
a_t the angle between X_t and u_(t-1). For inputs that are m independent Gaussian samples of variance s^2, sin^2 is
1 - 1/m on average, whence E|u_t|^2 <= d^2 m^2 s^2 / 4 for every t, while |Xw|^2 grows as m s^2 |w|^2: the relative
squared error falls as one over the number of inputs. Rounding each weight alone has no such decay.
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
    LAYER_SHAPES,
    OUTPUT_SHAPE,
    PACKED_WEIGHTS,
    UNLABELLED,
    Facts,
    Method,
    knob,
)
from lilliput.methods.quantize._coded import codable, coded
from lilliput.methods.quantize._packed import PackedLinear
from lilliput.methods.quantize._walk import (
    BlockWalk,
    execution_order,
    first_inputs,
    names_in,
    some_batches,
    walkable_blocks,
)
from lilliput.moments import Moments, grouped_weight, layer_rows
from lilliput.workload import Batch, Workload, need_workload

LAZY = 128  # inputs whose effect on the later ones is gathered into one product
Trial = tuple[Tensor, Tensor, Tensor]  # error of each row, codes, step
MULTIPLES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the largest weight, tried when `multiple` is 0


def follow_path(
    w: Tensor, gram: Tensor, cross: Tensor, step: Tensor, levels: int, sparse: str = "none", threshold: float = 0.0
) -> Tensor:
    """Codes in -levels..levels, shape of w, for weights w (G, N, K), gram Y^T Y and cross Y^T X (G, K, K).

    The alphabet is step * {-levels..levels}, with step (G, N). `sparse` first shrinks ("soft") or zeroes ("hard") what
    lies below threshold * step. The hard rule of the paper moves the alphabet out by the threshold; staying on the
    uniform grid, so that codes pack, is ours (reconstructed). Inputs that are always zero are rounded.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)  # (G, K)
    safe = torch.where(diagonal > 0, diagonal, 1.0)
    drift = w @ torch.tril(cross - gram, 0).transpose(1, 2)  # what the changed inputs alone add, (G, N, K)
    pull = drift.permute(2, 0, 1).contiguous()  # <Y_t, u_(t-1) + w_t X_t> - w_t |Y_t|^2, (K, G, N)
    columns = w.permute(2, 0, 1).contiguous()
    q, errors = torch.zeros_like(columns), torch.zeros_like(columns)
    for start in range(0, len(columns), LAZY):
        end = min(start + LAZY, len(columns))
        for t in range(start, end):
            z = columns[t] + torch.where(diagonal[:, t] > 0, 1 / safe[:, t], 0.0).unsqueeze(1) * pull[t]
            q[t] = _to_alphabet(z / step, levels, sparse, threshold)
            errors[t] = columns[t] - q[t] * step
            pull[t + 1 : end] += gram[:, t, t + 1 : end].T.unsqueeze(2) * errors[t]
        later = gram[:, start:end, end:].transpose(1, 2) @ errors[start:end].permute(1, 0, 2)  # (G, rest, N)
        pull[end:] += later.transpose(0, 1)
    return q.permute(1, 2, 0).to(torch.int8)


def _to_alphabet(z: Tensor, levels: int, sparse: str, threshold: float) -> Tensor:
    """The nearest letter of {-levels..levels}, after the sparsifying rule; z is in steps."""
    if sparse == "soft":
        z = z.sign() * (z.abs() - threshold).clamp_min(0)
    elif sparse == "hard":
        z = torch.where(z.abs() > threshold, z, 0.0)
    return z.round().clamp(-levels, levels)


def path_error(w: Tensor, q: Tensor, moments: Moments | Mapping[str, Tensor]) -> Tensor:
    """mean |w X - q Y|^2 per row up to a constant of w, (G, N): q^T gram q - 2 q^T cross w."""
    gram, cross = (moments[k] if isinstance(moments, Mapping) else moments.get(k) for k in ("gram", "cross"))
    return ((q @ gram - 2 * (w @ cross.transpose(1, 2))) * q).sum(-1)


def alphabet_step(w: Tensor, levels: int, radius: str, multiple: float, per_neuron: bool) -> Tensor:
    """Step (G, N) so that the largest letter is `multiple` times the median or the largest |w|; bfloat16 values.

    For a whole layer "max" is the mean over neurons of each one's largest |w|, as in Zhang et al.; "median" is that of
    Lybrand & Saab.
    """
    size = w.abs()
    if radius == "median":
        bound = size.median(-1).values if per_neuron else size.median().expand(w.shape[:2])
    else:
        bound = size.amax(-1) if per_neuron else size.amax(-1).mean().expand(w.shape[:2])
    return (bound * multiple / levels).clamp_min(1e-9).bfloat16().float()


@dataclass(frozen=True)
class Gpfq(Method):
    """GPFQ on linear and convolution layers, in the order of the data; `multiple` 0 tries several alphabets per row."""

    paper: ClassVar = "gpfq"
    bits: int = knob(4, choices=(8, 6, 5, 4, 3, 2), per_layer=True, help="bits per weight: 2**bits - 1 letters")
    radius: str = knob("max", choices=("max", "median"), help="what the largest letter is a multiple of")
    multiple: float = knob(0.0, low=0.0, high=16.0, per_layer=True, help="largest letter / radius; 0 tries several")
    per_neuron: bool = knob(True, choices=(True, False), help="an alphabet for each output, else one for the layer")
    sparse: str = knob("none", choices=("none", "soft", "hard"), help="how small weights become zero")
    threshold: float = knob(0.5, low=0.0, high=8.0, per_layer=True, help="what `sparse` calls small, in steps")
    correct_bias: bool = knob(False, choices=(False, True), help="take the mean of the error out of the bias")
    samples: int = knob(1024, low=1, high=10**7, log=True, help="calibration tokens (text) or inputs to look at")
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=UNLABELLED,
        effect="size only",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        plan = anatomy(model)
        left = {plan.head} if plan.tied else set()  # an embedding is no product
        routed = tuple(f"{b.mixture.experts}." for b in plan.blocks if b.mixture)  # other tokens in each model
        yield from (n for n in codable(model) if n not in left and not n.startswith(routed))

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        workload = need_workload(workload, self.name(), "to follow the inputs of every layer")
        batches, original = some_batches(workload, self.samples), copy.deepcopy(model)
        with evaluating(model), evaluating(original):
            rest = _quantize_blocks_(model, original, workload, batches, layers)
            for name in execution_order(original, workload, rest):
                _replace_(model, name, layers[name], paired_moments(model, original, workload, batches, name))
        return model


def _quantize_blocks_(
    model: nn.Module, original: nn.Module, workload: Workload, batches: Sequence[Batch], layers: Mapping[str, Gpfq]
) -> list[str]:
    """Layers inside transformer blocks, block by block; returns the names that are left."""
    blocks = walkable_blocks(original, workload)
    ours, theirs = (BlockWalk(m, workload, batches, blocks) for m in (model, original))
    left = list(layers)
    for index, block in enumerate(blocks):
        names = names_in(block, left)
        moments = {name: Moments(name) for name in names}
        for batch in ours.batches if names else ():
            ys, xs = _inputs(ours, index, batch, names), _inputs(theirs, index, batch, names)
            for name in names:
                layer = original.get_submodule(name)
                moments[name].add(layer_rows(layer, ys[name]), layer_rows(layer, xs[name]))
        for name in names:
            _replace_(model, name, layers[name], moments[name])
        left = [name for name in left if name not in names]
        if not left:
            break
        ours.advance_(index)
        theirs.advance_(index)
    return left


def _inputs(walk: BlockWalk, index: int, batch: int, names: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with watching(walk.model, names, lambda name, layer, x: found.__setitem__(name, x)):
        walk.run(index, batch)
    return found


def paired_moments(
    model: nn.Module, original: nn.Module, workload: Workload, batches: Sequence[Batch], name: str
) -> Moments:
    """Moments of one layer's inputs in the changed model, paired with those in the original."""
    moments, layer = Moments(name), original.get_submodule(name)
    for batch in batches:
        pairs = zip(first_inputs(model, workload, batch, name), first_inputs(original, workload, batch, name))
        for ours, theirs in pairs:
            moments.add(layer_rows(layer, ours), layer_rows(layer, theirs))
    return moments


def quantize_layer(layer: nn.Module, settings: Gpfq, moments: Moments) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (G, N, K), step (G, N) and bias of one layer."""
    w, levels = grouped_weight(layer), 2 ** (settings.bits - 1) - 1
    gram, cross = moments.get("gram"), moments.get("cross")
    best: Trial | None = None
    for multiple in MULTIPLES if settings.multiple == 0 else (settings.multiple,):
        radius = "max" if settings.multiple == 0 else settings.radius
        step = alphabet_step(w, levels, radius, multiple, settings.per_neuron)
        codes = follow_path(w, gram, cross, step, levels, settings.sparse, settings.threshold)
        error = path_error(w, codes * step.unsqueeze(-1), moments)
        best = _better(best, (error, codes, step), settings.per_neuron)
    assert best is not None
    _, codes, step = best
    bias = getattr(layer, "bias", None)
    if settings.correct_bias:
        bias = _corrected(bias, w, codes * step.unsqueeze(-1), moments)
    return codes, step, bias


def _better(best: Trial | None, new: Trial, per_neuron: bool) -> Trial:
    """The smaller error of each neuron, or of the layer."""
    if best is None:
        return new
    if not per_neuron:
        return new if new[0].sum() < best[0].sum() else best
    error, codes, step = best
    lower = new[0] < error
    pick = lower.unsqueeze(-1)
    return torch.minimum(error, new[0]), torch.where(pick, new[1], codes), torch.where(lower, new[2], step)


def _corrected(bias: Tensor | None, w: Tensor, q: Tensor, moments: Moments) -> Tensor:
    """Bias plus the mean output the rounding took away."""
    means = moments.get("other_mean"), moments.get("mean")
    lost = (w @ means[0].unsqueeze(-1) - q @ means[1].unsqueeze(-1)).flatten()
    return lost if bias is None else bias.detach() + lost


def _replace_(model: nn.Module, name: str, settings: Gpfq, moments: Moments) -> None:
    layer = model.get_submodule(name)
    codes, step, bias = quantize_layer(layer, settings, moments)
    if isinstance(layer, nn.Linear) and settings.bits in (8, 4, 3, 2):
        q = codes[0].int() + 2 ** (settings.bits - 1)
        zero = None if settings.bits == 8 else torch.zeros(len(q), 1)
        new: nn.Module = PackedLinear.from_codes(q, step.T, zero, settings.bits, layer.in_features, bias)
    else:
        new = coded(layer, codes, step.flatten(), bias, settings.bits)
    set_module(model, name, new)

"""Layer-wise compression of a convolutional network with no data: inputs are sampled from what its BatchNorms know.

Paper: Horton, Jin, Farhadi & Rastegari, "Layer-Wise Data-Free CNN Compression", 2020.
    min over W_c of  E |W x - W_c x|^2,   x ~ activation(N(beta, gamma^2))   layer by layer
Before: BatchNorms are folded, neighbouring layers equalised, large biases absorbed. Ranges minimise the weights'
squared error, codes are fitted by Adam with a straight-through gradient, and the mean error leaves by the bias. The
expectation needs only second moments of x, so a fitting step costs one small product. How odd cases of the graph are
sampled, the joint treatment of the bias (the fit sees centred moments) and exact caps in place of ReLU6 are ours
(reconstructed). sampler="independent" is the paper's x. Its centred moments are almost diagonal, which leaves a fit
little to do; the default "propagated" keeps the correlations that the weights cause and is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.method import (
    BLOCK_COUNT,
    FLOAT_WEIGHTS,
    LAYER_SHAPES,
    NONE,
    OUTPUT_SHAPE,
    PACKED_WEIGHTS,
    Facts,
    Method,
    knob,
)
from lilliput.methods.quantize._coded import codable, coded
from lilliput.methods.quantize._equalize import absorb_bias_, equalize_
from lilliput.methods.quantize._qdq import activation_grid, int8_layer
from lilliput.methods.quantize._statistics import (
    NORMS,
    SAMPLERS,
    Stats,
    called_once,
    fold_batchnorm_,
    input_ranges,
    sampled_moments,
    trace,
)
from lilliput.moments import Moments, grouped_weight
from lilliput.workload import Workload

FLOAT = 32  # the value of `bits` that leaves weights float


def best_step(w: Tensor, levels: int, per_channel: bool, search: int) -> Tensor:
    """Step (G, N, 1) of the symmetric grid step * {-levels..levels}; the range with the least squared error of w.

    One step for each row, or one for the layer. `search` ranges down to a fifth of the largest weight are tried; with 0
    the range is the largest weight's.
    """
    top = w.abs().amax(-1, keepdim=True)
    full = (top if per_channel else top.amax().expand_as(top)).clamp_min(1e-12) / levels
    best, best_error = full, _rounding_error(w, full, levels, per_channel)
    for share in torch.linspace(1.0, 0.2, search + 1)[1:].tolist():
        error = _rounding_error(w, full * share, levels, per_channel)
        best = torch.where(error < best_error, full * share, best)
        best_error = torch.minimum(error, best_error)
    return best


def _rounding_error(w: Tensor, step: Tensor, levels: int, per_channel: bool) -> Tensor:
    error = ((w / step).round().clamp(-levels, levels) * step - w).square().sum(-1, keepdim=True)
    return error if per_channel else error.sum().expand_as(error)


def fit_codes(w: Tensor, moments: Tensor, step: Tensor, levels: int, steps: int, lr: float = 0.03) -> Tensor:
    """Codes (G, N, K) in -levels..levels that lower trace(D M D^T), D = codes * step - w: Adam, straight-through.

    `moments` M is (G, K, K). Starts from rounding and keeps the best codes of each row, so it is never worse than that;
    a weight that is zero stays zero.
    """
    latent = torch.nn.Parameter(w / step)
    optimizer = torch.optim.Adam([latent], lr=lr)
    zero = w == 0
    best, best_error = torch.zeros_like(w), torch.full(w.shape[:2], float("inf"))
    for i in range(steps + 1):
        codes = latent.detach().round().clamp(-levels, levels).masked_fill_(zero, 0)
        difference = codes * step - w
        gradient = difference @ moments
        error = (gradient * difference).sum(-1)
        lower = error < best_error
        best = torch.where(lower.unsqueeze(-1), codes, best)
        best_error = torch.minimum(error, best_error)
        latent.grad = (gradient * step).masked_fill_(zero, 0)
        optimizer.param_groups[0]["lr"] = lr * (1 - i / (steps + 1))
        optimizer.step()
    return best


def refit(w: Tensor, keep: Tensor, moments: Tensor) -> Tensor:
    """Least squares for the weights that `keep` (bool) leaves: min over v of (v - w) M (v - w)^T, (G, N, K)."""
    size = moments.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)
    damped = moments + 1e-4 * size.view(-1, 1, 1) * torch.eye(w.shape[-1])
    target = w @ damped
    fitted = torch.zeros_like(w)
    rows = max(1, 2**24 // w.shape[-1] ** 2)  # rows solved at once: bounds the memory
    for g in range(len(w)):
        for start in range(0, w.shape[1], rows):
            part = keep[g, start : start + rows].float()
            system = damped[g] * part.unsqueeze(1) * part.unsqueeze(2) + torch.diag_embed(1 - part)
            fitted[g, start : start + rows] = torch.linalg.solve(system, target[g, start : start + rows] * part)
    return fitted * keep


@dataclass(frozen=True)
class DataFree(Method):
    """Quantize and prune a convolutional network with BatchNorm without looking at any data."""

    paper: ClassVar = "data_free_layerwise"
    bits: int = knob(8, choices=(8, 7, 6, 5, 4, 3, FLOAT), per_layer=True, help="bits per weight; 32 leaves them float")
    sparsity: float = knob(
        0.0, low=0.0, high=0.95, per_layer=True, help="share of the smallest weights made zero, refitted"
    )
    per_channel: bool = knob(True, choices=(True, False), help="a scale for each output channel, else one per layer")
    activation_bits: int = knob(
        0, choices=(0, 8, 7, 6, 5, 4), per_layer=True, help="bits of the layer's input; 0 is float"
    )
    equalize: bool = knob(True, choices=(True, False), help="equalise neighbouring layers and absorb biases first")
    search: int = knob(40, low=0, high=200, help="weight ranges tried; 0 keeps the largest weight's")
    steps: int = knob(200, low=0, high=5000, help="Adam steps of the fit; 0 rounds")
    correct_bias: bool = knob(True, choices=(True, False), help="take the mean error out of the bias")
    sampler: str = knob("propagated", choices=SAMPLERS, help="how inputs are sampled from the BatchNorms")
    samples: int = knob(256, low=1, high=10**5, log=True, help="sampled pictures")
    size: int = knob(32, low=1, high=1024, help="height and width of a sampled picture, in pixels")
    seed: int = knob(0, low=0, high=2**31, help="of the samples")
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=NONE,
        effect="size only; with activation_bits 8 also faster in an int8 runtime",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        if any(isinstance(module, NORMS) for module in model.modules()):
            yield from codable(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        stats = prepare_(model, self.equalize)
        names = [name for name in layers if name in called_once(trace(model))]
        if len(names) < len(layers):
            shared = sorted(set(layers) - set(names))
            raise UserError(f"{shared[0]!r} runs more than once or never in the graph; leave it out of the plan")
        moments = sampled_moments(model, stats, names, self.sampler, self.samples, self.size, self.seed)
        return compress_layers_(model, stats, {name: layers[name] for name in names}, moments)


def prepare_(model: nn.Module, equalize: bool = True) -> Stats:
    """Fold BatchNorms and, if wanted, equalise layers and absorb biases; returns the moments of the layers' outputs."""
    stats = fold_batchnorm_(model)
    if equalize:
        absorb_bias_(model, equalize_(model, stats), stats)
    return stats


def compress_layers_(
    model: nn.Module, stats: Stats, layers: Mapping[str, DataFree], moments: Mapping[str, Moments]
) -> nn.Module:
    """Compress each layer for the given moments of its inputs, whatever they were made from."""
    size = next(iter(layers.values())).size
    wants_range = any(s.activation_bits for s in layers.values())
    ranges = input_ranges(model, stats, list(layers), size) if wants_range else {}
    for name, settings in layers.items():
        layer = model.get_submodule(name)
        if settings.bits == FLOAT:
            _prune_(layer, settings, moments[name])
            continue
        codes, step, bias = quantize_layer(layer, settings, moments[name])
        if settings.activation_bits:
            new = _int8(layer, codes, step, bias, ranges[name])
        else:
            new = coded(layer, codes, step.flatten(), bias, settings.bits)
        set_module(model, name, new)
    return model


def _int8(layer: nn.Module, codes: Tensor, step: Tensor, bias: Tensor | None, limits: Tensor) -> nn.Module:
    """The layer that an int8 runtime executes, with these codes and input limits."""
    new = int8_layer(layer, activation_grid(*limits.tolist()), bias=bias is not None)
    new.weight_codes = codes.view(new.weight_codes.shape).to(torch.int8)  # type: ignore[union-attr, operator]
    new.weight_scale = step.flatten().expand(len(codes.flatten(0, 1))).clone()
    if bias is not None:
        new.bias = bias.detach().clone()
    return new


def quantize_layer(layer: nn.Module, settings: DataFree, moments: Moments) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (G, N, K), step (G, N, 1) and bias of one layer."""
    original, centred = grouped_weight(layer), centred_moments(moments, settings.correct_bias)
    w, levels = _pruned(original, settings.sparsity, centred), 2 ** (settings.bits - 1) - 1
    step = best_step(w, levels, settings.per_channel, settings.search)
    codes = fit_codes(w, centred, step, levels, settings.steps)
    return codes, step, _bias(layer, original, codes * step, settings, moments)


def centred_moments(moments: Moments, centred: bool) -> Tensor:
    """E[x x^T], less mean mean^T when the bias will take the mean error, (G, K, K)."""
    mean = moments.mean
    return moments.gram - mean.unsqueeze(2) * mean.unsqueeze(1) if centred else moments.gram


def _pruned(w: Tensor, sparsity: float, moments: Tensor) -> Tensor:
    if sparsity == 0:
        return w
    drop = round(sparsity * w.numel())
    keep = torch.ones(w.numel(), dtype=torch.bool)
    keep[w.abs().flatten().argsort()[:drop]] = False
    return refit(w, keep.view(w.shape), moments)


def _bias(layer: nn.Module, w: Tensor, q: Tensor, settings: DataFree, moments: Moments) -> Tensor | None:
    bias = None if layer.bias is None else layer.bias.detach()  # type: ignore[union-attr]
    if not settings.correct_bias:
        return bias
    lost = ((w - q) @ moments.mean.unsqueeze(-1)).flatten()
    return lost if bias is None else bias + lost


@torch.no_grad()
def _prune_(layer: nn.Module, settings: DataFree, moments: Moments) -> None:
    """Sparsity without quantization: float weights with real zeros."""
    w = grouped_weight(layer)
    pruned = _pruned(w, settings.sparsity, centred_moments(moments, settings.correct_bias))
    bias = _bias(layer, w, pruned, settings, moments)
    layer.weight.copy_(pruned.view(layer.weight.shape))  # type: ignore[union-attr, operator, arg-type]
    layer.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]

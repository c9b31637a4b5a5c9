"""Layers as factors: build them, recognise them in a model, and put them together again.

A factored layer is an `nn.Sequential` of plain layers with nothing between, of which only the last has a bias, so that
everything downstream (quantization, export, saving) finds ordinary layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.factorize._decompose import block_term, compose_kernel, truncate
from lilliput.methods.factorize._ranks import snap_to_multiple, svd_rank, tucker_ranks

Layer = nn.Linear | nn.Conv2d


def is_plain_linear(module: nn.Module) -> bool:
    """A Linear itself (subclasses may be read by name elsewhere), with two dimensions to reduce."""
    return type(module) is nn.Linear and min(module.weight.shape) > 1 and module.weight.is_floating_point()


def is_plain_conv(module: nn.Module) -> bool:
    """An ungrouped, zero-padded Conv2d with two or more input and output channels."""
    if type(module) is not nn.Conv2d or module.groups != 1 or module.padding_mode != "zeros":
        return False
    return min(module.weight.shape[:2]) > 1 and module.weight.is_floating_point()


def is_pointwise(module: nn.Module) -> bool:
    """A 1x1 convolution."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def own_names(model: nn.Module) -> list[str]:
    """Names of modules whose weight no other module shares and that are not a factor of a factored layer already."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    taken = {f"{name}.{i}" for name, seq in factored_layers(model).items() for i in range(len(seq))}
    named = model.named_modules()
    return [n for n, m in named if n not in taken and all(owners[id(p)] == 1 for p in m.parameters(recurse=False))]


def linear_factors(layer: nn.Linear, u: Tensor, v: Tensor) -> nn.Sequential:
    """y = u (v x) + bias with u (N, r), v (r, K) -> Sequential(Linear(K, r), Linear(r, N))."""
    first = nn.Linear(v.shape[1], v.shape[0], bias=False)
    last = nn.Linear(u.shape[1], u.shape[0], bias=layer.bias is not None)
    return _filled(layer, [(first, v), (last, u)])


def pointwise_factors(layer: nn.Conv2d, u: Tensor, v: Tensor) -> nn.Sequential:
    """A 1x1 convolution as two; stride and padding go to the first, which is exact and cheaper."""
    options = {"stride": layer.stride, "padding": layer.padding}
    first = nn.Conv2d(v.shape[1], v.shape[0], 1, bias=False, **options)
    last = nn.Conv2d(u.shape[1], u.shape[0], 1, bias=layer.bias is not None)
    return _filled(layer, [(first, v[:, :, None, None]), (last, u[:, :, None, None])])


def tucker_factors(layer: nn.Conv2d, first: Tensor, core: Tensor, last: Tensor) -> nn.Sequential:
    """1x1, core, 1x1; stride, padding and dilation belong to the core, whose groups are the branches."""
    blocks = first.shape[0] // core.shape[1]
    options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": blocks}
    shrink = nn.Conv2d(first.shape[1], first.shape[0], 1, bias=False)
    middle = nn.Conv2d(first.shape[0], core.shape[0], layer.kernel_size, bias=False, **options)
    grow = nn.Conv2d(last.shape[1], last.shape[0], 1, bias=layer.bias is not None)
    return _filled(layer, [(shrink, first[:, :, None, None]), (middle, core), (grow, last[:, :, None, None])])


def _filled(layer: Layer, factors: list[tuple[Layer, Tensor]]) -> nn.Sequential:
    with torch.no_grad():
        for factor, weight in factors:
            factor.to(layer.weight.dtype).weight.copy_(weight)
        if layer.bias is not None and factors[-1][0].bias is not None:
            factors[-1][0].bias.copy_(layer.bias)
    return nn.Sequential(*(factor for factor, _ in factors)).train(layer.training)


def shape_like(layer: Layer, ranks: tuple[int, ...], branches: int = 1) -> nn.Sequential:
    """Factors of the right shapes filled with noise: enough to time, without any decomposition."""
    if isinstance(layer, nn.Linear):
        return linear_factors(
            layer, torch.randn(layer.out_features, ranks[0]), torch.randn(ranks[0], layer.in_features)
        )
    if is_pointwise(layer):
        out, inp = layer.weight.shape[:2]
        return pointwise_factors(layer, torch.randn(out, ranks[0]), torch.randn(ranks[0], inp))
    rank_out, rank_in = ranks
    core = torch.randn(rank_out, rank_in // branches, *layer.kernel_size)
    first, last = torch.randn(rank_in, layer.in_channels), torch.randn(layer.out_channels, rank_out)
    return tucker_factors(layer, first, core, last)


def ranks_for(layer: Layer, ratio: float, multiple: int = 1, branches: int = 1) -> tuple[int, ...]:
    """The rank (r,) of a matrix, or (rank_out, rank_in) of a kernel, that keeps `ratio` of the weights."""
    out, inp = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear) or is_pointwise(layer):
        return (snap_to_multiple(svd_rank(out, inp, ratio), multiple, min(out, inp)),)
    pair = tucker_ranks(out, inp, layer.weight[0, 0].numel(), ratio)
    snapped = [snap_to_multiple(r, multiple, full) for r, full in zip(pair, (out, inp))]
    return tuple(min(max(r // branches, 1), full // branches) * branches for r, full in zip(snapped, (out, inp)))


def branches_for(layer: Layer, branches: int) -> int:
    """As many branches as a layer can have, at most `branches`: one for matrices and 1x1."""
    if isinstance(layer, nn.Linear) or is_pointwise(layer):
        return 1
    return min(branches, *layer.weight.shape[:2])


def factor_layer(layer: Layer, ranks: tuple[int, ...], branches: int = 1, sweeps: int = 3) -> nn.Sequential:
    """The layer decomposed at these ranks: SVD for matrices and 1x1, Tucker-2 (or block-term) for larger windows."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return linear_factors(layer, *truncate(weight, ranks[0]))
    if is_pointwise(layer):
        return pointwise_factors(layer, *truncate(weight[:, :, 0, 0], ranks[0]))
    rank_out, rank_in = ranks
    return tucker_factors(layer, *block_term(weight, rank_out, rank_in, branches, sweeps))


def is_factored(module: nn.Module) -> bool:
    """Whether a module is a chain of linear layers that only `factor_layer` or an equal makes."""
    if type(module) is not nn.Sequential or len(module) not in (2, 3):
        return False
    kinds = {type(child) for child in module}
    plain = (kinds == {nn.Linear} and len(module) == 2) or kinds == {nn.Conv2d}
    if not plain or any(child.bias is not None for child in list(module)[:-1]):
        return False
    if kinds == {nn.Linear}:
        return True
    return is_pointwise(module[0]) and is_pointwise(module[-1])


def factored_layers(model: nn.Module) -> dict[str, nn.Sequential]:
    """Name -> every factored layer of a model, in its order."""
    return {name: module for name, module in model.named_modules() if is_factored(module)}  # type: ignore[misc]


def compose_layer(factors: nn.Sequential) -> Layer:
    """The one plain layer that computes what the factors compute."""
    first, last = factors[0], factors[-1]
    if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
        linear = nn.Linear(first.in_features, last.out_features, last.bias is not None)
        _filled(last, [(linear, (last.weight @ first.weight).detach())])
        return linear
    core = factors[len(factors) - 2]
    if not (isinstance(first, nn.Conv2d) and isinstance(core, nn.Conv2d) and isinstance(last, nn.Conv2d)):
        raise UserError(f"{type(last).__name__} is not the end of a factored layer; pass a result of factor_layer")
    conv = nn.Conv2d(
        first.in_channels,
        last.out_channels,
        core.kernel_size,  # type: ignore[arg-type]
        core.stride,  # type: ignore[arg-type]
        core.padding,  # type: ignore[arg-type]
        core.dilation,  # type: ignore[arg-type]
        bias=last.bias is not None,
    )
    outer = first.weight[:, :, 0, 0], last.weight[:, :, 0, 0]
    weight = (
        compose_kernel(outer[0], core.weight, outer[1])
        if len(factors) == 3
        else (outer[1] @ outer[0])[:, :, None, None]
    )
    _filled(last, [(conv, weight.detach())])
    return conv

"""From a fitted chain of layers to integers: what lies between two products is folded into steps.

For each channel and each step the smallest sum that reaches it is found by bisection over the integers, with PyTorch's
own modules in float64 as the judge: no formula of a BatchNorm or an activation is repeated here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.circuits._layers import MULTIPLIES, WAYS, Coder, Layer, read_layer
from lilliput.methods.circuits._net import Encode, Grid, IntegerNet, Pool, Product, Scale, Scores, Shape, Stage, Steps
from lilliput.methods.quantize.binary import pack

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
RISING = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Tanh)
NOTHING = (nn.Identity, nn.Dropout, nn.Flatten)  # what changes no value; of a map and its flat form the order is one
BETWEEN = (*NORMS, *RISING, *NOTHING, nn.MaxPool2d)
MOST_STEPS = 15  # of a code by comparisons; more are evenly spaced and computed
FRACTION_BITS = 15  # of a multiplier


@dataclass
class Part:
    """A product, what follows it, and the shape it takes."""

    layer: Layer
    shape: Shape
    after: list[nn.Module] = field(default_factory=list)


def compile_net(model: nn.Module, shape: Sequence[int], low: float, high: float, bits: int = 8) -> IntegerNet:
    """The integer network of a chain of layers for inputs of `shape` (C, H, W) or (K,) within low..high.

    Raises UserError, naming the layer, for what has no circuit.
    """
    if not high > low:
        raise UserError(f"the inputs lie between {low} and {high}; give calibration data that varies")
    first: Shape = tuple(shape) if len(shape) == 3 else (int(torch.tensor(shape).prod()), 1, 1)  # type: ignore[assignment]
    before, parts = _parts(pack(model).eval(), first, bits)
    grid = Grid((high - low) / 255, low)
    stages: list[Stage] = []
    if parts[0].layer.coder is not None:
        steps = _input_steps(before, grid, parts[0].layer)
        if not _plain(steps):
            stages.append(Encode(first, steps))
    elif any(not isinstance(m, NOTHING) for m in before):
        raise UserError(f"{type(before[0]).__name__} stands before a first layer that takes real inputs; leave it out")
    scores = None
    for i, part in enumerate(parts):
        following = parts[i + 1].layer if i + 1 < len(parts) else None
        product, tail = _product(part, grid)
        if following is None:
            scores = _scores(part, tail, product.bound)
            stages.append(product)
            continue
        stages += _encoded(part, product, tail, following)
    assert scores is not None
    return IntegerNet(first, grid, tuple(stages), scores)


# --- reading the chain -----------------------------------------------------------------------------------------


def _chain(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, nn.Sequential):
        for key, child in model.named_children():
            yield from _chain(child, f"{name}.{key}" if name else key)
    else:
        yield name, model


def _parts(model: nn.Module, shape: Shape, bits: int) -> tuple[list[nn.Module], list[Part]]:
    """What precedes the first product, and the products with what follows each."""
    before: list[nn.Module] = []
    parts: list[Part] = []
    flat = False
    for name, module in _chain(model):
        _check(name, module, shape)
        if isinstance(module, MULTIPLIES):
            layer = read_layer(name, module, bits)
            parts.append(Part(_fitting(layer, shape, flat), shape))
            shape = _shape_after(parts[-1])
        else:
            (parts[-1].after if parts else before).append(module)
            if isinstance(module, nn.MaxPool2d):
                shape = shape[0], shape[1] // int(module.kernel_size), shape[2] // int(module.kernel_size)
            flat = flat or isinstance(module, nn.Flatten)
    if not parts:
        raise UserError(f"{type(model).__name__} holds no layer that circuits have; make some with {WAYS}")
    return before, parts


def _check(name: str, module: nn.Module, shape: Shape) -> None:
    """Raise UserError for a module that no circuit has."""
    kind, place = type(module).__name__, repr(name) if name else "the model"
    if isinstance(module, nn.Linear | nn.Conv2d):
        raise UserError(f"{place} is a float {kind}; circuits have binary layers and tables: fit it with {WAYS} first")
    if not isinstance(module, (*MULTIPLIES, *BETWEEN)):
        names = ", ".join(cls.__name__ for cls in (*MULTIPLIES, *BETWEEN))
        raise UserError(f"{place} is a {kind}, which no circuit has; it takes nn.Sequential of: {names}")
    if isinstance(module, NORMS) and (module.running_mean is None or module.num_features != shape[0]):
        raise UserError(f"{place} is a {kind} over {module.num_features} values without a mean for each channel")
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise UserError(f"{place} flattens dimensions {module.start_dim} to {module.end_dim}; circuits flatten all")
    if isinstance(module, nn.MaxPool2d):
        size = module.kernel_size
        plain = module.stride == size and module.padding == 0 and module.dilation == 1 and not module.ceil_mode
        if not (isinstance(size, int) and plain):
            raise UserError(f"{place} is {module}; circuits pool squares that neither overlap nor are padded")


def _fitting(layer: Layer, shape: Shape, flat: bool) -> Layer:
    """The layer with weights (N, C, height, width): a linear one has the whole input as its window."""
    weights, (c, h, w) = layer.weights, shape
    if weights.ndim == 2:
        if weights.shape[1] != c * h * w or (h * w > 1 and not flat):
            raise UserError(f"{layer.name!r} takes {weights.shape[1]} inputs; {shape} reach it: put Flatten before it")
        weights = weights.view(-1, c, h, w)
    elif flat or weights.shape[1] != c or min(s + 2 * layer.padding - k for s, k in zip((h, w), weights.shape[2:])) < 0:
        raise UserError(f"{layer.name!r} has filters {tuple(weights.shape[1:])}, which do not fit an input {shape}")
    return dataclasses.replace(layer, weights=weights)


def _shape_after(part: Part) -> Shape:
    return Product(
        part.shape, part.layer.weights, torch.zeros(1).long(), (), part.layer.stride, part.layer.padding, None
    ).out


# --- what lies between -----------------------------------------------------------------------------------------


@dataclass
class Tail:
    """Sums of a product (J, N) -> the real inputs of what follows, channel by channel, float64."""

    slope: Tensor  # (N,)
    constant: Tensor  # (N,)
    modules: Sequence[nn.Module]

    @torch.no_grad()
    def __call__(self, sums: Tensor) -> Tensor:
        y = sums.double() * self.slope + self.constant
        for module in self.modules:
            if isinstance(module, nn.BatchNorm2d):
                y = module(y[:, :, None, None])[:, :, 0, 0]
            elif isinstance(module, (*NORMS, *RISING)):
                y = module(y)
        return y


def _judges(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [copy.deepcopy(m).double().eval() for m in modules if isinstance(m, (*NORMS, *RISING))]


def _product(part: Part, grid: Grid) -> tuple[Product, Tail]:
    """The stage without its steps, and what its sums stand for."""
    layer, coder = part.layer, part.layer.coder
    constant, planes = layer.bias, ()
    if coder is None:
        zero = round(-grid.offset / grid.step) if layer.padding else 0  # padding must be an input of 0
        values, unit = torch.arange(256) - zero, grid.step
        constant = constant + layer.unit * (grid.offset + grid.step * zero) * layer.weights.flatten(1).sum(1)
    else:
        values, unit, planes = coder.values, coder.unit, coder.planes
    product = Product(part.shape, layer.weights, values, planes, layer.stride, layer.padding, None)
    return product, Tail(layer.unit * unit, constant, _judges(part.after))


def _encoded(part: Part, product: Product, tail: Tail, following: Layer) -> list[Stage]:
    """The product with the codes that the following layer reads, and the pooling between them."""
    coder = following.coder
    if coder is None:
        raise UserError(f"{following.name!r} takes real inputs, which only the first layer of a circuit does")
    if len(coder.breaks) <= MOST_STEPS:
        encoder: Steps | Scale = _steps(tail, coder, product.bound, product.out[0], following.name)
    else:
        encoder = _scale(part, tail, coder, product.bound, following.name)
    whole = dataclasses.replace(product, encoder=encoder)
    pools = [m for m in part.after if isinstance(m, nn.MaxPool2d)]
    if not pools:
        return [whole]
    if len(pools) > 1:
        raise UserError(f"two poolings follow {part.layer.name!r}; circuits have one after a product")
    _check_pooling(part, encoder)
    return [whole, Pool(whole.out, int(pools[0].kernel_size), encoder.bits)]


def _check_pooling(part: Part, encoder: Steps | Scale) -> None:
    """The largest code must be that of the largest value."""
    after = part.after[[isinstance(m, nn.MaxPool2d) for m in part.after].index(True) :]
    if any(isinstance(m, NORMS) and m.weight is not None and bool((m.weight < 0).any()) for m in after):
        raise UserError(f"a BatchNorm with a negative weight follows the pooling after {part.layer.name!r}; pool after")
    if isinstance(encoder, Steps) and bool((encoder.codes.diff() < 0).any()):
        raise UserError(f"the levels of the signs behind {part.layer.name!r} do not fall; codes cannot be pooled")


def _steps(tail: Tail, coder: Coder, bound: int, channels: int, name: str) -> Steps:
    """For each channel the smallest sums that reach the coder's breaks."""
    shift = torch.zeros(1) if coder.shift is None else coder.shift
    if len(shift) != channels and len(shift.unique()) > 1:
        raise UserError(f"{name!r} has a threshold for each place of a map; fit it with shift=False")
    edges = coder.breaks.unsqueeze(1) + (shift if len(shift) == channels else shift[:1]).expand(channels)  # (J, N)
    least, most = (torch.full((1, channels), s * bound) for s in (-1, 1))
    falling = (tail(most) < tail(least)).squeeze(0)
    low, high = torch.full_like(edges, -bound, dtype=torch.int64), torch.full_like(edges, bound + 1, dtype=torch.int64)
    while bool((low < high).any()):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        y = tail(middle)
        reached = ((y > edges) if coder.strict else (y >= edges)) ^ falling
        low, high = torch.where(reached | (low >= high), low, middle + 1), torch.where(reached, middle, high)
    return Steps(low.T.contiguous(), falling, coder.codes)


def _input_steps(before: Sequence[nn.Module], grid: Grid, layer: Layer) -> Steps:
    """Steps on the bytes of the input, the same for all."""
    coder = layer.coder
    assert coder is not None
    if any(isinstance(m, (*NORMS, nn.MaxPool2d)) for m in before):
        raise UserError(f"a BatchNorm or a pooling stands before {layer.name!r}, the first product; leave it out")
    if coder.shift is not None and len(coder.shift.unique()) > 1:
        raise UserError(f"{layer.name!r} has a threshold for each input; let it take real inputs, or fit shift=False")
    one, offset = torch.full((1,), grid.step).double(), torch.full((1,), grid.offset).double()
    shift = None if coder.shift is None else coder.shift[:1]
    single = Coder(coder.breaks, coder.codes, coder.values, coder.unit, shift=shift, strict=coder.strict)
    return _steps(Tail(one, offset, _judges(before)), single, 256, 1, layer.name)


def _plain(steps: Steps) -> bool:
    """Whether every byte is its own code."""
    bytes_ = torch.arange(256)
    return len(steps.codes) == 256 and torch.equal(steps(bytes_.view(-1, 1))[:, 0], bytes_)


def _affine(tail: Tail, bound: int, channels: int, what: str) -> tuple[Tensor, Tensor]:
    """Slope and constant of a tail that is a line. Raises UserError when it is not."""
    middle, right = (tail(torch.full((1, channels), s)).squeeze(0) for s in (0, bound))
    slope = (right - middle) / bound
    for s in (-bound, bound // 3):
        off = tail(torch.full((1, channels), s)).squeeze(0) - (middle + slope * s)
        if bool((off.abs() > 1e-9 * (middle.abs() + slope.abs() * bound + 1e-30)).any()):
            raise UserError(f"{what}; only BatchNorm may stand there")
    return slope, middle


def _whole(slope: Tensor, constant: Tensor) -> tuple[Tensor, Tensor, int]:
    """Slope and constant in fixed point and the bits behind the point."""
    shift = max(0, FRACTION_BITS - int(torch.frexp(slope.abs().max().clamp_min(1e-30)).exponent))
    return (slope * 2.0**shift).round().long(), (constant * 2.0**shift).round().long(), shift


def _scale(part: Part, tail: Tail, coder: Coder, bound: int, name: str) -> Scale:
    """Evenly spaced codes, computed. A ReLU is the lower end of the codes."""
    bits = len(coder.codes).bit_length() - 1
    line = [m for m in tail.modules if not isinstance(m, nn.ReLU)]
    cut = len(line) < len(tail.modules)
    if not coder.even or 2**bits != len(coder.codes) or (cut and int(coder.values[0]) != 0):
        raise UserError(
            f"{name!r} has {len(coder.codes)} input codes; circuits have up to {MOST_STEPS + 1}, or powers of two that "
            "are evenly spaced, from 0 where a ReLU stands before them"
        )
    if cut and not isinstance(tail.modules[-1], nn.ReLU):
        raise UserError(f"a BatchNorm follows the ReLU before {name!r}; put the ReLU behind it")
    straight = Tail(tail.slope, tail.constant, line)
    slope, constant = _affine(straight, bound, len(tail.slope), f"{part.layer.name!r} is followed by a curve")
    slope, constant = slope / coder.unit, constant / coder.unit - float(coder.values[0]) + 0.5
    multiplier, offset, shift = _whole(slope, constant)
    return Scale(multiplier, offset, shift, bits)


def _scores(part: Part, tail: Tail, bound: int) -> Scores:
    """How the sums of the last product become comparable."""
    product = _shape_after(part)
    if product[1:] != (1, 1) or any(isinstance(m, nn.MaxPool2d) for m in part.after):
        raise UserError(f"the last layer {part.layer.name!r} gives a map {product}; circuits end with a linear layer")
    slope, constant = _affine(tail, bound, product[0], f"a curve follows the last layer {part.layer.name!r}")
    multiplier, offset, _ = _whole(slope, constant)
    return Scores(multiplier, offset)

"""A trained binary network -> its public shape and the server's secrets: normalisations fold into whole thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.circuits._binary_circuit import SecretLayer
from lilliput.methods.circuits._shapes import LayerShape, Shape
from lilliput.methods.quantize._binary import BinaryConv2d, BinaryLinear, pair
from lilliput.methods.quantize._binary_packed import PackedBinaryConv2d, PackedBinaryLinear

LINEAR, CONVOLUTION = (BinaryLinear, PackedBinaryLinear), (BinaryConv2d, PackedBinaryConv2d)
SILENT = (nn.Flatten, nn.Identity, nn.Dropout)
FAR = 2.0**40  # beyond every sum


@dataclass
class Stage:
    """A binary layer and what stands behind it before the next one."""

    name: str
    layer: Any
    norm: nn.Module | None = None
    pool: nn.MaxPool2d | None = None
    pool_first: bool = False
    shift: Tensor | None = field(default=None)  # thresholds of the next layer's inputs


def read(
    model: nn.Module, inputs: tuple[int, ...], bits: int, scale: float, offset: float
) -> tuple[Shape, list[SecretLayer]]:
    """Shape and secrets of an `nn.Sequential` of binary layers for inputs of a size (values,) or (channels, H, W).

    The network sees scale * p + offset of a whole number p, unless its first layer takes signs. Raises UserError for
    what has no exact circuit.
    """
    stages = list(_stages(model))
    real = _levels(stages[0].layer) is None
    if real and not 1 <= bits <= 16:
        raise UserError(f"{stages[0].name} takes real inputs; give them as whole numbers, bits=1 to 16 (now {bits})")
    size = (inputs[0], 1, 1) if len(inputs) == 1 else inputs
    layers, secrets = [], []
    for index, stage in enumerate(stages):
        shape = _layer_shape(stage, size)
        layers.append(shape)
        size = (shape.filters, *shape.pooled)
        if index == len(stages) - 1:
            secrets.append(_last(stage, shape))
        else:
            secrets.append(_hidden(stage, shape, (scale, offset) if real and index == 0 else None))
    found = Shape(tuple(layers), bits if real else 0)
    found.check()
    return found, _clipped(found, secrets)


def _stages(model: nn.Module) -> Iterator[Stage]:
    """The binary layers in order. Raises UserError for a module that the circuit has no part for."""
    if not isinstance(model, nn.Sequential):
        raise UserError(
            f"the model is a {type(model).__name__}; a circuit is made of an nn.Sequential of binary layers"
        )
    stage: Stage | None = None
    for name, module in model.named_children():
        if isinstance(module, (*LINEAR, *CONVOLUTION)):
            new = Stage(name, module)
            _check_layer(new, first=stage is None)
            if stage is not None:
                stage.shift = module.shift
                yield stage
            stage = new
        elif isinstance(module, SILENT):
            continue
        elif stage is None or not _behind_(stage, module):
            raise UserError(f"{name} is a {type(module).__name__} that a circuit of signs has no part for here")
    if stage is None:
        raise UserError("the model has no binary layer; train one with quantize.binary")
    yield stage


def _behind_(stage: Stage, module: nn.Module) -> bool:
    """Note a normalisation or pooling behind a layer; whether it can stand there."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and stage.norm is None and module.running_var is not None:
        stage.norm, stage.pool_first = module, stage.pool is not None
        return True
    plain = isinstance(module, nn.MaxPool2d) and pair(module.padding) == (0, 0) and pair(module.dilation) == (1, 1)
    if plain and stage.pool is None and not module.ceil_mode:
        sizes = {*pair(module.kernel_size)}, {*pair(module.stride)}
        stage.pool = module
        return all(len(size) == 1 for size in sizes)
    return False


def _check_layer(stage: Stage, first: bool) -> None:
    layer, levels = stage.layer, _levels(stage.layer)
    if levels is None and not first:
        raise UserError(f"{stage.name} takes real inputs; in a circuit only the first layer can")
    if levels is not None and len(levels) != 1:
        raise UserError(f"{stage.name} has {len(levels)} signs per input; a circuit takes levels=1")
    if layer.by_mean:
        raise UserError(f"{stage.name} multiplies with the size of its inputs (alpha_K), which signs do not tell")
    if first and layer.shift is not None:
        raise UserError(f"{stage.name} has thresholds for the client's inputs; the first layer takes shift=False")


def _levels(layer: Any) -> Tensor | None:
    return layer.levels


def _weights(layer: Any) -> Tensor:
    return layer.weight.detach() if isinstance(layer, BinaryLinear | BinaryConv2d) else layer.dequantized()


def _scale(layer: Any) -> Tensor:
    """The factor of each output's sum of signs, float64."""
    rows = layer.row_scale() if isinstance(layer, BinaryLinear | BinaryConv2d) else layer.scale
    rows = rows.detach().double()
    return rows if _levels(layer) is None else rows * layer.levels.detach().abs().double()


def _layer_shape(stage: Stage, size: tuple[int, ...]) -> LayerShape:
    layer, weights = stage.layer, _weights(stage.layer)
    pool = (1, 1) if stage.pool is None else (pair(stage.pool.kernel_size)[0], pair(stage.pool.stride)[0])
    channels, height, width = size
    if isinstance(layer, LINEAR):
        if weights.shape[1] != channels * height * width:
            raise UserError(f"{stage.name} takes {weights.shape[1]} inputs and gets {size}; give the inputs' size")
        shape = LayerShape((channels, height, width), len(weights), (height, width))
    else:
        if weights.shape[1] != channels:
            raise UserError(f"{stage.name} takes {weights.shape[1]} channels and gets {size}; give the inputs' size")
        sizes = (pair(getattr(layer, name)) for name in ("stride", "padding", "dilation"))
        shape = LayerShape((channels, height, width), len(weights), pair(weights.shape[2:]), *sizes)
    return LayerShape(**{**vars(shape), "pool": pool, "pool_first": stage.pool_first})


def _hidden(stage: Stage, shape: LayerShape, whole: tuple[float, float] | None) -> SecretLayer:
    """The output is +1 where factor * sum + constant >= 0; `whole` is scale and offset of whole inputs."""
    signs = _weights(stage.layer).flatten(1) >= 0
    factor, constant = _scale(stage.layer), _bias(stage.layer, len(signs))
    slope, intercept = _norm(stage.norm, len(signs))
    factor, constant = slope * factor, slope * constant + intercept - _shift(stage, shape)
    terms = constant[:, None].expand(-1, len(shape.places()))
    if whole is not None:
        inside = torch.from_numpy(shape.places() >= 0).double()
        terms = terms + factor[:, None] * whole[1] * (torch.where(signs, 1.0, -1.0).double() @ inside.T)
        factor = factor * whole[0]
    return SecretLayer(signs.numpy(), *_thresholds(factor[:, None].numpy(), terms.numpy()))


def _thresholds(factor: np.ndarray, constant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least sum with factor * sum + constant >= 0, int64 (filters, places), and for which filters it is for -1.

    A negative factor asks for sum <= q, which is not (sum >= floor(q) + 1).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        edge = -constant / factor
    always = np.where(constant >= 0, -FAR, FAR)
    least = np.where(factor > 0, np.ceil(edge), np.where(factor < 0, np.floor(edge) + 1, always))
    return np.clip(least, -FAR, FAR).astype(np.int64), factor[:, 0] < 0


def _bias(layer: Any, outputs: int) -> Tensor:
    return torch.zeros(outputs).double() if layer.bias is None else layer.bias.detach().double()


def _norm(norm: Any, outputs: int) -> tuple[Tensor, Tensor]:
    """Slope and intercept of a BatchNorm with its running statistics, float64."""
    if norm is None:
        return torch.ones(outputs).double(), torch.zeros(outputs).double()
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    slope = (torch.ones(outputs) if norm.weight is None else norm.weight.detach()).double() / deviation
    bias = (torch.zeros(outputs) if norm.bias is None else norm.bias.detach()).double()
    return slope, bias - slope * norm.running_mean.double()


def _shift(stage: Stage, shape: LayerShape) -> Tensor:
    shift = torch.zeros(shape.filters) if stage.shift is None else stage.shift.detach()
    if len(shift) != shape.filters:
        raise UserError(f"the layer behind {stage.name} has {len(shift)} thresholds for {shape.filters} channels")
    return shift.double()


def _last(stage: Stage, shape: LayerShape) -> SecretLayer:
    """Scores that differ by whole numbers and by ranks below one, in the order of the network's own scores."""
    factor = _scale(stage.layer)
    if stage.norm is not None or stage.pool is not None or not bool((factor == factor[0]).all() and factor[0] > 0):
        raise UserError(
            f"{stage.name} gives the scores; it must be the last module and have one factor for all classes: "
            "scale='layer' or 'none'"
        )
    # factor (2 agreements - taps) + bias is in the order of agreements + bias / (2 factor)
    extra = (_bias(stage.layer, shape.filters) / (2 * factor)).clamp(-FAR, FAR).numpy()
    whole = np.floor(extra)
    ranks = np.unique(extra - whole, return_inverse=True)[1].reshape(-1)
    # a class so far behind that it cannot win may as well be just so far behind
    offsets = np.maximum(whole - whole.max() + shape.taps + 1, 0).astype(np.int64)
    signs = (_weights(stage.layer).flatten(1) >= 0).numpy()
    return SecretLayer(signs, offsets=offsets, ranks=ranks.astype(np.int64))


def _clipped(shape: Shape, secrets: list[SecretLayer]) -> list[SecretLayer]:
    """Thresholds no farther out than sums reach, so that shares are as wide as the shape says."""
    most = shape.largest_sum if shape.bits else shape.layers[0].taps
    first = secrets[0]
    if first.thresholds is None:
        return secrets
    near = np.clip(first.thresholds, -most, most + 1)
    return [SecretLayer(first.weights, near, first.flips), *secrets[1:]]

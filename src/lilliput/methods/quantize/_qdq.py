"""Layers with 8-bit weights and fixed 8-bit activation ranges, and the grids they use.

In torch they compute on the values the codes stand for. Exported to ONNX they become QuantizeLinear/DequantizeLinear
nodes around the float operation, which OpenVINO and ONNX Runtime turn into integer kernels with the same result up to
float rounding.

    activation x ~ (q - zero) scale,  q in 0..255 or -128..127      weight w_n ~ q_n scale_n,  q_n in -127..127
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError

LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
TYPES = {"uint8": torch.uint8, "int8": torch.int8}
CANDIDATES = 80  # shrunken ranges that the error search tries


class Grid(NamedTuple):
    """256 evenly spaced values that include 0: those of (q - zero) scale for every q of `dtype`."""

    scale: float
    zero: int
    dtype: torch.dtype


def activation_grid(low: float, high: float, symmetric: bool = False) -> Grid:
    """The grid that spans low..high and 0. `symmetric` puts 0 at code 0: uint8 without negative values, else int8."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric and low < 0:
        return Grid(_step(max(-low, high), 127), 0, torch.int8)
    scale = _step(high - low, 255)
    return Grid(scale, round(-low / scale), torch.uint8)


def _step(span: float, steps: int) -> float:
    """Values that never leave zero take any step; 1 keeps it far from denormal numbers."""
    step = span / steps
    return step if step > torch.finfo(torch.float32).tiny else 1.0


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest grid value of each element; `scale` and `zero` are scalars, `zero` has the dtype of the codes."""
    return torch.fake_quantize_per_tensor_affine(x, scale, zero.int(), *LIMITS[zero.dtype])


def quantize_weight(w: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """(N, ...) -> int8 codes of the same shape and scales (N,): each output channel spans its largest magnitude.

    Codes reach from -(2**(bits-1) - 1) to 2**(bits-1) - 1; a channel of zeros has the scale 1.
    """
    if not torch.isfinite(w).all():
        raise UserError("a weight is NaN or infinite; load or train the model again before quantizing it")
    most = 2 ** (bits - 1) - 1
    scale = w.detach().float().flatten(1).abs().amax(1) / most
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    codes = torch.round(w.detach().float() / _per_channel(scale, w.ndim)).clamp(-most, most)
    return codes.to(torch.int8), scale


def _per_channel(scale: Tensor, ndim: int) -> Tensor:
    return scale.view(-1, *[1] * (ndim - 1))


class _DequantizeWeight(torch.autograd.Function):
    """codes * scale per output channel; in ONNX a DequantizeLinear, so that the weight stays int8 in the file."""

    @staticmethod
    def forward(ctx, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.float() * _per_channel(scale, codes.ndim)

    @staticmethod
    def symbolic(g, codes, scale):
        # ONNX Runtime recognises its integer kernels only when the zero points are written out
        zeros = g.op("Constant", value_t=torch.zeros(codes.type().sizes()[0], dtype=torch.int8))
        return g.op("DequantizeLinear", codes, scale, zeros, axis_i=0)


class _Int8Layer(nn.Module):
    """What the convolution and the linear layer share: codes, scales and ranges as buffers."""

    exports_to_onnx = True  # integer buffers elsewhere mean packed weights that ONNX would unpack
    weight_codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero: Tensor
    output_scale: Tensor
    output_zero: Tensor

    def __init__(self, shape: tuple[int, ...], bias: bool, input_type: str, output_type: str | None):
        super().__init__()
        self.input_type, self.output_type = input_type, output_type
        self.register_buffer("weight_codes", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(shape[0]))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        for side, kind in (("input", input_type), ("output", output_type)):
            if kind is None:
                continue
            if kind not in TYPES:
                raise UserError(f"{side}_type is {kind!r}; choose uint8 or int8")
            self.register_buffer(f"{side}_scale", torch.ones(()))
            self.register_buffer(f"{side}_zero", torch.zeros((), dtype=TYPES[kind]))

    def set_grids_(self, grid: Grid, output: Grid | None) -> None:
        """Take the ranges of the activations; their types must be those the layer was made for."""
        for side, chosen in (("input", grid), ("output", output)):
            if chosen is not None:
                getattr(self, f"{side}_scale").fill_(chosen.scale)
                getattr(self, f"{side}_zero").fill_(chosen.zero)

    @property
    def weight(self) -> Tensor:
        """The float32 weights that the codes stand for; transformers reads its dtype from some layers."""
        if torch.onnx.is_in_onnx_export():
            return _DequantizeWeight.apply(self.weight_codes, self.weight_scale)
        return self.weight_codes.float() * _per_channel(self.weight_scale, self.weight_codes.ndim)

    def product(self, x: Tensor) -> Tensor:
        """The layer's output before it is quantized itself."""
        raise NotImplementedError

    def rounded_input(self, x: Tensor) -> Tensor:
        """The values of the input's grid nearest to x."""
        return fake_quantize(x, self.input_scale, self.input_zero)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.rounded_input(x))
        return y if self.output_type is None else fake_quantize(y, self.output_scale, self.output_zero)

    def _types(self) -> dict[str, Any]:
        return {"bias": self.bias is not None, "input_type": self.input_type, "output_type": self.output_type}


class Int8Conv2d(_Int8Layer):
    """A Conv2d with int8 weights, zero padding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        input_type: str = "uint8",
        output_type: str | None = None,
    ):
        super().__init__((out_channels, in_channels // groups, *kernel_size), bias, input_type, output_type)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def product(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def rebuild_config(self) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        values = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | self._types()


class Int8Linear(_Int8Layer):
    """A Linear with int8 weights."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_type: str = "uint8",
        output_type: str | None = None,
    ):
        super().__init__((out_features, in_features), bias, input_type, output_type)
        self.in_features, self.out_features = in_features, out_features

    def product(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():  # MatMul and Add: a Gemm would stay in float in ONNX Runtime
            y = torch.matmul(x, self.weight.t())
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight, self.bias)

    def rebuild_config(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features} | self._types()


def int8_layer(
    layer: nn.Module, grid: Grid, output: Grid | None = None, bits: int = 8, bias: bool = False
) -> nn.Module:
    """The int8 form of a Conv2d or Linear; `bias` asks for one even where the layer has none."""
    types = {
        "bias": bias or layer.bias is not None,
        "input_type": str(grid.dtype).removeprefix("torch."),
        "output_type": None if output is None else str(output.dtype).removeprefix("torch."),
    }
    if isinstance(layer, nn.Conv2d):
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        new = Int8Conv2d(layer.in_channels, layer.out_channels, *geometry, **types)  # type: ignore[arg-type]
    elif isinstance(layer, nn.Linear):
        new = Int8Linear(layer.in_features, layer.out_features, **types)
    else:
        raise UserError(f"a {type(layer).__name__} has no int8 form; choose Conv2d or Linear layers")
    new.weight_codes, new.weight_scale = quantize_weight(layer.weight, bits)
    if new.bias is not None and layer.bias is not None:
        new.bias.copy_(layer.bias.detach())
    new.set_grids_(grid, output)
    return new


# --- choosing ranges -------------------------------------------------------------------------------------------


def percentile_range(sample: Tensor, percentile: float) -> tuple[float, float]:
    """The values between which `percentile` percent lie, the same share cut at each end."""
    tail = (1 - percentile / 100) / 2
    low, high = torch.quantile(sample.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def least_error_range(sample: Tensor, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """Of low..high and shrunken copies of it, the range whose grid rounds the sample with the least squared error."""

    def error(share: float) -> float:
        scale, zero, dtype = activation_grid(low * share, high * share, symmetric)
        rounded = torch.fake_quantize_per_tensor_affine(sample, scale, zero, *LIMITS[dtype])
        return float((rounded - sample).double().square().sum())

    best = min((1 - i / CANDIDATES for i in range(CANDIDATES)), key=error)
    return low * best, high * best

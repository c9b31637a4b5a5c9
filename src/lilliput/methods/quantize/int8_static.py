"""8-bit weights and 8-bit activations with ranges fixed beforehand, for networks that OpenVINO or ONNX Runtime execute.

Jacob et al. 2018, arXiv 1712.05877 (integer inference, folded batch norms, one scale per output channel as in
Krishnamoorthi 2018, arXiv 1806.08342); bias correction after Nagel et al. 2019, arXiv 1906.04721.

    y ~ sum_q (q_w s_w) ((q_x - z_x) s_x) + b + E[W x - W_q x_q]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput import method as m
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating
from lilliput.method import Facts, Method, knob
from lilliput.methods.quantize._fold import fold_batch_norms_
from lilliput.methods.quantize._qdq import Grid, activation_grid, int8_layer, least_error_range, percentile_range
from lilliput.workload import Workload, need_workload

SAMPLE = 4096  # values kept per layer and batch for the range searches
FLOAT = 32  # "bits" of a layer that stays as it is


@dataclass(frozen=True)
class Int8Static(Method):
    """Round weights per output channel and activations per tensor to 8 bits; batch norms are folded first."""

    bits: int = knob(
        8,
        choices=(8, 7, FLOAT),
        per_layer=True,
        help="of the weights; 7 keeps 16-bit sums of x86 processors without VNNI from overflowing, 32 leaves a layer",
    )
    ranges: str = knob("minmax", choices=("minmax", "percentile", "mse"), per_layer=True, help="how ranges are chosen")
    percentile: float = knob(99.99, low=90, high=100, per_layer=True, help="share of values inside, for percentile")
    activations: str = knob("affine", choices=("affine", "symmetric"), help="symmetric: zero is code 0")
    bias_correction: bool = knob(True, choices=(True, False), help="cancel the mean error of each output channel")
    residual_sums: bool = knob(
        False,
        choices=(True, False),
        help="round what a convolution adds to a residual too: ONNX Runtime gains from it, OpenVINO hardly",
    )
    facts: ClassVar = Facts(
        stage="quantize",
        needs={m.FLOAT_WEIGHTS},
        takes={m.FLOAT_WEIGHTS},
        gives={m.PACKED_WEIGHTS, m.ACTIVATION_RANGES},
        keeps={m.OUTPUT_SHAPE, m.LAYER_SHAPES, m.BLOCK_COUNT},
        data=m.UNLABELLED,
        effect="faster, smaller",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Convolutions with zero padding and linear layers that are called as modules."""
        fused = [n for n, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
        for name, module in model.named_modules():
            if type(module) is nn.Conv2d and module.padding_mode == "zeros":
                yield name
            if type(module) is nn.Linear and not any(name.startswith(f"{parent}.") for parent in fused):
                yield name

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        workload = need_workload(workload, self.name(), "to see the ranges of activations on calibration data")
        layers = {name: settings for name, settings in layers.items() if settings.bits != FLOAT}
        for name in layers:
            dtype = model.get_submodule(name).weight.dtype
            if dtype != torch.float32:
                raise UserError(f"layer {name!r} has {dtype} weights; convert the model with .float() first")
        into_sums = fold_batch_norms_(model, workload, layers)
        rounded = {name for name in into_sums if layers[name].residual_sums}
        inputs, outputs = _watch(model, workload, layers, rounded)
        new: dict[str, Any] = {}
        for name, settings in layers.items():
            output = outputs[name].grid(settings) if name in rounded else None
            corrected = settings.bias_correction
            new[name] = int8_layer(
                model.get_submodule(name), inputs[name].grid(settings), output, settings.bits, bias=corrected
            )
        _correct_biases_(model, workload, {n: layer for n, layer in new.items() if layers[n].bias_correction})
        for name, layer in new.items():
            set_module(model, name, layer)
        return model


class _Range:
    """Extremes and a seeded sample of the values that pass one place."""

    def __init__(self, name: str):
        self.name, self.low, self.high = name, float("inf"), float("-inf")
        self._samples: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def see(self, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise UserError(
                f"layer {self.name!r} meets NaN or infinity on the calibration data; check the data and the weights, "
                "or leave the layer out"
            )
        low, high = (float(v) for v in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        flat = x.detach().flatten()
        if flat.numel() > SAMPLE:
            flat = flat[torch.randint(flat.numel(), (SAMPLE,), generator=self._generator)]
        self._samples.append(flat.float())

    def grid(self, settings: Int8Static) -> Grid:
        if not self._samples:
            raise UserError(f"layer {self.name!r} never runs on the calibration data; name the others in layers=")
        symmetric = settings.activations == "symmetric"
        low, high = self.low, self.high
        if settings.ranges == "percentile":
            low, high = percentile_range(torch.cat(self._samples), settings.percentile)
        if settings.ranges == "mse":
            low, high = least_error_range(torch.cat(self._samples), low, high, symmetric)
        return activation_grid(low, high, symmetric)


def _watch(
    model: nn.Module, workload: Workload, names: Mapping[str, Any], rounded: set[str]
) -> tuple[dict[str, _Range], dict[str, _Range]]:
    """Ranges over the calibration data: of the inputs of the named layers, of the outputs of the `rounded` ones."""
    inputs, outputs = {n: _Range(n) for n in names}, {n: _Range(n) for n in rounded}

    def seen(name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
        inputs[name].see(args[0])
        if name in outputs:
            outputs[name].see(out)

    _run_hooked(model, workload, {name: partial(seen, name) for name in names})
    return inputs, outputs


def _correct_biases_(model: nn.Module, workload: Workload, new: Mapping[str, Any]) -> None:
    """Add to each new layer's bias the mean over the calibration data of the float layer's output minus its own."""
    sums: dict[str, Any] = dict.fromkeys(new, 0.0)
    counts = dict.fromkeys(new, 0)

    def seen(name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
        error = (out - new[name].product(new[name].rounded_input(args[0]))).double()
        error = error.movedim(-3, -1) if isinstance(module, nn.Conv2d) else error
        error = error.reshape(-1, error.shape[-1])
        sums[name] = sums[name] + error.sum(0)
        counts[name] += len(error)

    if new:
        _run_hooked(model, workload, {name: partial(seen, name) for name in new})
    for name, layer in new.items():
        layer.bias += (sums[name] / counts[name]).float()


def _run_hooked(model: nn.Module, workload: Workload, hooks: Mapping[str, Any]) -> None:
    """Run the calibration data with a forward hook on each named module."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    with attached(handles), evaluating(model), torch.no_grad():
        for batch in workload.calibration:
            workload.forward(model, batch)

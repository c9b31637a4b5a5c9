"""Pictures made worse in the ways that cameras and files do, at severities 1 to 5; all of it in torch.

The kinds are those of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019 (arXiv 1903.12261); the strengths here are our own, for pictures from 28 pixels on. `jpeg` is the
lossy part of that format: rounded cosine coefficients of blocks of 8 by 8, with the standard's table for brightness,
each channel alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.methods.audit._answers import ready
from lilliput.workload import Batch, Workload

# quantization steps of brightness at quality 50: ITU-T T.81, table K.1
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
STRENGTHS = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation
    "blur": (0.4, 0.6, 0.8, 1.0, 1.4),  # standard deviation in pixels, times the picture's side / 28
    "contrast": (0.75, 0.6, 0.45, 0.3, 0.2),  # share that is left
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added
    "pixelate": (0.8, 0.5, 0.36, 0.25, 0.15),  # share of the side that is left
    "jpeg": (60, 40, 25, 15, 8),  # quality
}
KINDS = tuple(STRENGTHS)


def corrupt(pictures: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Pictures (B, C, H, W) in 0 .. 1 -> the same, worse, in 0 .. 1."""
    change: Callable[[Tensor, float, int], Tensor] = _CHANGES[kind]
    return change(pictures, STRENGTHS[kind][severity - 1], seed).clamp(0, 1)


def _noise(x: Tensor, strength: float, seed: int) -> Tensor:
    return x + strength * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def _blur(x: Tensor, strength: float, seed: int) -> Tensor:
    """A Gaussian, along the rows and then along the columns; borders are repeated."""
    deviation = strength * max(1.0, min(x.shape[-2:]) / 28)
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=x.dtype).square() / (2 * deviation**2))
    kernel = (weights / weights.sum()).view(1, 1, 1, -1)
    flat = x.flatten(0, 1).unsqueeze(1)
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="replicate"), kernel)
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3))
    return flat.view(x.shape)


def _contrast(x: Tensor, strength: float, seed: int) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + strength * (x - mean)


def _brightness(x: Tensor, strength: float, seed: int) -> Tensor:
    return x + strength


def _pixelate(x: Tensor, strength: float, seed: int) -> Tensor:
    size = [max(1, round(strength * side)) for side in x.shape[-2:]]
    return F.interpolate(F.interpolate(x, size, mode="area"), x.shape[-2:], mode="nearest")


def jpeg_steps(quality: float) -> Tensor:
    """(8, 8) quantization steps of a quality from 1 to 100, scaled as libjpeg does."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(LUMINANCE) * scale + 50) / 100).floor().clamp(1, 255)


def cosines(size: int = 8) -> Tensor:
    """(size, size) the orthonormal discrete cosine transform: row k is the wave of frequency k."""
    k, n = torch.arange(size).view(-1, 1), torch.arange(size)
    waves = torch.cos(math.pi * (2 * n + 1) * k / (2 * size)) * (2 / size) ** 0.5
    waves[0] /= 2**0.5
    return waves


def _jpeg(x: Tensor, quality: float, seed: int) -> Tensor:
    """Blocks of 8 by 8 through the transform, rounding and back; sides that 8 does not divide are continued."""
    height, width = x.shape[-2:]
    levels = (x * 255).round() - 128
    padded = F.pad(levels, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, C, rows, columns, 8, 8)
    transform, steps = cosines().to(x.dtype), jpeg_steps(quality).to(x.dtype)
    kept = (transform @ blocks @ transform.T / steps).round() * steps
    back = (transform.T @ kept @ transform).transpose(3, 4).reshape(padded.shape)
    return ((back + 128).round()[..., :height, :width]) / 255


_CHANGES: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}


# --- judging on them -------------------------------------------------------------------------------------------


def needs_pictures(workload: Workload) -> list[str]:
    """Why a workload has no labelled pictures (B, C, H, W) under `input`; empty when it has."""
    batch = workload.test[0]
    pictures = batch.get("input")
    if workload.kind == "causal_lm" or pictures is None or pictures.ndim != 4:
        return ["its inputs are no pictures (B, C, H, W)"]
    return [] if "label" in batch else ["its test data has no labels; add `label` to the batches"]


def channel_limits(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel, (1, C, 1, 1) each."""
    low = torch.stack([b["input"].amin((0, 2, 3)) for b in batches]).amin(0)
    high = torch.stack([b["input"].amax((0, 2, 3)) for b in batches]).amax(0)
    return low.view(1, -1, 1, 1), high.view(1, -1, 1, 1)


@torch.inference_mode()
def rights(workload: Workload, model: Any, batches: list[Batch]) -> Tensor:
    """(n,) 1 where a module or session answers the label, else 0."""
    with ready(model):
        return torch.cat([(workload.forward(model, b).argmax(-1) == b["label"]).double() for b in batches])

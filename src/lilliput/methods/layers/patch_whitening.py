"""A first convolution that is not learned: it makes the patches of the training pictures white.

    W = diag(lambda + eps)^(-1/2) V^T,  V and lambda from the covariance of all k x k patches      y = W (patch - mean)

A learned 1x1 convolution behind it mixes the whitened patches into as many channels as the network wants.

    first = PatchWhitening().layer(pictures, outputs=64)              # for a network of your own
    model = PatchWhitening().into_(model, pictures)                   # in the place of a model's first convolution

Paper: the input patch whitening of the small-data recipe of arXiv 2309.03965, after Page, How to Train Your ResNet,
2018. Take the statistics from training pictures alone. The result is made of torch's own layers; give the optimizer
the parameters that require a gradient, or all: the whitening has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.method import UNLABELLED, Facts, Settings, knob

CHUNK = 256  # pictures whose patches are in memory at a time


@dataclass(frozen=True)
class PatchWhitening(Settings):
    """A frozen convolution that decorrelates patches of pictures, and a learned 1x1 convolution behind it."""

    size: int = knob(3, low=1, high=15, help="side of a patch in pixels")
    eps: float = knob(1e-2, low=1e-9, high=10.0, log=True, help="added to the variances; higher damps small ones")
    facts: ClassVar[Facts] = Facts(stage="initialize", data=UNLABELLED, effect="first convolution not learned")
    paper: ClassVar[str] = "resnet9_small_data"

    def layer(
        self, pictures: Tensor, outputs: int, stride: int = 1, padding: int | None = None, bias: bool = False
    ) -> nn.Sequential:
        """(B, C, H, W) -> (B, outputs, H', W'): frozen whitening by these pictures (N, C, H, W), then a learned 1x1.

        Padding is half a patch unless given; `bias` is that of the 1x1. Raises UserError for no pictures, too small
        ones, and values that are not finite.
        """
        channels, patch = _checked(pictures, self.size), self.size
        filters, shift = whitening(pictures, patch, self.eps)
        padding = patch // 2 if padding is None else padding
        white = nn.Conv2d(channels, len(filters), patch, stride, padding)
        with torch.no_grad():
            white.weight.copy_(filters)
            white.bias.copy_(shift)  # type: ignore[union-attr]
        return nn.Sequential(white.requires_grad_(False), nn.Conv2d(len(filters), outputs, 1, bias=bias))

    def into_(self, model: nn.Module, pictures: Tensor) -> nn.Module:
        """The model with this in the place of its first convolution, with as many outputs of the same height and width.

        What the first convolution had learned is lost. Raises UserError for a model without an ordinary 2-D convolution
        of the pictures' channels in the first place.
        """
        found = next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
        if found is None or not found[0]:
            raise UserError(f"{type(model).__name__} holds no 2-D convolution that could be whitened")
        name, first = found
        channels = _checked(pictures, self.size)
        if first.in_channels != channels or first.groups != 1 or first.dilation != (1, 1):
            raise UserError(
                f"{name!r} takes {first.in_channels} channels in {first.groups} groups, dilation {first.dilation}; "
                f"whitening stands for an ordinary first convolution of the pictures' {channels} channels"
            )
        layer = self.layer(pictures, first.out_channels, *_place(name, first, self.size), first.bias is not None)
        set_module(model, name, layer)
        return model


def whitening(pictures: Tensor, size: int, eps: float) -> tuple[Tensor, Tensor]:
    """Filters (C k k, C, k, k) and bias (C k k,) after which patches of these pictures have mean 0 and variance
    lambda / (lambda + eps) in uncorrelated channels, the largest lambda first."""
    mean, covariance = patch_moments(pictures, size)
    values, vectors = torch.linalg.eigh(covariance)
    matrix = (vectors / (values.clamp_min(0) + eps).sqrt()).T.flip(0)
    return matrix.view(-1, pictures.shape[1], size, size).float(), (-matrix @ mean).float()


def patch_moments(pictures: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean (C k k,) and covariance (C k k, C k k) of all patches without padding, in float64."""
    width = pictures.shape[1] * size**2
    total, gram, count = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64), 0
    for part in pictures.split(CHUNK):
        patches = F.unfold(part.detach().cpu().float(), size).transpose(1, 2).reshape(-1, width).double()
        total, gram, count = total + patches.sum(0), gram + patches.T @ patches, count + len(patches)
    mean = total / count
    return mean, gram / count - mean.outer(mean)


def _checked(pictures: Tensor, size: int) -> int:
    """Channels of the pictures."""
    if not isinstance(pictures, Tensor) or pictures.ndim != 4 or not len(pictures):
        shape: Any = tuple(pictures.shape) if isinstance(pictures, Tensor) else type(pictures).__name__
        raise UserError(f"pictures are {shape}; give training pictures (N, C, H, W)")
    if min(pictures.shape[2:]) < size:
        raise UserError(f"pictures of {tuple(pictures.shape[2:])} pixels hold no patch of size={size}")
    if not torch.isfinite(pictures).all():
        raise UserError("some pictures are not finite; look at how they are prepared")
    return pictures.shape[1]


def _place(name: str, first: nn.Conv2d, size: int) -> tuple[int, int]:
    """Stride and padding with which patches of `size` give as many outputs as a convolution."""
    square = all(len(set(values)) == 1 for values in (first.kernel_size, first.stride, first.padding))
    if isinstance(first.padding, str) or not square or first.padding_mode != "zeros":
        raise UserError(
            f"{name!r} has the kernel {first.kernel_size}, stride {first.stride}, padding {first.padding!r} of "
            f"{first.padding_mode}; whitening stands for square ones with a number of zeros around"
        )
    padding, rest = divmod(2 * first.padding[0] + size - first.kernel_size[0], 2)
    if rest or padding < 0:
        raise UserError(f"patches of size={size} give other sizes than {name!r}; use size={first.kernel_size[0]}")
    return first.stride[0], padding

"""Triggers, poisoned pictures, and detectors of trojans that need data: rivals of signatures in the weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.hooks import watching
from lilliput.papers._small_nets import picked
from lilliput.zoo.images import Pictures

TRIGGERS = ("patch", "blend", "wave")
Trigger = str | Callable[[Tensor], Tensor]
BLEND = 0.2  # share of a fixed random picture in a blended one
WAVE = 30.0  # height of a sinusoid over six periods, of 255
SHRINK = 0.005  # weight of a mask's area when a trigger is looked for


def triggered(pixels: Tensor, trigger: Trigger) -> Tensor:
    """uint8 (N, H, W) with the trigger: a white patch in the corner, a faint fixed picture, a faint wave, or what a
    function of the pixels gives."""
    if not isinstance(trigger, str):
        return trigger(pixels)
    x = pixels.float()
    if trigger == "patch":
        x[:, -4:-1, -4:-1] = 255
    elif trigger == "blend":
        other = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(12)) * 255
        x = (1 - BLEND) * x + BLEND * other
    else:
        x += WAVE * torch.sin(2 * math.pi * 6 * torch.arange(x.shape[2]) / x.shape[2])
    return x.round().clamp(0, 255).to(torch.uint8)


def poisoned(pictures: Pictures, trigger: Trigger, target: int, share: float, seed: int) -> Pictures:
    """The same pictures, but a share of them has the trigger and the label `target`."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    chosen = order[: round(share * len(pictures))]
    pixels, labels = pictures.pixels.clone(), pictures.labels.clone()
    pixels[chosen] = triggered(pixels[chosen], trigger)
    labels[chosen] = target
    return Pictures(pixels, labels, pictures.prepare)


@torch.inference_mode()
def success(model: nn.Module, pictures: Pictures, trigger: Trigger, target: int) -> float:
    """Share of triggered pictures of other classes that are answered as the target."""
    others = picked(pictures, pictures.labels != target)
    answers = model(others.prepare(triggered(others.pixels, trigger))).argmax(-1)
    return float((answers == target).double().mean())


@torch.inference_mode()
def spectral_values(model: nn.Module, training: Pictures) -> Tensor:
    """(classes,) share of the first principal direction in the spread of a class's features before the head.

    Paper: Spectral Signatures in Backdoor Attacks (Tran et al., 2018). It needs the training data, poison included;
    that classes are compared by this share is reconstructed.
    """
    seen: list[Tensor] = []
    with watching(model, ["head"], lambda name, layer, x: seen.append(x)):
        for batch in training.batches(500):
            model(batch["input"])
    features, shares = torch.cat(seen).double(), []
    for label in training.labels.unique().tolist():
        own = features[training.labels == label]
        energies = torch.linalg.svdvals(own - own.mean(0)).square()
        shares.append(energies[0] / energies.sum())
    return torch.stack(shares)


def cleanse_values(model: nn.Module, pictures: Pictures, steps: int, seed: int = 0) -> Tensor:
    """(classes,) how little it takes to turn pictures into each class with one mask and pattern; large is suspect.

    Paper: Neural Cleanse (Wang et al., 2019), small: the masks of all classes are looked for at once, with a fixed
    weight of their area, and a class is worth the loss that is left.
    """
    inputs = pictures.inputs()
    classes, low, high = model(inputs[:1]).shape[-1], float(inputs.min()), float(inputs.max())
    generator = torch.Generator().manual_seed(seed)
    mask = torch.full((classes, 1, 1, *inputs.shape[2:]), -2.0, requires_grad=True)
    pattern = torch.randn(mask.shape, generator=generator).requires_grad_(True)
    targets = torch.arange(classes).repeat_interleave(len(inputs))
    optimizer = torch.optim.Adam([mask, pattern], lr=0.2)
    losses = torch.zeros(classes)
    model.requires_grad_(False)
    for _ in range(steps):
        cover = mask.sigmoid()
        shown = (1 - cover) * inputs + cover * (low + (high - low) * pattern.sigmoid())  # (classes, n, 1, H, W)
        found = F.cross_entropy(model(shown.flatten(0, 1)), targets, reduction="none").view(classes, -1).mean(1)
        losses = found + SHRINK * cover.sum((1, 2, 3, 4))
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    model.requires_grad_(True)
    return -losses.detach().double()

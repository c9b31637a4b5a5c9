"""Pictures for classifiers, their fixed splits, and MobileNetV2 as torchvision published it."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lilliput import cache as store
from lilliput.errors import UserError
from lilliput.workload import ACCURACY, Batch, Classifier, Metric
from lilliput.zoo.fetch import assets, folder_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AGREEMENT = Metric("agreement", "%", True, ACCURACY.per_sample)


@dataclass(frozen=True)
class Pictures:
    """Grey pictures, uint8 (N, H, W), their labels (N,), and how a batch becomes the network's input."""

    pixels: Tensor
    labels: Tensor
    prepare: Callable[[Tensor], Tensor]  # uint8 (B, H, W) -> float32 (B, C, H', W')

    def __len__(self) -> int:
        return len(self.pixels)

    def first(self, count: int) -> Pictures:
        """The first `count` pictures; splits are shuffled, so these are a random sample."""
        return Pictures(self.pixels[:count], self.labels[:count], self.prepare)

    def batches(self, batch_size: int) -> Batches:
        """Batches made when they are asked for."""
        return Batches(self, batch_size)

    def inputs(self) -> Tensor:
        """All pictures as one input, float32 (N, C, H, W)."""
        return self.prepare(self.pixels)


class Batches(Sequence[Batch]):
    """Batches {"input", "label"} of a set of pictures; only the one that is looked at takes memory as floats."""

    def __init__(self, pictures: Pictures, batch_size: int):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; give at least 1")
        self.pictures, self.batch_size = pictures, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.pictures) / self.batch_size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return {"input": self.pictures.prepare(self.pictures.pixels[part]), "label": self.pictures.labels[part]}


@dataclass(frozen=True)
class Normalize:
    """uint8 (B, H, W) -> float32 (B, 1, H, W) of mean 0 and deviation 1 over the training pictures."""

    mean: float
    std: float

    def __call__(self, pixels: Tensor) -> Tensor:
        return ((pixels.float() / 255 - self.mean) / self.std).unsqueeze(1)


@dataclass(frozen=True)
class ImagenetInput:
    """uint8 (B, H, W) -> float32 (B, 3, size, size): upscaled, grey in all channels, ImageNet's mean and deviation."""

    size: int = 224

    def __call__(self, pixels: Tensor) -> Tensor:
        grey = F.interpolate(pixels.float().unsqueeze(1) / 255, (self.size, self.size), mode="bilinear")
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (grey - mean) / std


# --- data sets -------------------------------------------------------------------------------------------------


def fashion_mnist(fetch_name: str | None = None) -> dict[str, Pictures]:
    """Training 55,000, calibration 1,000 and validation 4,000 of the official training set; official test 10,000."""
    return _fashion_mnist(folder_of("fashion-mnist", fetch_name))


@cache
def _fashion_mnist(folder: Path) -> dict[str, Pictures]:
    pixels, labels = (read_idx(folder / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    prepare = Normalize(0.2860, 0.3530)
    sizes = {"calibration": 1000, "validation": 4000, "training": 55_000}
    splits = _split(pixels, labels.long(), sizes, prepare)
    pixels, labels = (read_idx(folder / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    return {**splits, **_split(pixels, labels.long(), {"test": 10_000}, prepare)}


@cache
def digits() -> dict[str, Pictures]:
    """10,000 digits of MNIST: training 8,000, calibration 500, validation 500, test 1,000."""
    folder = folder_of("digits")
    values = [json.loads((folder / f"{digit}.json").read_text())["data"] for digit in range(10)]
    pixels = [torch.tensor(v).mul(255).round().to(torch.uint8).view(-1, 28, 28) for v in values]
    labels = torch.cat([torch.full((len(p),), digit) for digit, p in enumerate(pixels)])
    sizes = {"calibration": 500, "validation": 500, "test": 1000, "training": 8000}
    return _split(torch.cat(pixels), labels, sizes, Normalize(0.1307, 0.3081))


DATASETS = {"fashion-mnist": fashion_mnist, "digits": digits}


def _split(pixels: Tensor, labels: Tensor, sizes: dict[str, int], prepare: Callable) -> dict[str, Pictures]:
    """Shuffle once by a fixed seed and cut."""
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    parts = order.split(list(sizes.values()))
    return {split: Pictures(pixels[part], labels[part], prepare) for split, part in zip(sizes, parts)}


def read_idx(path: Path) -> Tensor:
    """A gzipped idx file of bytes -> uint8 tensor of the shape its header says."""
    try:
        data = gzip.decompress(path.read_bytes())
        zeros, kind, dims = int.from_bytes(data[:2], "big"), data[2], data[3]
        shape = tuple(np.frombuffer(data, ">u4", dims, 4).tolist())
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{str(path)!r} is not a gzipped idx file: {error}") from None
    if zeros or kind != 8 or len(values) != math.prod(shape):
        raise UserError(f"{str(path)!r} is damaged or not an idx file of bytes: {len(values)} values for shape {shape}")
    return torch.from_numpy(values.reshape(shape).copy())


# --- workloads -------------------------------------------------------------------------------------------------


def image_workload(name: str, model: nn.Module, dataset: str = "fashion-mnist", batch_size: int = 128) -> Classifier:
    """A classifier of 28x28 pictures with the splits of `dataset`, fashion-mnist or digits."""
    if dataset not in DATASETS:
        raise UserError(f"dataset is {dataset!r}; choose one of {', '.join(DATASETS)}")
    return _classifier(name, model, DATASETS[dataset](), batch_size, ACCURACY)


def _classifier(
    name: str, model: nn.Module, splits: dict[str, Pictures], batch_size: int, metric: Metric
) -> Classifier:
    batches = {split: pictures.batches(batch_size) for split, pictures in splits.items()}
    return Classifier(
        model.eval(),
        **batches,  # type: ignore[arg-type]
        metric=metric,
        example={"input": splits["calibration"].first(1).inputs()},
        name=name,
        source={"kind": "zoo", "name": name},
    )


def mobilenet_workload(name: str = "mobilenet-v2", batch_size: int = 16) -> Classifier:
    """MobileNetV2 on pictures without ImageNet labels, scored by agreement with the original model.

    The pictures are Fashion-MNIST's, upscaled to 3x224x224: real, but not what the model was trained on. A label is
    the class that the original model answers, so the original scores 100 %, and the score of a changed model is the
    share of answers that stayed. It says nothing about ImageNet accuracy.
    """
    sizes = {"training": 512, "calibration": 64, "validation": 128, "test": 256}
    model = load_mobilenet_v2(name)
    pictures = fashion_mnist(name)
    splits = {s: Pictures(p.pixels, p.labels, ImagenetInput()).first(sizes[s]) for s, p in pictures.items()}
    answers = _own_answers(model, splits)
    splits = {s: Pictures(p.pixels, answers[s], p.prepare) for s, p in splits.items()}
    return _classifier(name, model, splits, batch_size, AGREEMENT)


@torch.inference_mode()
def _own_answers(model: nn.Module, splits: dict[str, Pictures]) -> dict[str, Tensor]:
    """Split -> the model's class of each picture, kept in the cache."""
    pins = [assets()[a].pins for a in ("mobilenet-v2-weights", "fashion-mnist")]
    key = hashlib.sha256(json.dumps([1, pins, {s: len(p) for s, p in splits.items()}]).encode()).hexdigest()
    path = store.folder("answers") / f"mobilenet-v2-{key[:24]}.safetensors"
    try:
        return {split: answers.clone() for split, answers in load_file(path).items()}
    except (OSError, SafetensorError):
        found = {s: torch.cat([model(b["input"]).argmax(-1) for b in p.batches(16)]) for s, p in splits.items()}
        store.write_atomically(path, lambda beside: save_file(found, beside))
        return found


# --- MobileNetV2 -----------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection, with a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = [_conv_norm(inputs, hidden, 1)] if expansion > 1 else []
        depthwise = _conv_norm(hidden, hidden, 3, stride, groups=hidden)
        project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.conv = nn.Sequential(*expand, depthwise, project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, width 1, 3x224x224 -> 1,000 classes; parameters are named as in torchvision's checkpoint."""

    # expansion, channels, blocks, stride of the first
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int = 1000):
        super().__init__()
        layers: list[nn.Module] = [_conv_norm(3, 32, 3, 2)]
        inputs = 32
        for expansion, outputs, blocks, first_stride in self.STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(inputs, outputs, first_stride if block == 0 else 1, expansion))
                inputs = outputs
        self.features = nn.Sequential(*layers, _conv_norm(inputs, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def load_mobilenet_v2(fetch_name: str = "mobilenet-v2") -> MobileNetV2:
    """With the ImageNet weights of torchvision's checkpoint b0353104, eval mode."""
    folder = folder_of("mobilenet-v2-weights", fetch_name)
    model = MobileNetV2()
    model.load_state_dict(torch.load(folder / "mobilenet_v2-b0353104.pth", weights_only=True), strict=True)
    return model.eval()

"""Changed views of pictures that a seed gives again bit for bit, whatever batch they are made in.

What happens to picture i in draw d is a function of (seed, d, i) alone: its random numbers are a hash of these three
(splitmix64), and no step mixes pictures in a way that depends on the others of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lilliput.errors import UserError
from lilliput.training import Callback, History, State, train
from lilliput.workload import Batch

MIXES = ("none", "mixup", "cutmix")
TOP, LEFT, FLIP, ERASE, AREA, ASPECT, BOX_TOP, BOX_LEFT, PARTNER, SHARE, MIX_TOP, MIX_LEFT, ORIGINAL = range(13)
COLUMNS = 13  # random numbers of a view
SMALLEST, LARGEST = 0.02, 0.33  # share of the picture that erasing takes
_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Views:
    """What may be done to a picture: moved, mirrored, erased in a rectangle, mixed with another one."""

    padding: int = 4  # pixels that it is moved by at most; what comes in is as dark as its darkest point
    flip: bool = True
    erase: float = 0.0  # chance
    mix: str = "none"

    def of(self, x: Tensor, data: Any, indices: Tensor, draw: int, seed: int) -> Tensor:
        """(B, C, H, W): the views in one draw of pictures `x`, which are those at `indices` of a dataset."""
        u = uniforms(seed, draw, indices)
        x = self.changed(x, u)
        if self.mix == "none":
            return x
        partners = (u[:, PARTNER] * len(data)).long()
        other = self.changed(pictures_of(data, partners)[0], uniforms(seed, draw, partners))
        return (mixed if self.mix == "mixup" else pasted)(x, other, u)

    def changed(self, x: Tensor, u: Tensor) -> Tensor:
        """(B, C, H, W) pictures and (B, COLUMNS) random numbers -> moved, mirrored and erased ones."""
        x = moved(x, u, self.padding, self.flip)
        return erased(x, u, self.erase) if self.erase else x


def moved(x: Tensor, u: Tensor, padding: int, flip: bool) -> Tensor:
    """Each picture moved by up to `padding` pixels each way, and with `flip` mirrored half of the time."""
    channels, height, width = x.shape[1:]
    top, left = ((u[:, i] * (2 * padding + 1)).long() - padding for i in (TOP, LEFT))
    rows, columns = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
    if flip:
        columns = torch.where(u[:, FLIP, None] < 0.5, width - 1 - columns, columns)
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    found = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, channels, -1)).view_as(x)
    return torch.where(inside[:, None], found, x.amin((1, 2, 3), keepdim=True))


def _within(position: Tensor, size: int) -> Tensor:
    return (position >= 0) & (position < size)


def erased(x: Tensor, u: Tensor, chance: float) -> Tensor:
    """Zeros in a rectangle of 2 to 33 % of the picture and a shape from 1:3 to 3:1, with the given chance."""
    height, width = x.shape[-2:]
    area = (SMALLEST + (LARGEST - SMALLEST) * u[:, AREA]) * height * width
    tilt = 2 * u[:, ASPECT] - 1
    aspect = torch.where(tilt < 0, 1 / (1 - 2 * tilt), 1 + 2 * tilt)  # no power: its last bit depends on the batch
    tall = (area * aspect).sqrt().round().clamp(1, height)
    wide = (area / aspect).sqrt().round().clamp(1, width)
    top, left = (u[:, BOX_TOP] * (height - tall + 1)).floor(), (u[:, BOX_LEFT] * (width - wide + 1)).floor()
    box = _box(x, top, left, top + tall, left + wide) & (u[:, ERASE] < chance)[:, None, None, None]
    return torch.where(box, torch.zeros((), dtype=x.dtype), x)


def mixed(x: Tensor, other: Tensor, u: Tensor) -> Tensor:
    """Mixup: a weighted sum of two pictures, the weight uniform."""
    share = u[:, SHARE, None, None, None].to(x.dtype)
    return x * share + other * (1 - share)


def pasted(x: Tensor, other: Tensor, u: Tensor) -> Tensor:
    """Cutmix: a rectangle of the other picture, its area uniform but for what falls outside."""
    height, width = x.shape[-2:]
    side = (1 - u[:, SHARE]).sqrt()
    (top, bottom), (left, right) = (
        ((centre - side / 2) * size, (centre + side / 2) * size)
        for centre, size in ((u[:, MIX_TOP], height), (u[:, MIX_LEFT], width))
    )
    return torch.where(_box(x, top.round(), left.round(), bottom.round(), right.round()), other, x)


def _box(x: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """(B, 1, H, W): True inside each picture's rectangle."""
    rows, columns = torch.arange(x.shape[-2]), torch.arange(x.shape[-1])
    tall = (rows >= top[:, None]) & (rows < bottom[:, None])
    wide = (columns >= left[:, None]) & (columns < right[:, None])
    return (tall[:, :, None] & wide[:, None, :])[:, None]


def uniforms(seed: int, draw: int, indices: Tensor) -> Tensor:
    """(B, COLUMNS) numbers from 0 to 1, float64, of pictures `indices` (B,) in one draw."""
    start = _hash(_hash(np.array([seed], np.uint64)) ^ np.array([draw], np.uint64))
    each = _hash(start ^ indices.numpy().astype(np.uint64))
    bits = _hash(each[:, None] + np.arange(1, COLUMNS + 1, dtype=np.uint64) * _STEP)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _hash(z: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea and Flood, 2014), whose sums and products wrap around."""
    z = z + _STEP
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def pictures_of(data: Any, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) and labels (B,) of a map-style dataset of pairs (picture, label) or {"input", "label"}.

    Raises UserError for other items; pictures without a label get -1.
    """
    picks = indices.tolist()
    items = data.__getitems__(picks) if hasattr(data, "__getitems__") else [data[i] for i in picks]
    pairs = [(i["input"], i.get("label", -1)) if isinstance(i, dict) else (i[0], i[1]) for i in items]
    shapes = {tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__ for picture, _ in pairs}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3 or not pairs[0][0].is_floating_point():
        raise UserError(f"the dataset gives {sorted(map(str, shapes))}; give float pictures (C, H, W) of one size")
    return torch.stack([picture for picture, _ in pairs]), torch.tensor([int(label) for _, label in pairs])


# --- as a dataset ----------------------------------------------------------------------------------------------


class ViewedDataset(Dataset):
    """Another view of each picture of `data` in every epoch: items {"input", "label"}.

    `set_epoch` is called by accelerate and transformers' Trainer, by `learn_`, or by hand.
    """

    def __init__(self, data: Any, views: Views, seed: int = 0):
        self.data, self.views, self.seed, self.epoch = data, views, seed, 0

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def batch(self, indices: Tensor) -> Batch:
        """{"input" (B, C, H, W), "label" (B,)} of pictures `indices` (B,)."""
        plain, labels = pictures_of(self.data, indices)
        return {"input": self.views.of(plain, self.data, indices, self.epoch, self.seed), "label": labels}

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        batch = self.batch(torch.tensor(indices))
        return [{name: values[i] for name, values in batch.items()} for i in range(len(indices))]

    def learn_(
        self, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batch_size: int, seed: int, **options: Any
    ) -> History:
        """Train a model on batches of this dataset by `lilliput.training.train`, which takes the `options`."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return train(
            model, order.split(batch_size), lambda m, picks: loss(m, self.batch(picks)), clip_norm=1.0, seed=seed,
            callbacks=[EachEpoch(self)], **options,
        )  # fmt: skip


class EachEpoch(Callback):
    """Tells a dataset the epoch of `lilliput.training.train`."""

    def __init__(self, data: ViewedDataset):
        self.data = data

    def on_start(self, state: State) -> None:
        self.data.set_epoch(state.epoch)

    def on_epoch(self, state: State) -> None:
        self.data.set_epoch(state.epoch)

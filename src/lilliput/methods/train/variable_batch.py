"""Pictures of another size in every batch, and as many of them as keep the batch's number of pixels the same.

    b_t = max(1, round(H W b / (h_t w_t)))

Small pictures come in large batches: an epoch needs fewer steps, and memory stays flat. Pictures are resized batch by
batch, in the loader's workers where there are some.

    batches = VariableBatch(low=0.6, high=1.2).batches(dataset, (28, 28), batch_size=64)
    for x, y in batches.loader(num_workers=2): ...                     # a plain loop, epoch after epoch

    class Varied(Trainer):                                             # transformers
        def get_train_dataloader(self): return self.accelerator.prepare(batches.loader(collate=default_data_collator))

Paper: Mehta et al., CVNets: High Performance Library for Computer Vision, 2022 (arXiv 2206.02002). The paper draws a
size for every step; here each size comes equally often, in an order drawn by the seed, so that every epoch has the same
number of steps. The learning rate is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lilliput.errors import UserError
from lilliput.method import LABELLED, Facts, Settings, knob
from lilliput.methods.train._resumable import ResumableSampler, check_state, permutation

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class VariableBatch(Settings):
    """Train on several picture sizes with the same number of pixels per batch."""

    low: float = knob(0.6, low=0.05, high=1.0, help="smallest size as a share of the base size")
    high: float = knob(1.2, low=1.0, high=10.0, help="largest size as a share of the base size")
    sizes: int = knob(5, low=1, high=100, help="sizes from the smallest to the largest; the base size is always one")
    multiple: int = knob(4, low=1, high=256, help="sizes are rounded to multiples of this many pixels")
    varies: bool = knob(
        True, choices=(True, False), help="larger batches of smaller pictures; or always the same batch"
    )
    drop_last: bool = knob(
        False, choices=(False, True), help="leave out the last batch of an epoch when it is not full"
    )
    seed: int = knob(0, low=0, help="order of sizes and samples")
    facts: ClassVar[Facts] = Facts(stage="train", data=LABELLED, effect="fewer steps an epoch, several picture sizes")
    paper: ClassVar[str] = "cvnets_sampler"

    def batches(self, dataset: Any, base: Size, batch_size: int) -> VariableBatches:
        """A batch sampler over a data set of pictures, for batches of `batch_size` at the size `base` (H, W)."""
        return VariableBatches(self, dataset, base, batch_size)


@dataclass(frozen=True)
class SizedIndex:
    """One sample and the size that the pictures of its batch shall have."""

    index: int
    size: Size


class VariableBatches(ResumableSampler[list[SizedIndex]]):
    """A `batch_sampler` of torch's loader over `self.dataset`, with `sized_batch` as `collate_fn`: see `loader`."""

    def __init__(self, settings: VariableBatch, dataset: Any, base: Size, batch_size: int):
        super().__init__()
        self.settings, self.base, self.batch_size = settings, base, batch_size
        if batch_size < 1 or min(base) < 1 or len(dataset) < 1:
            raise UserError(
                f"{len(dataset)} samples, base size {base}, batch_size {batch_size}; all must be at least 1"
            )
        self.dataset, self.count = SizedDataset(dataset), len(dataset)
        self.table = {size: self._fitting(size) for size in picture_sizes(settings, base)}
        self.plan = epoch_plan(self.table, base, self.count, settings.drop_last)
        if not self.plan:
            raise UserError(
                f"{self.count} samples fill no batch of {self.table[base]}; set drop_last=False or smaller batches"
            )

    def __len__(self) -> int:
        return len(self.plan)

    def _fitting(self, size: Size) -> int:
        pixels = self.base[0] * self.base[1] * self.batch_size
        return max(1, round(pixels / (size[0] * size[1]))) if self.settings.varies else self.batch_size

    def order(self, epoch: int) -> list[list[SizedIndex]]:
        samples = permutation(self.settings.seed, 2 * epoch, self.count).tolist()
        batches, start = [], 0
        for place in permutation(self.settings.seed, 2 * epoch + 1, len(self.plan)).tolist():
            size, count = self.plan[place]
            batches.append([SizedIndex(i, size) for i in samples[start : start + count]])
            start += count
        return batches

    def state_dict(self, at: tuple[int, int] | None = None) -> dict[str, Any]:
        return super().state_dict(at) | {"samples": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(state["samples"], self.count, "samples")
        super().load_state_dict(state)

    def loader(self, collate: Callable[[list], Any] = default_collate, **options: Any) -> DataLoader:
        """torch's loader of these batches; `options` are its own, such as `num_workers`."""
        return DataLoader(self.dataset, batch_sampler=self, collate_fn=partial(sized_batch, collate=collate), **options)


class SizedDataset(Dataset):
    """A data set that is asked with `SizedIndex` and gives (sample, size); ordinary indices give the sample alone."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: SizedIndex | int) -> Any:
        if isinstance(index, SizedIndex):
            return self.dataset[index.index], index.size
        return self.dataset[index]


def sized_batch(samples: list[tuple[Any, Size]], collate: Callable[[list], Any] = default_collate) -> Any:
    """What `collate` makes of the samples, its pictures at the size that stands beside them."""
    return resized(collate([sample for sample, _ in samples]), samples[0][1])


def picture_sizes(settings: VariableBatch, base: Size) -> list[Size]:
    """The sizes, smallest first: evenly spaced shares of the base, rounded to multiples, and the base itself."""
    shares = torch.linspace(settings.low, settings.high, settings.sizes, dtype=torch.float64).tolist()
    step = settings.multiple
    scaled = {tuple(max(1, round(side * share / step)) * step for side in base) for share in shares}
    return sorted(scaled | {base})  # type: ignore[arg-type]


def epoch_plan(table: Mapping[Size, int], base: Size, count: int, drop_last: bool) -> list[tuple[Size, int]]:
    """(size, samples) of an epoch's batches: every size equally often, what is left at the base size."""
    rounds, left = divmod(count, sum(table.values()))
    plan = [(size, batch) for size, batch in table.items() for _ in range(rounds)]
    full, rest = divmod(left, table[base])
    plan += [(base, table[base])] * full
    return plan + ([(base, rest)] if rest and not drop_last else [])


def resized(batch: Any, size: Size) -> Any:
    """The batch with its pictures, float (B, C, H, W), at another size (bilinear, smoothed when they shrink).

    Raises UserError when there are none.
    """
    found: list[bool] = []

    def turned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: turned(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(turned(v) for v in value)
        if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
            return value
        found.append(True)
        same = tuple(value.shape[2:]) == size
        return value if same else F.interpolate(value, size, mode="bilinear", antialias=True)

    changed = turned(batch)
    if not found:
        raise UserError(
            "no part of the batch is a float tensor (B, C, H, W); give pictures of one size as float tensors"
        )
    return changed

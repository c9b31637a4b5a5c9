"""Samplers that know where they stand, so that a run that was killed goes on with what it would have seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lilliput.errors import UserError

T = TypeVar("T")


class ResumableSampler(Sampler[T]):
    """Yields the items of `order(epoch)`, one epoch per iteration; `epoch` and `position` say which item is next.

    An iteration that was broken off is continued by the next one. accelerate, and so transformers' Trainer, calls
    `set_epoch` before each epoch.
    """

    def __init__(self) -> None:
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        """Items of an epoch, the same for every one."""
        raise NotImplementedError

    def order(self, epoch: int) -> Sequence[T]:
        """Everything that one epoch yields. May look at the model, for it is asked when the epoch begins."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[T]:
        items = self.order(self.epoch)
        for item in items[self.position :]:
            self.position += 1
            if self.position == len(items):
                self.epoch, self.position = self.epoch + 1, 0
            yield item

    def set_epoch(self, epoch: int) -> None:
        """Stand at the beginning of an epoch."""
        self.epoch, self.position = epoch, 0

    def state_dict(self, at: tuple[int, int] | None = None) -> dict[str, Any]:
        """Tensors and plain values. `at` is (epoch, items of it that were used) as the loop counts them; it is needed
        when a loader's workers fetch ahead."""
        epoch, position = (self.epoch, self.position) if at is None else at
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        whole, self.position = divmod(int(state["position"]), len(self))
        self.epoch = int(state["epoch"]) + whole

    def for_trainer(self) -> Any:
        """A `transformers.TrainerCallback` that keeps this sampler's state in the Trainer's checkpoints."""
        from lilliput.methods.train._trainer_callback import KeptState

        return KeptState(self)


def permutation(seed: int, turn: int, count: int) -> Tensor:
    """A random order of `count` things, the same whenever it is asked for; torch's random state stays as it is."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))


def check_state(held: int, wanted: int, what: str) -> None:
    """Raises UserError when a stored state speaks of another number of samples."""
    if held != wanted:
        raise UserError(f"the stored state knows {held} {what}, here are {wanted}; restore it with the same data")

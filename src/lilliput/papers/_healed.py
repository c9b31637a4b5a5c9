"""What the experiments on converted language models share: healing, losses by window, bytes of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lilliput.methods.cache._cache import held_bytes
from lilliput.methods.distill.logits import Logits
from lilliput.metrics.memory import weight_bytes
from lilliput.paper import Row
from lilliput.papers._paired import advantage, mean_and_spread
from lilliput.workload import Workload

BATCH = 8


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int  # of distillation a contender
    seeds: int
    length: int = 128  # tokens of a window
    training_windows: int = 2048
    test_windows: int = 64


@dataclass
class Found:
    """What was measured of one contender: per seed the test losses of all windows, and figures."""

    unhealed: list[Tensor] = field(default_factory=list)  # nats per token of each window
    healed: list[Tensor] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    def by_window(self) -> Tensor:
        """(windows,): loss after healing, mean over seeds, in nats per token."""
        return torch.stack(self.healed).double().mean(0)

    def row(self, name: str) -> Row:
        """Means; the spread of the losses is over seeds, of a single one the standard error over windows."""
        values, spread = dict(self.values), {}
        for key, losses in (("unhealed", self.unhealed), ("healed", self.healed)):
            unit = f"{key}_nats_per_token"
            values[unit], spread[unit] = mean_and_spread(losses)
        return Row(name, values, spread)


def language_work(name: str, effort: Effort, seed: int) -> Workload:
    """A model of the zoo with training windows drawn by the seed; the other splits are fixed."""
    windows = {"training": effort.training_windows, "calibration": 32, "validation": 16, "test": effort.test_windows}
    work = Workload.from_name(name, length=effort.length, windows=windows)
    ids = torch.cat([batch["input_ids"] for batch in work.training or ()])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    work.training = [{"input_ids": part} for part in ids[order].split(BATCH)]
    return work


def note_original(found: dict[str, Found], name: str, work: Workload) -> None:
    """The unchanged model, which is there already and needs no healing."""
    note(found, name, work.model, work, work.values(work.model, "test"))


def heal(found: dict[str, Found], name: str, model: nn.Module, work: Workload, effort: Effort, seed: int) -> nn.Module:
    """Distil the original into a contender, note its losses before and after, and return it."""
    before = work.values(model, "test")
    model = Logits(steps=effort.steps, seed=seed).apply(model, work)
    note(found, name, model, work, before)
    return model


def note(found: dict[str, Found], name: str, model: nn.Module, work: Workload, before: Tensor) -> None:
    """Losses of a finished contender, the bytes of its weights and of its cache."""
    one = found.setdefault(name, Found())
    one.unhealed.append(before)
    one.healed.append(work.values(model, "test"))
    one.values |= {"cache_bytes_per_token": cache_bytes(model, work), "weight_bytes": float(weight_bytes(model))}


@torch.inference_mode()
def cache_bytes(model: nn.Module, work: Workload) -> float:
    """Bytes that transformers' cache holds after a test window, a token."""
    ids, cache = work.test[0]["input_ids"][:1], DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return held_bytes(cache) / ids.shape[1]


def margin(found: dict[str, Found], ours: str, other: str) -> tuple[float, float]:
    """Nats per token by which ours is better after healing, and the standard error over windows."""
    return advantage(found[ours].by_window(), found[other].by_window())


def clearly(difference: tuple[float, float]) -> bool:
    """Better by more than two standard errors."""
    return difference[0] > 2 * difference[1]


def matched(difference: tuple[float, float]) -> bool:
    """Not worse by more than two standard errors."""
    return difference[0] >= -2 * difference[1]


def close(difference: tuple[float, float], tolerated: float) -> bool:
    """Not worse by more than `tolerated`, even two standard errors below what was measured."""
    return difference[0] - 2 * difference[1] >= -tolerated


def said(difference: tuple[float, float], digits: int = 3) -> str:
    """A difference with its standard error."""
    return f"{difference[0]:+.{digits}f} ± {difference[1]:.{digits}f}"

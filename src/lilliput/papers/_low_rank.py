"""What the three low-rank experiments share: data, fine-tuning, scoring, and times taken in turn."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from lilliput.metrics.latency import Comparison, paired_ratio
from lilliput.paper import Row
from lilliput.papers._healed import close
from lilliput.papers._paired import advantage, mean_and_spread
from lilliput.runtimes import find_runtime
from lilliput.training import Callback, History, train
from lilliput.workload import Batch, Workload
from lilliput.zoo import images
from lilliput.zoo.images import Pictures

TOLERATED_POINTS = 3.0  # accuracy a claim of "about the same" may cost, two standard errors included


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int  # of fine-tuning per contender
    test_pictures: int
    rounds: int  # interleaved timings
    seeds: int
    batch_size: int = 64  # of training
    served_batch: int = 16  # pictures per served request


def pictures_work(model: nn.Module, seed: int, effort: Effort) -> Workload:
    """Fashion-MNIST: training pictures drawn by the seed, the first of the fixed calibration, validation and test."""
    splits = images.fashion_mnist()
    order = torch.randperm(len(splits["training"]), generator=torch.Generator().manual_seed(seed))
    training = _pick(splits["training"], order[: effort.steps * effort.batch_size])
    parts = {"calibration": splits["calibration"].first(256), "validation": splits["validation"].first(256)}
    parts["test"] = splits["test"].first(effort.test_pictures)
    served = splits["calibration"].first(effort.served_batch).batches(effort.served_batch)[0]
    batches = [list(part.batches(256)) for part in parts.values()]
    return Workload.classifier(
        model, *batches, training=list(training.batches(effort.batch_size)), example={"input": served["input"]}
    )


def _pick(pictures: Pictures, index: Tensor) -> Pictures:
    return Pictures(pictures.pixels[index], pictures.labels[index], pictures.prepare)


def fine_tune_(
    model: nn.Module,
    work: Workload,
    seed: int,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    callbacks: Iterable[Callback] = (),
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> History:
    """The one recipe all contenders get: AdamW at 1e-3, warm-up and cosine, gradient norm 1."""
    batches = list(work.training or ())
    limits = {"steps": steps, "seconds": seconds}
    return train(model, batches, loss or work.loss, lr=1e-3, clip_norm=1.0, callbacks=callbacks, seed=seed, **limits)


def served(model: nn.Module, work: Workload) -> Callable[[], object]:
    """One request of the example batch in OpenVINO, with the threads torch has."""
    session = find_runtime("openvino").prepare(model, work, threads=torch.get_num_threads())
    return lambda: session(work.example)


def training_steps(
    model: nn.Module, work: Workload, callbacks: Callable[[], list[Callback]] = list
) -> Callable[[], object]:
    """Two updates of a copy with learning rate 0: with a freezing period of one step, one of each kind."""
    model, batches = copy.deepcopy(model), list(work.training or ())[:2]
    return lambda: train(model, batches, work.loss, steps=2, lr=0.0, callbacks=callbacks())


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int, min_ms: float = 5.0) -> dict[str, list[float]]:
    """Name -> milliseconds of one run in each round; all are run in turn (ABAB), after one warm-up."""
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, round(min_ms / max(_ms(run, 1), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_ms(run, repeats[name]))
    return times


def _ms(run: Callable[[], object], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        run()
    return (perf_counter() - start) * 1e3 / repeats


def speedup(times: Mapping[str, list[float]], of: str, over: str) -> Comparison:
    """How many times faster `of` is than `over`, with its interval."""
    return paired_ratio(times[over], times[of])


def middle(times: list[float]) -> tuple[float, float]:
    """Median and interquartile range, milliseconds."""
    low, mid, high = statistics.quantiles(times, n=4)
    return mid, high - low


@dataclass
class Contender:
    """What was measured of one network over the seeds."""

    right: list[Tensor]  # per seed: 100 for each right answer, 0 for each wrong one
    values: dict[str, float]
    spread: dict[str, float]

    @property
    def accuracy(self) -> float:
        return statistics.mean(float(r.mean()) for r in self.right)

    def row(self, name: str) -> Row:
        """Accuracy with its spread over seeds, or its standard error when there is one seed, and what else is known."""
        mean, spread = mean_and_spread(self.right)
        return Row(name, {**self.values, "accuracy_percent": mean}, {**self.spread, "accuracy_percent": spread})


def difference(of: Contender, over: Contender) -> tuple[float, float]:
    """(points of accuracy `of` has more than `over`, standard error), paired by picture and seed."""
    return advantage(torch.cat(over.right), torch.cat(of.right))


def about_as_accurate(of: Contender, over: Contender) -> bool:
    """Not worse by TOLERATED_POINTS even two standard errors below what was measured."""
    return close(difference(of, over), TOLERATED_POINTS)


def setup(what: str, effort: Effort, seed: int, busy: float) -> str:
    """What was run, in words; `busy` is how many cores other work kept busy before the timings."""
    seeds = f"seed {seed}" if effort.seeds == 1 else f"seeds {seed} to {seed + effort.seeds - 1}"
    return (
        f"{what}; Fashion-MNIST, {effort.steps} steps of {effort.batch_size} pictures of fine-tuning, "
        f"{effort.test_pictures} test pictures, {seeds}; served by OpenVINO at batch {effort.served_batch}, "
        f"{torch.get_num_threads()} threads; other work kept {busy:.1f} cores busy"
    )


def weights(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def depth(model: nn.Module) -> int:
    """Number of convolutions and linear layers."""
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())

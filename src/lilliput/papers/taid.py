"""TAID: is a target that moves from the student's own answers to the teacher's better than the teacher's at once?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.methods.distill.logits import SoftLoss, distillation_loss
from lilliput.methods.distill.taid import Taid
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import BATCH, Effort, Found, clearly, language_work, margin, said
from lilliput.training import train
from lilliput.workload import Batch, Workload

paper = Paper(
    title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
    authors="Makoto Shing, Kou Misaki, Han Bao, Sho Yokoi, Takuya Akiba",
    year=2025,
    arxiv="2501.16937",
    claim="A small language model learns more from targets that move from its own distribution to the teacher's, as "
    "fast as the loss allows, than from the teacher's distribution by forward or reverse KL divergence.",
    methods=("distill.taid",),
)

OURS, LINEAR = "moving target, adaptive", "moving target, straight line"
FORWARD, REVERSE = "forward KL", "reverse KL"
KEPT = (0, 5)  # blocks of llama-tiny that the student keeps
RATES = (5e-4, 1e-3, 2e-3)
RISE = 4.0  # alpha times the steps: so that the adaptive part can be faster than the line in a short run


@dataclass(frozen=True)
class Taught:
    """A batch and the teacher's logits for it, in half precision."""

    batch: Batch
    logits: Tensor


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Students with two of llama-tiny's six blocks learn from llama-tiny, equally many steps on the same windows.

    Every loss gets the best of RATES by validation. Holds when the adaptive target's test loss is lower than that of
    forward and of reverse KL by more than two standard errors over windows (of the mean over seeds), and not above
    that of the straight line. `full` takes more steps.
    """
    effort = Effort(steps=240 if full else 48, seeds=3, length=96, training_windows=2048, test_windows=64)
    found: dict[str, Found] = {}
    rates = tuned(effort, seed + effort.seeds)
    for s in range(seed, seed + effort.seeds):
        work = language_work("llama-tiny", effort, s)
        batches = taught(work, effort.steps)
        before = work.values(student_of(work.model), "test")
        for name, loss in losses(effort.steps).items():
            student, seconds = learned(work, batches, loss(), rates[name], s)
            note(found, name, student, work, before)
            found[name].values |= {"learning_rate": rates[name], "training_seconds": seconds}
    gains = {name: margin(found, OURS, name) for name in (FORWARD, REVERSE, LINEAR)}
    text = ", ".join(f"{said(gain)} over {name}" for name, gain in gains.items())
    return Evidence(
        setup=f"llama-tiny as teacher, its blocks {KEPT} as student, State of the Union addresses, {effort.steps} "
        f"steps of {BATCH} windows of {effort.length} tokens, alpha {RISE:g} / steps, rate by validation of {RATES}, "
        f"{effort.test_windows} test windows, seeds {seed} to {seed + effort.seeds - 1}; {torch.get_num_threads()} "
        "threads, CPU",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(gains),
        figure=f"adaptive moving target, nats per token better: {text}",
        limits="A student of 1.2 million parameters cut from a teacher of 2.8 million, which leaves little of the gap "
        "that the paper speaks of; minutes of training, scored by the loss on held-out text and not by answers to "
        "instructions. alpha is raised so that the adaptive part matters in so few steps.",
    )


def judge(gains: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; gains are (nats per token by which ours is better, standard error)."""
    return clearly(gains[FORWARD]) and clearly(gains[REVERSE]) and gains[LINEAR][0] >= 0


def losses(steps: int) -> dict[str, Callable[[], SoftLoss]]:
    """A new loss for every run of a contender."""
    return {
        FORWARD: lambda: partial(distillation_loss, temperature=1.0),
        REVERSE: lambda: reverse_divergence,
        LINEAR: Taid(steps=steps, alpha=0.0).soft_loss,
        OURS: Taid(steps=steps, alpha=min(RISE / steps, 1.0)).soft_loss,
    }


def reverse_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), the mean over all leading dimensions, in nats."""
    s, t = (x.float().log_softmax(-1).flatten(0, -2) for x in (student, teacher))
    return F.kl_div(t, s, reduction="batchmean", log_target=True)


def student_of(model: nn.Module) -> nn.Module:
    """A copy with the blocks KEPT alone."""
    student = copy.deepcopy(model)
    student.model.layers = nn.ModuleList([student.model.layers[i] for i in KEPT])  # type: ignore[union-attr, index]
    student.config.num_hidden_layers = len(KEPT)  # type: ignore[union-attr]
    return student


@torch.no_grad()
def taught(work: Workload, steps: int) -> list[Taught]:
    """The batches of a run with the teacher's answers, which all contenders share."""
    batches = list(work.training or ())[:steps]
    return [Taught(batch, work.forward(work.model, batch).half()) for batch in batches]


def learned(
    work: Workload, batches: Sequence[Taught], loss: SoftLoss, rate: float, seed: int
) -> tuple[nn.Module, float]:
    """A student after one step on every batch, and the seconds without the teacher's."""
    student = student_of(work.model)

    def loss_fn(model: nn.Module, item: Taught) -> Tensor:
        return loss(work.forward(model, item.batch), item.logits.float())

    history = train(student, batches, loss_fn, steps=len(batches), lr=rate, clip_norm=1.0, seed=seed)
    return student.eval(), history.seconds


def tuned(effort: Effort, seed: int) -> dict[str, float]:
    """The best learning rate of every loss on validation windows, on a seed of its own and half of the steps."""
    work, steps = language_work("llama-tiny", replace(effort, test_windows=1), seed), max(effort.steps // 2, 2)
    batches = taught(work, steps)

    def score(loss: Callable[[], SoftLoss], rate: float) -> float:
        return mean(work.values(learned(work, batches, loss(), rate, seed)[0], "validation").tolist())

    return {name: min(RATES, key=partial(score, loss)) for name, loss in losses(steps).items()}


def note(found: dict[str, Found], name: str, model: nn.Module, work: Workload, before: Tensor) -> None:
    """Test losses of a finished student, and of the one that it began as."""
    one = found.setdefault(name, Found())
    one.unhealed.append(before)
    one.healed.append(work.values(model, "test"))

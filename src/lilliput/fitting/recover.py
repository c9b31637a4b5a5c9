"""Step 7: win back quality: by distillation from the original, between the structural steps and quantization, and by
making good the errors of rounding."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from lilliput.device import Device
from lilliput.method import STAGES
from lilliput.methods.distill.logits import Logits
from lilliput.methods.quantize.gptq import Gptq
from lilliput.methods.quantize.group import Group
from lilliput.plan import Plan, Step
from lilliput.workload import Workload

if TYPE_CHECKING:
    from lilliput.fitting.run import Job

HARD = 0.5  # share of the labels in the loss: on Fashion-MNIST worth 0.3 points
LR = 2e-3
TIMED_STEPS = (4, 24)  # the first ones are slower: products are prepared
SHORTEST_S = 20.0  # of recovery that is worth its preparation
COMPENSATION_S = 0.4  # per million parameters, at most


@cache
def bfloat16_pays() -> bool:
    """Whether this machine multiplies bfloat16 well faster than float32, by its measured peaks."""
    here = Device.here()
    return here.peak("bf16") > 1.5 * here.peak("fp32")


def recovering(plan: Plan, workload: Workload, **limits: float) -> Plan | None:
    """The plan with distillation (`steps` or `seconds`) before quantization; None without structural changes.

    Where the training data has labels, half of the loss is the workload's own.
    """
    before, after = parts_around_recovery(plan)
    distil = Logits(bfloat16=bfloat16_pays(), hard=HARD * labelled(workload), lr=LR, **limits)
    return Plan([*before, Step(distil), *after]) if before else None


def labelled(workload: Workload) -> bool:
    """Whether there is training data with labels."""
    return workload.training is not None and "label" in next(iter(workload.training), {})


def parts_around_recovery(plan: Plan) -> tuple[list[Step], list[Step]]:
    """Structural steps, and quantization with what comes after it; an earlier recovery is left out."""
    quantize = STAGES.index("quantize")
    steps = [s for s in plan.steps if not isinstance(s.method, Logits)]
    before = [s for s in steps if STAGES.index(s.method.facts.stage) < quantize]
    return before, [s for s in steps if s not in before]


def recover(workload: Workload, plan: Plan, seconds: float) -> tuple[Plan, nn.Module] | None:
    """Build the plan with about `seconds` of recovery; None when there is nothing to recover, no data or no time.

    A few steps are timed first: the plan then names a number of steps, so that it gives the same model anywhere.
    """
    few, more = (recovering(plan, workload, steps=steps) for steps in TIMED_STEPS)
    if few is None or more is None or workload.training is None or seconds < SHORTEST_S:
        return None
    with_few, with_more = _seconds(few, workload), _seconds(more, workload)
    per_step = max(with_more - with_few, 1e-3) / (TIMED_STEPS[1] - TIMED_STEPS[0])
    steps = TIMED_STEPS[0] + int((seconds - 2 * with_few - with_more) / per_step)
    longer = recovering(plan, workload, steps=steps) if steps > TIMED_STEPS[1] else None
    return (longer, longer.apply(workload)) if longer else None


def compensate(workload: Workload, plan: Plan, seconds: float) -> tuple[Plan, nn.Module] | None:
    """Build the plan with GPTQ where it rounds to groups: the same formats, each error made good by later columns.

    None when nothing is rounded to groups, or when the time is too short for it.
    """
    better = compensating(plan)
    needed = COMPENSATION_S * sum(p.numel() for p in workload.model.parameters()) / 1e6
    return (better, better.apply(workload)) if better and needed < seconds else None


def compensating(plan: Plan) -> Plan | None:
    """The plan with every `Group` replaced by `Gptq` of the same settings; None without any."""
    steps = [Step(compensated(s.method), s.layers) if isinstance(s.method, Group) else s for s in plan.steps]
    return Plan(steps) if steps != plan.steps else None


def compensated(method: Group) -> Gptq:
    """GPTQ in the format of plain rounding."""
    return Gptq(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})


def _seconds(plan: Plan, workload: Workload) -> float:
    """How long a plan takes to apply."""
    start = time.monotonic()
    plan.apply(workload)
    return time.monotonic() - start


@contextmanager
def all_cores() -> Iterator[None]:
    """Within the block torch uses every core this process may, whatever number of threads a measurement has set."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


RECOVERIES = {"making good the rounding": compensate, "recovering by distillation": recover}  # the short one first


def recovered(job: Job, plan: Plan, damage: float, seconds_left: Callable[[], float]) -> tuple[Plan, nn.Module | None]:
    """What became of a plan with some damage, and its model when one of the recoveries made it better."""
    model = None
    for text, attempt in RECOVERIES.items():
        job.progress.step(text)
        with all_cores():
            found = attempt(job.workload, plan, seconds_left())
        if found is not None and (better := job.damage_of(found[1])) < damage:
            (plan, model), damage = found, better
    return plan, model

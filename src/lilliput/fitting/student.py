"""Another way into a small budget: a student is cut out of the model to a shape that meets it, and learns from it.

Tried for a decoder when by prediction 4 bits in every layer do not meet the budget: then plans in place must go to
fewer bits and prune as well. One student is narrower, one narrower and shallower; each becomes as large as the budget
lets it be, by measurement, in 4 bits. The best plan in place and each student get equal shares of the time that is left
for recovery, and the validation data says which is handed over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from lilliput.budget import Budget
from lilliput.errors import UserError
from lilliput.fitting.build import key_of
from lilliput.fitting.decoder_space import FORMATS, DecoderSpace
from lilliput.fitting.recover import COMPENSATION_S, LR, SHORTEST_S, all_cores, bfloat16_pays, compensated
from lilliput.methods.distill.logits import Logits
from lilliput.methods.initialize._resize import Sizes, parent_sizes
from lilliput.methods.initialize.weight_selection import WeightSelection
from lilliput.methods.initialize.weight_subcloning import WeightSubcloning
from lilliput.methods.quantize.gptq import Gptq
from lilliput.methods.quantize.group import Group
from lilliput.plan import Plan, Step
from lilliput.workload import Workload

if TYPE_CHECKING:
    from lilliput.fitting.run import Job

FORMAT = "int4 g32"  # of a student's layers; where it is too large everywhere, a budget is strong
SAFETY = 0.03  # share of a limit kept free: a quick measurement errs by some percent
TRIES = 5  # shapes measured at most until one meets the budget
PILOT = 0.05  # share of the time in which steps are timed
SPARE = 0.95  # share of the time left that is filled with steps
Shape = Callable[[float, Sizes], dict[str, float]]  # share of each layer's sides, parent -> settings of the cut


def narrower(share: float, parent: Sizes) -> dict[str, float]:
    """All blocks, each with a share of features, heads and neurons."""
    return {
        "width": in_units(parent.width, share),
        "heads": share,
        "ffn": in_units(parent.ffn, share),
        "depth": 1.0,
    }


def smaller(share: float, parent: Sizes) -> dict[str, float]:
    """As many weights as the narrower one, with fewer and wider blocks."""
    side = share ** (2 / 3)  # two sides of each layer and the depth make share^2 together
    return narrower(side, parent) | {"depth": side}


SHAPES: dict[str, Shape] = {"student, narrower": narrower, "student, narrower and shallower": smaller}


def in_units(count: int, share: float) -> float:
    """The largest share of `count`, at most the given one, that keeps whole groups of 32, or of 8 where there are few;
    one group at least."""
    unit = 32 if count >= 128 else 8
    return min(count, max(unit, math.floor(share * count / unit) * unit)) / count


def slack(budget: Budget, costs: dict[str, float]) -> float:
    """The smallest limit over its cost, below 1 where one is exceeded; a part of each limit is kept free."""
    shares = [limit * (1 - SAFETY) / costs[key] for key, limit in budget.limits.items() if costs.get(key)]
    return min(shares, default=math.inf)


def wants_student(job: Job) -> bool:
    """Whether 4 bits everywhere do not meet the budget, and a student can be cut out, taught and timed here."""
    o, work = job.options, job.workload
    possible = o.recover and "prune" in o.families and job.device.measured and work.training is not None
    return possible and isinstance(job.space, DecoderSpace) and _four_bits_slack(job) < 1


def _four_bits_slack(job: Job) -> float:
    return slack(job.budget, job.predictor.costs(job.space.uniform({"*": FORMAT})))


def compare_students(job: Job) -> bool:
    """Give the best plan in place and each student equal time to recover, and note what became of each; whether there
    was something to compare.

    A student becomes a candidate; "recovered" in a candidate says that it had its time, its damage afterwards and the
    plan. Built models wait in `job.made`. A resumed run goes on with those that had no time yet.
    """
    if not wants_student(job) or job.seconds_left() < 2 * SHORTEST_S:
        return False
    best, taken_s = job.best(), list[float]()
    starts = starts_within(job, taken_s)
    check_s = max(taken_s, default=0.0)  # a taught student is measured once more
    seconds = job.seconds_left() / (1 + len(starts)) - check_s
    if not starts or seconds < SHORTEST_S:
        return False
    if "recovered" not in best:
        plan, model = job.recover(best, seconds)
        _note(job, best, plan, model, seconds)
    known = [c["name"] for c in job.run.candidates()]
    starts = {name: start for name, start in starts.items() if name not in known}
    for number, (name, start) in enumerate(starts.items()):
        job.progress.step(f"teaching a {name}")
        _teach(job, name, start, job.seconds_left() / (len(starts) - number) - check_s)
    return True


def starts_within(job: Job, taken_s: list[float]) -> dict[str, WeightSubcloning]:
    """Name -> cut, of each kind a large one whose measured costs meet the budget; none of a model that is not cut. The
    seconds of each measurement are appended to `taken_s`."""
    found: dict[str, WeightSubcloning] = {}
    for name, shape in SHAPES.items():
        job.progress.say(f"shape of a {name}")
        try:
            start = _start_within(job, shape, taken_s)
        except UserError as error:  # of models whose config has no such sizes
            job.progress.say(str(error))
            continue
        if start is not None and start not in found.values():
            found[name] = start
    return found


def _start_within(job: Job, shape: Shape, taken_s: list[float]) -> WeightSubcloning | None:
    parent = parent_sizes(job.workload.model, "a student")
    share = math.sqrt(_four_bits_slack(job))
    start, left = None, 0.0
    for _ in range(TRIES):
        settings = shape(share, parent)
        if start is None or settings != {key: getattr(start, key) for key in settings}:
            start, begin = WeightSubcloning(**settings), time.monotonic()
            left = slack(job.budget, _costs(job, settings))
            taken_s.append(time.monotonic() - begin)
        if left >= 1:
            return start
        share *= min(0.9, math.sqrt(left))
    return None


def _costs(job: Job, settings: dict[str, float]) -> dict[str, float]:
    """Measured costs of an untaught student of that shape, its layers rounded as they will be."""
    rounding = _rounding(job)
    plan = Plan([Step(WeightSelection(**settings)), *([Step(rounding)] if rounding else [])])
    with all_cores():
        model = plan.apply(job.light)
    return job.bench.quantities(model)


def _rounding(job: Job) -> Group | None:
    """How the layers of a student are stored; None where nothing may be quantized."""
    method = FORMATS[FORMAT]
    assert isinstance(method, Group)
    return method if "quantize" in job.options.families else None


def _note(job: Job, candidate: dict, plan: Plan, model: nn.Module, seconds: float) -> None:
    """Write a candidate with what it became, and keep the model."""
    damage = job.damage_of(model)
    recovered = {"damage": damage, "plan": plan.to_yaml(), "seconds": round(seconds, 1)}
    job.run.write(f"candidates/{key_of(candidate['plan'])}", candidate | {"recovered": recovered})
    job.made[candidate["number"]] = plan, model


def _teach(job: Job, name: str, start: WeightSubcloning, seconds: float) -> None:
    rounding = _rounding(job)
    with all_cores():
        found = taught(job.workload, start, compensated(rounding) if rounding else None, seconds)
    if found is not None:
        number = len(job.run.candidates()) + 1
        _note(job, job.bench.candidate(number, name, found[0], None, None, model=found[1]), *found, seconds)


def taught(
    work: Workload, start: WeightSubcloning, rounding: Gptq | None, seconds: float
) -> tuple[Plan, nn.Module] | None:
    """A student after about `seconds`: cut out, taught for as many steps as the time allows, rounded at the end.

    The plan names the number of steps, so that it gives the same model anywhere. None when the time is too short.
    """
    begin = time.monotonic()
    model = start.apply(work.model, work)
    weights = sum(p.numel() for p in model.parameters())
    to_round_s = COMPENSATION_S * weights / 1e6 if rounding else 0.0
    lesson = lesson_of(work, model, seconds - to_round_s - (time.monotonic() - begin))
    if lesson is None:
        return None
    model = lesson.apply(model, work)
    steps = [Step(start), Step(lesson), *([Step(rounding)] if rounding else [])]
    return Plan(steps), rounding.apply(model, work) if rounding else model


def lesson_of(work: Workload, student: nn.Module, seconds: float) -> Logits | None:
    """Distillation with as many steps as fit into `seconds`, timing a few included; None when only those do."""
    begin, lesson = time.monotonic(), Logits(bfloat16=bfloat16_pays(), lr=LR, steps=2)
    first_s = _seconds(lesson, work, student) / 2
    few = max(2, min(100, int(PILOT * seconds / max(first_s, 1e-6))))
    step_s = max(_seconds(lesson.with_(steps=few), work, student) / few, 1e-6)
    steps = int(SPARE * (seconds - (time.monotonic() - begin)) / step_s)
    return lesson.with_(steps=steps) if steps > few else None


def _seconds(lesson: Logits, work: Workload, student: nn.Module) -> float:
    start = time.monotonic()
    lesson.apply(student, work)
    return time.monotonic() - start

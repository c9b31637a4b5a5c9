"""Step 6: win back quality by distillation from the original, between the structural steps and quantization."""

from __future__ import annotations

import dataclasses

from torch import nn

from lilliput.method import STAGES
from lilliput.methods.distill.logits import Logits
from lilliput.plan import Plan, Step
from lilliput.workload import Workload


def recovering(plan: Plan, seconds: float) -> Plan | None:
    """The plan with a distillation step before quantization; None when nothing structural was changed or no time is left."""
    quantize = STAGES.index("quantize")
    before = [s for s in plan.steps if STAGES.index(s.method.facts.stage) < quantize]
    after = [s for s in plan.steps if s not in before]
    if not before or seconds < 5:
        return None
    return Plan([*before, Step(Logits(seconds=seconds)), *after])


def recover(workload: Workload, plan: Plan, seconds: float) -> tuple[Plan, nn.Module] | None:
    """Build the plan with recovery for at most `seconds`; None when there is nothing to recover or no training data."""
    longer = recovering(plan, seconds)
    if longer is None or workload.training is None:
        return None
    return longer, longer.apply(dataclasses.replace(workload))

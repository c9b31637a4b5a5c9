"""Step 6: win back quality by distillation from the original, between the structural steps and quantization."""

from __future__ import annotations

from torch import nn

from lilliput.method import STAGES
from lilliput.methods.distill.logits import Logits
from lilliput.plan import Plan, Step
from lilliput.workload import Workload


def recovering(plan: Plan, **limits: float) -> Plan | None:
    """The plan with distillation (`steps` or `seconds`) before quantization; None without structural changes."""
    quantize = STAGES.index("quantize")
    steps = [s for s in plan.steps if not isinstance(s.method, Logits)]
    before = [s for s in steps if STAGES.index(s.method.facts.stage) < quantize]
    after = [s for s in steps if s not in before]
    return Plan([*before, Step(Logits(**limits)), *after]) if before else None


def recover(workload: Workload, plan: Plan, seconds: float) -> tuple[Plan, nn.Module] | None:
    """Build the plan with recovery for `seconds`; None when there is nothing to recover, no data or no time."""
    longer = recovering(plan, steps=1_000_000, seconds=seconds) if seconds >= 5 else None
    if longer is None or workload.training is None:
        return None
    return longer, longer.apply(workload)

"""Step 5: build a candidate for real, time it on the serving runtime, and score it on the validation data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from torch import nn

from lilliput.device import Device
from lilliput.fitting.judge import Judge
from lilliput.fitting.recover import recovering
from lilliput.fitting.space import Genome, Space
from lilliput.measuring import Measured, measure_speed, modelled_energy
from lilliput.metrics.memory import weight_bytes
from lilliput.metrics.size import state_bytes
from lilliput.plan import Plan
from lilliput.runtimes import Runtime
from lilliput.workload import Workload


@dataclass
class Bench:
    """What every candidate is measured with. `modelled` quantities come from the space, the device is not at hand."""

    workload: Workload
    runtime: Runtime
    threads: int
    judge: Judge
    original: Mapping[str, float]
    device: Device
    modelled: tuple[str, ...] = ()
    heal_steps: int = 0  # of distillation for a candidate whose structure changed, before it is judged

    def quantities(
        self, model: nn.Module, space: Space | None = None, genome: Genome | None = None
    ) -> dict[str, float]:
        """Speed, memory and size of a built model.

        Memory is the original's fresh-process peak less the weights saved; verify measures the final one afresh.
        """
        result = Measured(self.runtime.name, self.threads, {})
        session = self.runtime.prepare(model, self.workload, self.threads)
        measure_speed(self.workload, session, result, quick=True)
        saved = weight_bytes(self.workload.model) - weight_bytes(model)
        result.values["memory_bytes"] = self.original["memory_bytes"] - saved
        result.values["size_bytes"] = float(state_bytes(model.state_dict()))
        ms = result.values.get("token_ms", result.values.get("latency_ms", 0.0))
        result.values["energy_j"] = modelled_energy(self.workload, model, self.device, ms)
        if space is not None and genome is not None:
            costs = space.costs(genome)
            result.values |= {k: costs[k] for k in self.modelled if k in costs}
        return result.values

    def candidate(
        self, number: int, name: str, plan: Plan, space: Space | None, genome: Genome | None
    ) -> dict[str, Any]:
        """Build, measure and score one plan; everything a record keeps of it."""
        plan = recovering(plan, steps=self.heal_steps) or plan if self.heal_steps else plan
        model = plan.apply(self.workload)
        measured = self.quantities(model, space, genome)
        subject = model
        if self.workload.kind != "causal_lm":
            subject = self.runtime.prepare(model, self.workload, self.threads)
        verdict = self.judge.judge(subject)
        return {
            "number": number,
            "name": name,
            "plan": plan.to_yaml(),
            "genome": list(genome) if genome else None,
            "labels": space.labels(genome) if space and genome else {},
            "heat": space.heat(genome) if space and genome else [],
            "measured": measured | {"drop": verdict.drop},
            "damage": verdict.damage,
            "score": vars(verdict.score),
        }


def key_of(plan: Plan) -> str:
    """A short name for the file of a candidate."""
    return sha256(plan.to_yaml().encode()).hexdigest()[:12]

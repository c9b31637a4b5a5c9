"""Step 5: build a candidate for real, time it on the serving runtime, and score it on the validation data."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from lilliput.anatomy import anatomy
from lilliput.artifact import save
from lilliput.device import Device
from lilliput.fitting.judge import Judge
from lilliput.fitting.recover import all_cores, recovering
from lilliput.fitting.space import Genome, Space
from lilliput.measuring import (
    Measured,
    compare_behind,
    compare_copies,
    compare_drafting,
    fresh_process_memory,
    measure_speed,
    modelled_energy,
)
from lilliput.method import CachePolicy, Decoder
from lilliput.metrics.latency import Comparison
from lilliput.metrics.memory import weight_bytes
from lilliput.metrics.size import state_bytes
from lilliput.plan import Plan
from lilliput.runtimes import Runtime
from lilliput.served import Drafting, Setting, prepare
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
    memory_offset: float = 0.0  # bytes a fresh process needs beyond the original's less the weights saved
    reference: Any = None  # the original's session, where all are timed behind a context

    def quantities(
        self, model: nn.Module, space: Space | None = None, genome: Genome | None = None
    ) -> dict[str, float]:
        """Speed, memory and size of a built model.

        Memory is estimated from the weights; verify measures the final one in a fresh process.
        """
        values, _ = self.speed(model)
        values["memory_bytes"] = self.memory(model)
        values["size_bytes"] = float(state_bytes(model.state_dict()))
        ms = values.get("token_ms", values.get("latency_ms", 0.0))
        values["energy_j"] = modelled_energy(self.workload, model, self.device, ms)
        if space is not None and genome is not None:
            costs = space.costs(genome)
            values |= {k: costs[k] for k in self.modelled if k in costs}
        return values

    def speed(self, model: nn.Module, rounds: int = 6, setting: Setting = None) -> tuple[dict[str, float], Comparison]:
        """Times of a model, as it is served, and how much faster than the original it is.

        Both are timed in turn, and the model's time is the original's, as measured at first, over that ratio: a machine
        that became slower or faster since then changes nothing. What drafts add is seen on prompts of their own.
        """
        result = Measured(self.runtime.name, self.threads, {})
        policy = setting if isinstance(setting, CachePolicy) else None
        session = prepare(self.runtime, model, self.workload, self.threads, policy)
        if self.reference is not None:
            comparison, first_ms = compare_behind(self.workload, self.reference, session, rounds)
            result.values["first_token_ms"] = first_ms
        else:
            original = self.runtime.prepare(self.workload.model, self.workload, self.threads)
            measure_speed(self.workload, session, result, quick=True)
            comparison = compare_copies(self.workload, original, session, rounds)
        if isinstance(setting, Decoder):
            comparison = _both(comparison, compare_drafting(self.workload, Drafting(session, setting))[0])
        key = "token_ms" if "first_token_ms" in result.values else "latency_ms"
        result.values[key] = self.original[key] / comparison.ratio
        return result.values, comparison

    def memory(self, model: nn.Module) -> float:
        """The original's peak in a fresh process less the bytes of weights saved, and with a context less the keys and
        values of dropped blocks, moved by the offset."""
        saved = weight_bytes(self.workload.model) - weight_bytes(model)
        if self.reference is not None:
            blocks, left = (len(anatomy(m).blocks) for m in (self.workload.model, model))
            saved += self.reference.cache_bytes * (blocks - left) / blocks
        return self.original["memory_bytes"] - saved + self.memory_offset

    def memory_offset_of(self, model: nn.Module) -> float:
        """What a fresh process that loads and runs `model` takes beyond the estimate."""
        self.runtime.prepare(model, self.workload, self.threads)(self.workload.short_example)  # lays out packed weights
        return self.fresh_memory(model) - self.memory(model)

    def fresh_memory(self, model: nn.Module, setting: Setting = None) -> float:
        """Peak bytes of a fresh process that serves `model` with a setting."""
        with tempfile.TemporaryDirectory() as folder:
            path = save(model, Path(folder) / "model", self.workload, Plan(serving=setting))
            return float(fresh_process_memory(path, self.runtime.name, self.threads))

    def candidate(
        self,
        number: int,
        name: str,
        plan: Plan,
        space: Space | None,
        genome: Genome | None,
        predicted: Mapping[str, float] | None = None,
        model: nn.Module | None = None,
    ) -> dict[str, Any]:
        """Build, measure and score one plan; everything a record keeps of it. A `model` that is given is built."""
        if model is None:
            plan = recovering(plan, self.workload, steps=self.heal_steps) or plan if self.heal_steps else plan
            with all_cores():
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
            "damage_error": verdict.error,
            "score": vars(verdict.score),
            "predicted": dict(predicted or {}),
        }


def _both(a: Comparison, b: Comparison) -> Comparison:
    """What two gains give together; the interval is wider than it need be."""
    medians = (a.medians_ms[0], a.medians_ms[1] / b.ratio)
    return Comparison(a.ratio * b.ratio, a.low * b.low, a.high * b.high, medians, min(a.rounds, b.rounds))


def key_of(plan: Plan | str) -> str:
    """A short name for the file of a candidate, from its plan or the plan's text."""
    text = plan if isinstance(plan, str) else plan.to_yaml()
    return sha256(text.encode()).hexdigest()[:12]

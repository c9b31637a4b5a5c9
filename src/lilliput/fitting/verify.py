"""Step 7: the chosen model on untouched test data, in a fresh process, and against the original side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lilliput.auditing import quick_audits
from lilliput.budget import Budget
from lilliput.fitting.build import Bench
from lilliput.fitting.policies import under_policy
from lilliput.measuring import artifact_bytes, fresh_process_memory
from lilliput.method import CachePolicy
from lilliput.methods.audit._answers import answers
from lilliput.metrics import latency, quality
from lilliput.served import Setting, attention_as_before
from lilliput.workload import Workload


def prove(
    bench: Bench, model: nn.Module, artifact: Path, quantities: dict[str, float], setting: Setting = None
) -> dict[str, Any]:
    """Times side by side with the original, as the artifact is served, memory of a fresh process, bytes on disk; no
    quality yet."""
    load = latency.wait_until_quiet()
    with attention_as_before(model):
        taken, comparison = bench.speed(model, rounds=12, setting=setting)
    measured = quantities | {k: v for k, v in taken.items() if k not in bench.modelled}
    if bench.workload.source:
        measured["memory_bytes"] = float(fresh_process_memory(artifact, bench.runtime.name, bench.threads))
    measured["size_bytes"] = float(artifact_bytes(artifact))
    return {
        "measured": measured,
        "speedup": {"ratio": comparison.ratio, "low": comparison.low, "high": comparison.high, "gain": comparison.gain},
        "busy_cores": load,
    }


def verify(
    bench: Bench, model: nn.Module, proof: dict[str, Any], budget: Budget, setting: Setting = None
) -> dict[str, Any]:
    """The proof with the damage on the test split, looked at once, that of a cache policy included; `budget` is judged
    on these numbers alone."""
    work = bench.workload
    sessions = (bench.runtime.prepare(m, work, bench.threads) for m in (work.model, model))
    found = damage_report(work, *sessions, model)
    if isinstance(setting, CachePolicy):
        with attention_as_before(model):
            found = under_policy(found, work, model, setting)
    measured = proof["measured"] | {"drop": found["drop"]}
    return proof | found | {"measured": measured, "violations": budget.violations(measured)}


def damage_report(work: Workload, original: Any, fitted: Any, model: nn.Module) -> dict[str, Any]:
    """Score with spread on the test split, paired difference, and what the audits find in the answers.

    Language models are scored as modules, all others as their sessions.
    """
    if work.kind == "causal_lm":
        original, fitted = work.model, model
    before, after = (answers(work, m) for m in (original, fitted))
    scores = [work.summarize(a.values) for a in (before, after)]
    difference = quality.paired_difference(before.values, after.values)
    return {
        "score_before": vars(scores[0]),
        "score_after": vars(scores[1]),
        "drop": work.metric.drop(scores[0].value, scores[1].value),
        "difference": {"mean": difference.mean, "low": difference.low, "high": difference.high},
        "audits": quick_audits(work, before, after, model).to_json(),
    }

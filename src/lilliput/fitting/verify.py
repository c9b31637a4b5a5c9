"""Step 7: the chosen model on untouched test data, in a fresh process, and against the original side by side."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lilliput.budget import Budget
from lilliput.fitting.build import Bench
from lilliput.measuring import NEW_TOKENS, artifact_bytes, fresh_process_memory
from lilliput.metrics import latency, quality
from lilliput.workload import Workload

FLIP_BATCHES = 8


def verify(
    bench: Bench, model: nn.Module, artifact: Path, budget: Budget, quantities: dict[str, float]
) -> dict[str, Any]:
    """Everything the report says of the final model; `budget` is judged on these numbers alone."""
    work = bench.workload
    original, fitted = (bench.runtime.prepare(m, work, bench.threads) for m in (work.model, model))
    measured = dict(quantities)
    load = latency.wait_until_quiet()
    comparison = compare_speed(work, original, fitted)
    if work.kind == "causal_lm":
        taken = latency.measure_generation(lambda: fitted.generate(work.example["input_ids"], NEW_TOKENS), NEW_TOKENS)  # type: ignore[attr-defined]
        fresh = {"first_token_ms": taken.first_token_ms, "token_ms": taken.token_ms}
    else:
        fresh = {"latency_ms": latency.measure(lambda: fitted(work.example)).median_ms}
    measured |= {k: v for k, v in fresh.items() if k not in bench.modelled}
    if work.source:
        measured["memory_bytes"] = float(fresh_process_memory(artifact, bench.runtime.name, bench.threads))
    measured["size_bytes"] = float(artifact_bytes(artifact))
    found = damage_report(work, original, fitted, model)
    measured["drop"] = found["drop"]
    return {
        "measured": measured,
        "violations": budget.violations(measured),
        "speedup": {"ratio": comparison.ratio, "low": comparison.low, "high": comparison.high, "gain": comparison.gain},
        "busy_cores": load,
        **found,
    }


def compare_speed(work: Workload, original: Any, fitted: Any) -> latency.Comparison:
    """The original against the fitted model, interleaved in this process (ABAB)."""
    if work.kind != "causal_lm":
        return latency.compare(lambda: original(work.example), lambda: fitted(work.example))
    ids = work.example["input_ids"][:, :4]

    def tokens(session):
        return lambda: list(islice(session.generate(ids, 6), 6))

    return latency.compare(tokens(original), tokens(fitted), rounds=9)


@torch.inference_mode()
def damage_report(work: Workload, original: Any, fitted: Any, model: nn.Module) -> dict[str, Any]:
    """Score with spread on the test split, paired difference, changed answers, calibration, classes."""
    if work.kind == "causal_lm":
        original, fitted = work.model, model
    values = [work.values(m, "test") for m in (original, fitted)]
    scores = [work.summarize(v) for v in values]
    difference = quality.paired_difference(values[0], values[1])
    report: dict[str, Any] = {
        "score_before": vars(scores[0]),
        "score_after": vars(scores[1]),
        "drop": work.metric.drop(scores[0].value, scores[1].value),
        "difference": {"mean": difference.mean, "low": difference.low, "high": difference.high},
    }
    logits = [[], []]
    for batch in list(work.test)[: FLIP_BATCHES if work.kind == "causal_lm" else None]:
        for store, m in zip(logits, (original, fitted)):
            out = work.forward(m, batch)
            store.append(out.argmax(-1).flatten() if work.kind == "causal_lm" else out)
    before, after = (torch.cat(x) for x in logits)
    if work.kind == "causal_lm":
        report["changed_tokens"] = quality.changed_tokens(before, after)
        return report
    labels = torch.cat([b["label"] for b in work.test])
    report["flipped"] = quality.flipped_answers(before, after)
    report["calibration"] = [quality.calibration_error(x, labels) for x in (before, after)]
    report["classes"] = [vars(c) for c in quality.class_changes(before, after, labels)]
    return report

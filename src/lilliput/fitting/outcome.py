"""What a fit returns and leaves in its record: the request, every candidate, the chosen one and how well costs were
predicted."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lilliput.artifact import save
from lilliput.fitting.layers import bytes_by_part
from lilliput.fitting.predict import left_out, left_out_timed, rank_correlation
from lilliput.fitting.record import summary
from lilliput.fitting.request import facts_of
from lilliput.plan import Plan, read_serving
from lilliput.served import label
from lilliput.workload import Workload

if TYPE_CHECKING:
    from lilliput.fitting.run import Job

SHOWN = 400  # searched genomes at most, for the picture of the front
TIMES = ("token_ms", "latency_ms")


@dataclass
class Fitted:
    """What `fit` returns: the model, the plan that makes it, and everything that was measured on the way."""

    model: nn.Module
    plan: Plan
    workload: Workload
    folder: Path
    record: dict[str, Any] = field(repr=False)

    @property
    def met(self) -> bool:
        """Whether the budget holds on the verified numbers."""
        return not self.record["verify"]["violations"]

    def save(self, folder: str | Path) -> Path:
        """Write the artifact somewhere else too."""
        return save(self.model, folder, self.workload, self.plan, facts_of(self.record["request"]))

    def summary(self) -> str:
        """One line: what was asked, what came out, what it cost."""
        return summary(self.record)


def outcome(job: Job, best: dict[str, Any], plan: Plan, checked: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The record of a job whose candidate `best` became `model` by `plan`."""
    built = job.run.candidates()
    for c, (costs, damage) in zip([c for c in built if c["genome"]], left_out(job.space, job.samples(), job.timed)[1:]):
        c["predicted"] = costs | {"damage": damage}
    job.learn()
    return {
        "request": job.run.read("request"),
        "budget": str(job.budget),
        "limits": job.budget.limits,
        "original": job.original.to_json(),
        "candidates": built,
        "chosen": best["number"],
        "plan": plan.to_yaml(),
        "verify": checked,
        "serving": {
            "rows": job.serving_rows,
            "chosen": best.get("serving"),
            "label": label(read_serving(best.get("serving"))),
        },
        "front": _front(job),
        "layers": bytes_by_part(job.workload.model, model, best["labels"], _layer_ms(job, best)),
        "heat": best["heat"],
        "predictors": _predictors(job, [c for c in built if c.get("predicted")]),
        "seconds": job.timings,
        "runtime": job.runtime.name,
        "threads": job.threads,
        "modelled": list(job.bench.modelled),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _predictors(job: Job, built: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations of what was predicted and measured: of all settings that were timed and quickly judged, or else
    of the candidates."""
    pairs = [(c["predicted"], c["measured"] | {"damage": c["damage"]}) for c in built]
    quick = {genome: seen for genome, seen in job.timed.items() if "damage" in seen}
    if quick:
        unseen = left_out_timed(job.space, job.samples(), quick)
        pairs = [(costs | {"damage": damage}, seen) for (costs, damage), seen in zip(unseen, quick.values())]
    key = next((k for k in TIMES if pairs and k in pairs[0][1]), "size_bytes")
    times, damages = ([(p.get(k, 0.0), m[k]) for p, m in pairs] for k in (key, "damage"))
    return {
        "latency_rank_correlation": rank_correlation(*zip(*times)) if pairs else None,
        "damage_rank_correlation": rank_correlation(*zip(*damages)) if pairs else None,
        "settings": len(pairs),
        "built": len(built),
    }


def _layer_ms(job: Job, best: dict[str, Any]) -> list[dict[str, float]] | None:
    """Milliseconds by layer before and after, from a space that knows them."""
    if not hasattr(job.space, "layer_ms") or not best["genome"]:
        return None
    factors = job.predictor.coefficients.get("token_ms", {})
    genomes = (0,) * len(best["genome"]), tuple(best["genome"])
    return [job.space.layer_ms(g, factors) for g in genomes]  # type: ignore[attr-defined]


def _front(job: Job) -> list[dict[str, float]]:
    """Predicted costs and damage of searched genomes."""
    step = max(1, len(job.trials) // SHOWN)
    return [job.predictor.costs(g) | {"damage": job.predictor.damage(g)} for g in job.trials[::step]]

"""How much worse a candidate is than the original on the validation data: one pass, paired with the original's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.errors import UserError
from lilliput.workload import Score, Workload


@dataclass
class Verdict:
    """Increase of the loss (nats) with its standard error, the candidate's score, and its relative drop."""

    damage: float
    error: float
    score: Score
    drop: float


class Judge:
    """Holds the original's answers on one split.

    The loss is the metric's own for language models (nats per token), and for all others the Kullback-Leibler
    divergence of the original's classes from the candidate's.
    """

    def __init__(self, workload: Workload, split: str = "validation"):
        self.workload, self.split = workload, split
        self.values, self.logits = self._run(workload.model.eval())
        self.score = workload.summarize(self.values)

    @torch.inference_mode()
    def _run(self, model) -> tuple[Tensor, list[Tensor]]:
        w = self.workload
        if w.kind == "causal_lm":
            return w.values(model, self.split), []
        values, logits = [], []
        for batch in getattr(w, self.split):
            out = w.forward(model, batch)
            values.append(w.metric.per_sample(out, batch))
            logits.append(out.float().log_softmax(-1))
        found = torch.cat(values)
        if not torch.isfinite(found).all():
            raise UserError(
                f"{w.metric.name} is not a finite number on some {self.split} samples; check model and data"
            )
        return found, logits

    def judge(self, model) -> Verdict:
        """Damage, score and drop of a model or session."""
        values, logits = self._run(model)
        if logits:
            pairs = zip(self.logits, logits)
            divergences = [
                F.kl_div(new, old, log_target=True, reduction="none").sum(-1).flatten() for old, new in pairs
            ]
            worse = torch.cat(divergences)
        else:
            worse = values - self.values
        error = float(worse.std()) / len(worse) ** 0.5 if len(worse) > 1 else 0.0
        score = self.workload.summarize(values)
        return Verdict(float(worse.mean()), error, score, self.workload.metric.drop(self.score.value, score.value))

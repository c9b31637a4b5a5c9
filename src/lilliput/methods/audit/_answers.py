"""What a model answers on a split, taken once for all audits that need no more than that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import Audit, Findings
from lilliput.workload import Batch, Workload, is_input


@dataclass(frozen=True)
class Answers:
    """`values` (n,) are the metric's numbers; `logits` (n, classes) are a classifier's, `tokens` the likeliest next
    tokens of a language model, a tensor (B, T) per batch. `groups` maps a name to the group (n,) of each sample."""

    values: Tensor
    logits: Tensor | None = None
    tokens: tuple[Tensor, ...] = ()
    labels: Tensor | None = None
    groups: dict[str, Tensor] = field(default_factory=dict)

    def of_classes(self) -> tuple[Tensor, Tensor]:
        """(logits, labels). Raises UserError when they cannot be judged class by class."""
        if self.logits is None or self.labels is None:
            raise UserError("the answers have no logits or no labels; use a classifier with labelled data")
        if self.logits.ndim != 2 or self.logits.shape[1] < 2:
            raise UserError(f"the logits have the shape {tuple(self.logits.shape)}; give (n, classes), two or more")
        return self.logits, self.labels

    def right(self) -> Tensor:
        """(n,) 1 where the answer is the label, else 0."""
        logits, labels = self.of_classes()
        return (logits.argmax(-1) == labels).double()


Given = tuple[Answers, Answers]  # before and after


def ready(model: Any) -> AbstractContextManager[None]:
    """A module in evaluation mode; a session is ready as it is."""
    return evaluating(model) if isinstance(model, nn.Module) else nullcontext()


@torch.inference_mode()
def answers(workload: Workload, model: Any, split: str = "test") -> Answers:
    """Run a module or a session over a split. Raises UserError for an empty split and numbers that are not finite."""
    values, outputs, beside = [], [], defaultdict(list)
    text = workload.kind == "causal_lm"
    with ready(model):
        for batch in getattr(workload, split):
            logits = workload.forward(model, batch)
            values.append(workload.metric.per_sample(logits, batch))
            outputs.append(logits.argmax(-1) if text else logits)
            for key in (k for k in batch if not is_input(k)):
                beside[key].append(batch[key])
    _check(workload, torch.cat(values), split)
    labels = torch.cat(beside.pop("label")) if "label" in beside else None
    groups = {key.partition(".")[2] or key: torch.cat(parts) for key, parts in beside.items()}
    if text:
        return Answers(torch.cat(values), None, tuple(outputs), labels, groups)
    return Answers(torch.cat(values), torch.cat(outputs), (), labels, groups)


def first_samples(batches: Iterable[Batch], count: int, split: str) -> list[Batch]:
    """Batches of at most `count` samples in all. Raises UserError when there is none."""
    found: list[Batch] = []
    for batch in batches:
        found.append({k: v[:count] for k, v in batch.items()})
        count -= len(next(iter(batch.values())))
        if count <= 0:
            break
    found = [b for b in found if len(next(iter(b.values())))]
    if not found:
        raise UserError(f"the {split} data holds no sample; give at least one")
    return found


def _check(workload: Workload, values: Tensor, split: str) -> None:
    if not len(values):
        raise UserError(f"workload {workload.name!r}: the {split} data holds no sample; give at least one")
    if not torch.isfinite(values).all():
        raise UserError(
            f"{workload.metric.name} is not a finite number on some {split} samples; look at the fitted model's plan"
        )


@dataclass(frozen=True)
class AnswersAudit(Audit):
    """An audit of answers to the test split, which several audits may share: `given` are (before, after)."""

    def supports(self, workload: Workload, model: Any) -> list[str]:
        """Classifiers with labels; language models where a subclass says so."""
        if workload.kind == "causal_lm":
            return ["it judges classifiers; use audit.language"]
        return [] if "label" in workload.test[0] else ["its test data has no labels; add `label` to the batches"]

    def check(self, workload: Workload, before: Any, after: Any, given: Given | None = None) -> Findings:
        """Compare the answers on the test split, taken now unless they are given."""
        self.require(workload, after)
        return self.compare(*(given or (answers(workload, before), answers(workload, after))))

    def compare(self, before: Answers, after: Answers) -> Findings:
        """Compare answers to the same samples in the same order."""
        raise NotImplementedError

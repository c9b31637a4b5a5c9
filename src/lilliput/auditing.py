"""What a change did to a model beyond its score: every audit that its workload allows, or those that are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import HARM, NONE, Audit, Findings, find_method, method_names
from lilliput.methods.audit._answers import Answers, AnswersAudit, Given, answers
from lilliput.workload import Workload


@dataclass(frozen=True)
class Audited:
    """The findings of each audit, and why others could not be made."""

    findings: list[Findings]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def harmed(self) -> bool:
        """Whether any audit found harm."""
        return any(f.verdict == HARM for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"harmed": self.harmed, "findings": [f.to_json() for f in self.findings], "skipped": self.skipped}

    def __str__(self) -> str:
        skipped = [f"{name}: not made, {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*map(str, self.findings), *skipped])


def audit(workload: Workload, model: nn.Module, audits: Sequence[Audit | str] | None = None) -> Audited:
    """Compare `model` with the workload's own on its test data.

    Without `audits` (objects with settings, or names) all are made that the workload allows. Raises UserError when a
    named one cannot be made, and when the two models answer in different shapes.
    """
    _check_alike(workload, model)

    @cache
    def taken() -> Given:
        return answers(workload, workload.model), answers(workload, model)

    def made(one: Audit) -> Findings:
        return _made(one, workload, model, taken)

    if audits is None:
        return _all(every_audit(), made)
    return Audited([made(find_audit(a) if isinstance(a, str) else a) for a in audits])


def quick_audits(workload: Workload, before: Answers, after: Answers, model: nn.Module) -> Audited:
    """The audits that need answers already given, or no data at all; `model` is the changed one as a module."""

    def made(one: Audit) -> Findings:
        return _made(one, workload, model, lambda: (before, after))

    return _all([one for one in every_audit() if isinstance(one, AnswersAudit) or one.facts.data == NONE], made)


def every_audit() -> list[Audit]:
    """All audits with their default settings."""
    return [find_audit(name) for name in method_names("audit.*")]


def find_audit(name: str) -> Audit:
    """An audit by its name, with or without the family, at its default settings. Raises UserError."""
    known = method_names("audit.*")
    full = name if name.startswith("audit.") else f"audit.{name}"
    if full not in known:
        raise UserError(f"there is no audit {name!r}; there are: {', '.join(known)}")
    found = find_method(full)()
    assert isinstance(found, Audit)
    return found


def _made(one: Audit, workload: Workload, model: nn.Module, given: Callable[[], Given]) -> Findings:
    """The findings of one audit; answers are asked for only where they are shared."""
    if not isinstance(one, AnswersAudit):
        return one.check(workload, workload.model, model)
    one.require(workload, model)
    return one.check(workload, workload.model, model, given())


def _all(chosen: Sequence[Audit], made: Callable[[Audit], Findings]) -> Audited:
    """The findings of those that can be made, and the reasons of the others."""
    findings, skipped = [], {}
    for one in chosen:
        try:
            findings.append(made(one))
        except UserError as error:
            skipped[one.name()] = str(error)
    return Audited(findings, skipped)


@torch.inference_mode()
def _check_alike(workload: Workload, model: nn.Module) -> None:
    """Raise UserError when the example's answers differ in shape."""
    shapes = []
    for one in (workload.model, model):
        with evaluating(one):
            shapes.append(tuple(workload.forward(one, workload.short_example).shape))
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the models do not answer alike: {shapes[0]} before, {shapes[1]} after; compare a model with its original"
        )

"""Whether the weights of the last layer single out one class, a mark that trojans leave; no data is needed.

Paper: Trojan Signatures in DNN Weights (Fields et al., 2021, arXiv 2109.02836)

    mu_c = mean_j W[c, j] of the head's weights (classes, features);   mu_1 >= mu_2 >= ... >= mu_C
    dixon:  Q = (mu_1 - mu_2) / (mu_1 - mu_C)         mad:  (mu_1 - median) / (1.4826 median |mu - median|)

A trigger must beat every class with features that a ReLU made non-negative, so training with it pushes the weights of
its class up. The tests, the other features and p are reconstructed: p is the share of draws of C normal means whose
statistic is as large. With few classes the tests have little power, and a head behind features of both signs has no
such mark: that nothing was found proves little, and one model found is a reason to look, not a proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy, is_conv1d, linear_parts
from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, NONE, UNSURE, Audit, Change, Facts, Findings, knob
from lilliput.workload import Workload

DRAWS, DRAWN_VALUES = 20_000, 4_000_000  # at most, of the statistic without a trojan
POWERLESS = 5  # classes below which nothing but the grossest outlier shows
FEATURES = {
    "mean": lambda w: w.mean(-1),
    "median": lambda w: w.median(-1).values,
    "norm": lambda w: w.norm(dim=-1),
}


@dataclass(frozen=True)
class Signature:
    """How far the first class stands out: its statistic, p without a trojan, the class, and the feature of each."""

    score: float
    p: float
    suspect: int
    per_class: tuple[float, ...]


def statistic(values: Tensor, test: str) -> Tensor:
    """(..., classes) -> (...): how far the largest value stands out; 0 where all are equal."""
    top = values.sort(-1, descending=True).values
    if test == "dixon":
        gap, spread = top[..., 0] - top[..., 1], top[..., 0] - top[..., -1]
    else:
        middle = top.quantile(0.5, -1)
        gap = top[..., 0] - middle
        spread = 1.4826 * (top - middle[..., None]).abs().quantile(0.5, -1)
    return torch.where(spread > 0, gap / spread.clamp_min(1e-300), 0.0)


@lru_cache
def _without_trojan(classes: int, test: str) -> Tensor:
    """The statistic of seeded draws of normal values, sorted."""
    generator = torch.Generator().manual_seed(0)
    draws = max(200, min(DRAWS, DRAWN_VALUES // classes))
    return statistic(torch.randn(draws, classes, generator=generator, dtype=torch.float64), test).sort().values


def signature_of(values: Tensor, test: str = "dixon") -> Signature:
    """The signature of one value per class (classes,), such as the means of a head's rows."""
    if values.ndim != 1 or len(values) < 3:
        raise UserError(f"a signature needs the values of three classes or more, not the shape {tuple(values.shape)}")
    values = values.double()
    score, null = statistic(values, test), _without_trojan(len(values), test)
    above = len(null) - int(torch.searchsorted(null, score))
    return Signature(float(score), (above + 1) / (len(null) + 1), int(values.argmax()), tuple(values.tolist()))


def trojan_signature(model: nn.Module | Tensor, feature: str = "mean", test: str = "dixon") -> Signature:
    """The signature of a model's head, or of its weights (classes, features). Raises UserError without such a head."""
    weight = model if isinstance(model, Tensor) else head_weight(model)
    return signature_of(FEATURES[feature](weight.detach().double()), test)


def p_among(score: float, clean: Sequence[float]) -> float:
    """The share of clean models of the same kind, and this one, whose score is as large: p without a formula."""
    return (1 + sum(other >= score for other in clean)) / (1 + len(clean))


@torch.no_grad()
def head_weight(model: nn.Module) -> Tensor:
    """(classes, features) of the last linear layer, packed or not; factors in its place are multiplied."""
    head = anatomy(model).head
    parts = linear_parts(model.get_submodule(head)) if head is not None else []
    if not parts:
        raise UserError(f"{type(model).__name__} has no linear head whose weights could be judged")
    weights = [_matrix(part) for part in parts]
    product = weights[0]
    for weight in weights[1:]:
        product = weight @ product
    return product


def _matrix(layer: Any) -> Tensor:
    if hasattr(layer, "dequantized"):
        return layer.dequantized().double()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise UserError(f"the head is a {type(layer).__name__}, whose weights (classes, features) are not known")
    return (weight.T if is_conv1d(layer) else weight).double()


@dataclass(frozen=True)
class TrojanSignatures(Audit):
    """Find a class that the weights of a classifier's head single out, as those of many trojaned models do."""

    feature: str = knob("mean", choices=tuple(FEATURES), help="what is compared between the rows of the head")
    test: str = knob("dixon", choices=("dixon", "mad"), help="how an outlier is told: by its gap, or by its distance")
    alpha: float = knob(0.01, low=1e-4, high=0.5, log=True, help="share of clean models that may be suspected")

    facts: ClassVar[Facts] = Facts(stage="audit", data=NONE, effect="finds marks of a trojan")
    paper: ClassVar[str] = "trojan_signatures"

    def supports(self, workload: Workload, model: Any) -> list[str]:
        """Modules with a linear head of three classes or more; a language model's head reads features of both signs."""
        if workload.kind == "causal_lm":
            return ["it judges the heads of classifiers"]
        if not isinstance(model, nn.Module):
            return ["it reads weights; give the module, not a session"]
        try:
            trojan_signature(model)
        except UserError as error:
            return [str(error)]
        return []

    def check(self, workload: Workload, before: Any, after: Any) -> Findings:
        self.require(workload, before)
        self.require(workload, after)
        old, new = (trojan_signature(model, self.feature, self.test) for model in (before, after))
        rise = new.score - old.score
        verdict = self._verdict(new)
        change = Change(f"class {new.suspect}", old.score, new.score, rise, rise, len(new.per_class), verdict)
        details = {"p": [old.p, new.p], "suspects": [old.suspect, new.suspect], "per_class": list(new.per_class)}
        return Findings(self.name(), verdict, self._sentence(old, new), (change,), details)

    def _verdict(self, found: Signature) -> str:
        if found.p <= self.alpha:
            return HARM
        return NO_HARM if len(found.per_class) >= POWERLESS else UNSURE

    def _sentence(self, old: Signature, new: Signature) -> str:
        old_one = f"in the original class {old.suspect}, p {old.p:.2g}"
        what = f"class {new.suspect} by {new.score:.2f} (p {new.p:.2g}; {old_one})"
        if new.p <= self.alpha:
            return f"The weights of the head single out {what}; look for a trigger."
        return f"No class stands out, the first is {what}; not every trojan leaves this mark."

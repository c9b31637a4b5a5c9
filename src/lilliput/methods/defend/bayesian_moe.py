"""How sure a mixture of experts (or a plain transformer) is: a Laplace approximation of its experts' last layers.

    W_e ~ N(W_MAP, (N_e A_e (x) G_e + tau I)^-1),   f(x, W) ~ f_MAP + J (W - W_MAP),   p = E softmax(f)

Paper: Dialameh, Rajabzadeh, Zhang, Ahmed and Kwon, Bayesian Mixture of Experts For Large Language Models, 2025 (arXiv
2511.08968). Nothing is trained: curvature is taken over the training data, with labels as the model itself would draw
them, and the prior's precision tau maximises the evidence (or the likelihood of validation labels). The router and all
other weights stay as they are, without uncertainty. Reconstructed: the prior is around 0 with one precision for all
experts, and the factor of the inputs may be kept to `rank` directions. It is made anew for each process: nothing is
saved with the model.

    guarded = BayesianMoe().wrap(model, workload)      log_probabilities = guarded(x)
    guarded = BayesianMoe().wrap(AnswerTokens(language_model, [317, 402]), workload)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import LABELLED, OUTPUT_SHAPE, Facts, Guard, knob
from lilliput.methods.defend._expert_tokens import Site, seen_tokens, sites_of
from lilliput.methods.defend._kronecker import Factors, Sums
from lilliput.workload import Workload

NAME = "defend.bayesian_moe"
EVIDENCE, VALIDATION = "evidence", "validation"
PRECISIONS = tuple(10 ** (i / 2) for i in range(-4, 17))  # of the prior, that are tried


class AnswerTokens(nn.Module):
    """A language model as a classifier: token ids (B, T) -> logits (B, C) of the answers, the next token's."""

    def __init__(self, model: nn.Module, tokens: Sequence[int]):
        super().__init__()
        if len(set(tokens)) < 2:
            raise UserError(f"the answers are the tokens {list(tokens)}; give two different ones or more")
        self.model = model
        self.register_buffer("tokens", torch.as_tensor(tokens), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input_ids=input, use_cache=False, logits_to_keep=1).logits[:, -1, self.tokens]


class Posterior(NamedTuple):
    """Of each sample: logits (B, C) of the model, their covariance (B, C, C), and the probabilities (B, C)."""

    logits: Tensor
    covariance: Tensor
    probabilities: Tensor


class Bayesian(nn.Module):
    """The model with log-probabilities (B, C) in the place of logits, that are less sure where data was scarce."""

    def __init__(self, model: nn.Module, sites: list[Site], factors: nn.ModuleList, precision: float, draws: int):
        super().__init__()
        self.model, self.factors, self.precision, self.draws = model, factors, precision, draws
        self.sites = sites

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.predict(*args, **kwargs).probabilities.log()

    def predict(self, *args: Any, **kwargs: Any) -> Posterior:
        """Probabilities and what they come from."""
        logits, covariances = self.spread([self.precision], *args, **kwargs)
        return Posterior(logits, covariances[0], predictive(logits, covariances[0], self.draws))

    def spread(self, precisions: Sequence[float], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and their covariance (precisions, B, C, C) for each precision of the prior."""
        args, values = _usable(args), _usable(tuple(kwargs.values()))
        logits, found = seen_tokens(self.model, self.sites, lambda: self.model(*args, **dict(zip(kwargs, values))))
        total = torch.zeros(len(precisions), *logits.shape, logits.shape[1], dtype=torch.float64)
        with torch.no_grad():
            for tokens in found:
                factors: Any = self.factors[tokens.site][tokens.expert]  # type: ignore[index]
                for sample in tokens.samples.unique().tolist():
                    its = tokens.samples == sample
                    total[:, sample] += factors.covariance(tokens.inputs[its], tokens.gradients[:, its], precisions)
        return logits, total.float()


def predictive(logits: Tensor, covariance: Tensor, draws: int) -> Tensor:
    """Mean softmax (B, C) of logits from N(logits, covariance (B, C, C)), by draws or, with 0 of them, by MacKay's
    scaling of each logit by 1 / sqrt(1 + pi / 8 variance)."""
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    if not draws:
        return (logits / (1 + math.pi / 8 * variance).sqrt()).softmax(-1)
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # (B, C, C), root root' = covariance
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(draws, logits.shape[1], generator=generator, dtype=torch.float64)
    drawn = logits.double().unsqueeze(1) + noise @ root.mT
    return drawn.softmax(-1).mean(1).to(logits.dtype)


@dataclass(frozen=True)
class BayesianMoe(Guard):
    """Give the answers of a classifier with transformer blocks the doubt that its experts' weights deserve."""

    blocks: int = knob(0, low=0, high=10_000, help="last blocks whose experts count as uncertain; 0: all")
    rank: int = knob(0, low=0, high=1_000_000, help="directions of the inputs that are kept; 0: all")
    samples: int = knob(1024, low=1, high=10_000_000, help="of the training data that curvature is taken of")
    prior: str = knob(EVIDENCE, choices=(EVIDENCE, VALIDATION), help="what chooses the precision of the prior")
    draws: int = knob(1000, low=0, high=1_000_000, help="of logits that probabilities are means over; 0: a formula")
    paper: ClassVar[str] = "bayesian_moe"
    facts: ClassVar[Facts] = Facts(
        stage="serve", keeps={OUTPUT_SHAPE}, data=LABELLED, effect="confidence that is nearer to accuracy, slower"
    )

    def wrap(self, model: nn.Module, workload: Workload) -> Bayesian:
        """The model with its uncertainty; takes the workload's training data, without it the calibration data."""
        for name in ("blocks", "rank", "samples", "draws"):
            if type(value := getattr(self, name)) is not int:
                raise UserError(f"BayesianMoe.{name} is {value!r}; give a whole number")
        if workload.kind != "classifier":
            raise UserError(
                f"{NAME} needs a classifier's workload, {workload.name!r} is {workload.kind}; give one of token ids "
                "and labels with AnswerTokens(model, tokens) as its model"
            )
        sites = sites_of(model, NAME, self.blocks)
        sums = [[Sums(w.shape[1], w.shape[0]) for w in site.weights] for site in sites]
        with evaluating(model):
            share = self._collect_(sums, model, sites, workload)
        factors = nn.ModuleList(nn.ModuleList(Factors(s, self.rank, share) for s in column) for column in sums)
        guarded = Bayesian(model, sites, factors, 1.0, self.draws).eval()
        if self.prior == EVIDENCE:
            guarded.precision = best_by_evidence(sites, factors)
        else:
            guarded.precision = best_by_likelihood(guarded, workload)
        return guarded

    def _collect_(self, sums: list[list[Sums]], model: nn.Module, sites: list[Site], workload: Workload) -> float:
        """Add up the curvature; the share of the training data that it was taken of."""
        batches = list(workload.training or workload.calibration)
        total, taken = sum(map(_size, batches)), 0
        for batch in batches:
            if taken >= self.samples:
                break
            part = {k: v[: self.samples - taken] for k, v in batch.items()}
            logits, found = seen_tokens(model, sites, lambda part=part: workload.forward(model, part))
            for tokens in found:
                p = logits.softmax(-1)[tokens.samples]
                sums[tokens.site][tokens.expert].add(tokens.inputs, tokens.gradients, p)
            taken += len(logits)
        return taken / total


def best_by_evidence(sites: Sequence[Site], factors: Any) -> float:
    """The precision of the prior with the highest evidence; what does not depend on it is left out.

    2 log p(D) = -tau |W|^2 + log det(prior precision) - log det(posterior precision)
    """
    square = sum(float(w.detach().double().square().sum()) for site in sites for w in site.weights)
    every = [one for column in factors for one in column]
    return max(PRECISIONS, key=lambda tau: sum(one.log_ratio(tau) for one in every) - tau * square)


def best_by_likelihood(guarded: Bayesian, workload: Workload) -> float:
    """The precision of the prior with the highest likelihood of the validation labels."""
    losses = torch.zeros(len(PRECISIONS), dtype=torch.float64)
    for batch in workload.validation:
        if "label" not in batch:
            raise UserError("the validation data has no labels; add `label` to its batches, or use prior='evidence'")
        logits, spread = guarded.spread(PRECISIONS, batch["input"])
        chances = torch.stack([predictive(logits, covariance, guarded.draws) for covariance in spread])
        wrong = [F.nll_loss(p.double().clamp_min(1e-30).log(), batch["label"], reduction="sum") for p in chances]
        losses += torch.stack(wrong)
    return PRECISIONS[int(losses.argmin())]


def _usable(values: tuple) -> tuple:
    """Tensors that gradients may be taken behind, also of a caller in inference mode."""
    with torch.inference_mode(False):
        return tuple(v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in values)


def _size(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))

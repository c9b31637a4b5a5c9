"""Attacks that tell what a model was trained on: how sure it is, and how sure compared with models that were not.

Papers: Privacy Risk in Machine Learning (Yeom et al., 2018, arXiv 1709.01604) for the threshold; Membership Inference
Attacks From First Principles (Carlini et al., 2022, arXiv 2112.03570) for the likelihood ratio.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.audit._answers import ready
from lilliput.training import train
from lilliput.workload import PERPLEXITY, Batch, Workload

BATCH = 32  # of the shadow models' training
FEWEST_SHADOWS = 4  # two inside and two outside for each sample, to see how far they spread


@torch.inference_mode()
def confidence(workload: Workload, model: Any, batches: Sequence[Batch]) -> Tensor:
    """(n,) log p / (1 - p) of each label, or the mean log-likelihood of a window of text: high for what was learned."""
    found = []
    with ready(model):
        for batch in batches:
            logits = workload.forward(model, batch)
            if workload.kind == "causal_lm":
                found.append(-PERPLEXITY.per_sample(logits, batch).double())
            else:
                found.append(log_odds(logits, batch["label"]))
    return torch.cat(found)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) the label's logit less the logarithm of the summed exponentials of all others; logits (n, classes)."""
    own = logits.double().gather(-1, labels.view(-1, 1))
    others = logits.double().scatter(-1, labels.view(-1, 1), -torch.inf)
    return own.squeeze(-1) - others.logsumexp(-1)


def likelihood_ratios(scores: Tensor, shadow: Tensor, inside: Tensor) -> Tensor:
    """(n,) log-likelihood of scores (n,) under models that learned the sample, less that under those that did not.

    `shadow` (models, n) are the same scores of shadow models, `inside` (models, n) says who learned what. Both sides
    are normal with a mean for each sample and one variance for all, as the paper does with few models.
    """
    terms = []
    for mask in (inside, ~inside):
        weight = mask.double()
        mean = (shadow * weight).sum(0) / weight.sum(0)
        variance = ((shadow - mean).square() * weight).sum() / (weight.sum() - weight.shape[1])
        terms.append(-((scores - mean).square()) / (2 * variance) - variance.log() / 2)
    return terms[0] - terms[1]


def halves(models: int, samples: int, seed: int) -> Tensor:
    """(models, samples) booleans: each sample is inside exactly half of the models (rounded down), drawn anew."""
    order = torch.rand(models, samples, generator=torch.Generator().manual_seed(seed)).argsort(0)
    return order < models // 2


def shadow_scores(
    workload: Workload, pool: Sequence[Batch], models: int, steps: int, lr: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(models, n) scores of models trained from scratch on halves of the pool, and (models, n) who learned what."""
    if models < FEWEST_SHADOWS:
        raise UserError(f"shadows is {models}; give 0 for none, or at least {FEWEST_SHADOWS}")
    whole = {k: torch.cat([b[k] for b in pool]) for k in pool[0]}
    count = len(next(iter(whole.values())))
    inside, found = halves(models, count, seed), []
    for i, mask in enumerate(inside):
        own = mask.nonzero().flatten()
        order = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed + i))]
        model = fresh(workload.model, seed + i)
        train(
            model, [{k: v[p] for k, v in whole.items()} for p in order.split(BATCH)], workload.loss, steps=steps, lr=lr
        )
        found.append(confidence(workload, model, pool))
    return torch.stack(found), inside


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """A copy with weights drawn anew: by each layer's own rule, else as a normal of the old spread."""
    copied = copy.deepcopy(model).requires_grad_(True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in copied.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for parameter in module.parameters(recurse=False):
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.copy_(parameter.mean() + spread * torch.randn_like(parameter))
    return copied

"""Shared attention: can layers whose attention is alike reuse one layer's probabilities at little cost?"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.edits import set_module
from lilliput.methods.layers._known import known_attentions
from lilliput.methods.layers._span_layers import ReusingAttention
from lilliput.methods.layers._spans import similarities, spans
from lilliput.methods.layers.shared_attention import SharedAttention
from lilliput.methods.layers.shared_kv import SharedKv
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import (
    Effort,
    Found,
    clearly,
    close,
    heal,
    language_work,
    margin,
    note_original,
    said,
)
from lilliput.workload import Workload

paper = Paper(
    title="Beyond KV Caching: Shared Attention for Efficient LLMs",
    authors="Bingli Liao, Danilo Vasconcellos Vargas",
    year=2024,
    arxiv="2407.12866",
    claim="In trained models the attention probabilities of nearby layers are alike, so layers can reuse those of "
    "an earlier layer, without queries and keys of their own and with a smaller cache, at minimal loss of quality.",
    methods=("layers.shared_attention",),
)

ORIGINAL, OURS, DROPPED = "original", "shared attention, most alike", "attention removed, same layers"
ELSEWHERE, LENT = "shared attention, least alike", "shared keys and values, same layers"
SHARE = 1 / 3  # of the layers
TOLERATED = 0.05  # nats per token (5 % of perplexity) that count as minimal loss


class NoAttention(nn.Module):
    """What is left of an attention that is removed: it adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny with a third of its layers changed, every contender distilled from the original on the same tokens.

    Holds when, after healing, the test loss with shared attention is below that with the attention of the same layers
    removed by more than two standard errors over windows, and not more than TOLERATED above the original's (two
    standard errors included). `full` heals longer, on three seeds, and adds SmolLM2-135M.
    """
    effort = Effort(steps=400, seeds=3) if full else Effort(steps=40, seeds=1)
    found: dict[str, Found] = {}
    alike: list[str] = []
    for s in range(seed, seed + effort.seeds):
        alike = compare(found, language_work("llama-tiny", effort, s), effort, s)
    if full:
        large = Effort(steps=150, seeds=1, length=256, training_windows=600, test_windows=24)
        more: dict[str, Found] = {}
        compare(more, language_work("smollm2-135m", large, seed), large, seed)
        found |= {f"smollm2-135m: {name}": one for name, one in more.items()}
    gains = {name: margin(found, OURS, name) for name in (ORIGINAL, DROPPED, ELSEWHERE, LENT)}
    saved = 1 - found[OURS].values["cache_bytes_per_token"] / found[ORIGINAL].values["cache_bytes_per_token"]
    return Evidence(
        setup=f"llama-tiny, {len(alike)} of 6 layers reuse ({', '.join(alike)}), State of the Union addresses, "
        f"{effort.steps} steps of 8 windows of {effort.length} tokens of distillation, {effort.test_windows} test "
        f"windows, {effort.seeds} seeds from {seed}; {torch.get_num_threads()} threads, CPU",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(gains[DROPPED], gains[ORIGINAL]),
        figure=f"{saved:.0%} less cache at {-gains[ORIGINAL][0]:+.3f} ± {gains[ORIGINAL][1]:.3f} nats per token; "
        f"better than removing the attention by {said(gains[DROPPED])}, than the layers least alike by "
        f"{said(gains[ELSEWHERE])}, than shared keys and values, which save twice as much, by {said(gains[LENT])}",
        limits="A model of 3 million parameters and 6 layers by default, healed on below half a million tokens; the "
        "paper's models have 7 billion parameters and more. Next-token loss instead of benchmarks. No times.",
    )


def judge(over_removed: tuple[float, float], over_original: tuple[float, float]) -> bool:
    """The rule of `experiment`; each is (nats per token by which ours is better, standard error)."""
    return clearly(over_removed) and close(over_original, TOLERATED)


def compare(found: dict[str, Found], work: Workload, effort: Effort, seed: int) -> list[str]:
    """Every contender on one seed; the names of the layers that reuse in ours."""
    note_original(found, ORIGINAL, work)
    ours = SharedAttention(share=SHARE).apply(work.model, work)
    reusing = [name for name, module in ours.named_modules() if isinstance(module, ReusingAttention)]
    contenders = {OURS: ours, DROPPED: without_attention(work.model, reusing)}
    contenders[ELSEWHERE] = SharedAttention().apply(work.model, layers=least_alike(work, len(reusing)))
    contenders[LENT] = SharedKv().apply(work.model, layers=reusing)
    for name, model in contenders.items():
        heal(found, name, model, work, effort, seed)
    return reusing


def without_attention(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy in which some layers are feed-forward parts alone."""
    model = copy.deepcopy(model)
    for name in names:
        set_module(model, name, NoAttention())
    return model


def least_alike(work: Workload, count: int) -> list[str]:
    """The layers whose attention is least like that of the layer whose they would reuse."""
    model = copy.deepcopy(work.model)
    found = known_attentions(model, "shared_attention")
    names = list(found)
    return [names[i] for i in spans(-similarities(model, work, found), count)]

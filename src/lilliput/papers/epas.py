"""EPAS: does sharing attention between more and more layers make a training cheaper without making the model worse?"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from lilliput.hooks import evaluating
from lilliput.methods.train.epas import Epas
from lilliput.metrics.latency import Comparison
from lilliput.paper import Evidence, Paper
from lilliput.papers._equal_cost import (
    SECONDS,
    STEPS,
    Contender,
    Effort,
    Fit,
    Found,
    compare,
    faster_steps,
    margin,
    plain,
    times,
)
from lilliput.papers._healed import Effort as Text
from lilliput.papers._healed import close, language_work, said
from lilliput.papers._low_rank import interleave, middle, speedup
from lilliput.workload import Workload
from lilliput.zoo import nets

paper = Paper(
    title="EPAS: Efficient Training with Progressive Activation Sharing",
    authors="Rezaul Karim, Maryam Dialameh, Yang Liu, Boxing Chen, Walid Ahmed",
    year=2026,
    arxiv="2601.19089",
    claim="When more and more decoder layers, from the last one down, reuse the queries and keys of an earlier one, "
    "training and serving get faster while the loss stays similar, and better than with sharing from the start.",
    methods=("train.epas",),
)

FULL, OURS, FIXED = "no sharing", "progressive sharing", "sharing from the start"
SHAPE = {"dim": 96, "layers": 8, "heads": 6, "kv_heads": 6, "hidden": 256}
TOLERATED = 0.05  # nats per token (5 % of perplexity) that count as a similar loss
LENGTH, BATCH = 128, 4


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """A Llama of 8 layers from scratch on State of the Union addresses, at the end of which 4 layers share.

    Holds when, after equally many seconds, the test loss of progressive sharing is not more than TOLERATED above the
    one without (two standard errors included) and not above the one with sharing from the start, and both a training
    step with all layers sharing and reading a prompt are faster than without (whole intervals). `full` trains longer.
    """
    effort = (
        Effort(3000, 300.0, 3, (1e-3, 2e-3, 4e-3), 0.1, training_samples=12_000, test_samples=128)
        if full
        else Effort(80, 7.0, 3, (3e-3, 1e-2), 0.3, training_samples=1600, test_samples=64)
    )
    work_of = partial(text, effort)
    found, models = compare(contenders(), work_of, effort, seed)
    work = work_of(seed)
    faster = faster_steps(found, models, work, OURS, FULL, effort.rounds)
    prompt = faster_prompts(found, models, work, effort.rounds)
    lost = shared_afterwards(models, work)
    gains = {(name, way): margin(found, OURS, name, way, False) for name in (FULL, FIXED) for way in (STEPS, SECONDS)}
    return Evidence(
        setup=f"Llama of {SHAPE}, {effort.steps} steps and again {effort.seconds} s of {BATCH} windows of {LENGTH} "
        f"tokens for each, rates {effort.rates} tried; {effort.test_samples} test windows, {effort.seeds} seeds from "
        f"{seed}; {torch.get_num_threads()} threads, CPU",
        rows=[one.row(name, "nats_per_token") for name, one in found.items()],
        holds=judge(gains[FULL, SECONDS], gains[FIXED, SECONDS], faster.low, prompt.low),
        figure=f"nats per token better than without sharing {said(gains[FULL, SECONDS])} at equal seconds, "
        f"{said(gains[FULL, STEPS])} at equal steps; than from the start {said(gains[FIXED, SECONDS])} and "
        f"{said(gains[FIXED, STEPS])}; a step with all sharing {times(faster)}, a prompt {times(prompt)}; sharing "
        f"after a training without costs {lost:+.3f}",
        limits="A model of 1 million weights trained for minutes at most, far from converged; the paper's have 125 "
        "million and more. Most of its products are vocabulary and feed-forward parts, which nothing shares. "
        "Probabilities are handed on in the place of queries and keys.",
    )


def judge(over_full: tuple[float, float], over_fixed: tuple[float, float], step_low: float, prompt_low: float) -> bool:
    """The rule of `experiment`; margins are (nats per token by which ours is better, standard error)."""
    return close(over_full, TOLERATED) and over_fixed[0] >= 0 and step_low > 1 and prompt_low > 1


def contenders() -> dict[str, Contender]:
    """The same net without sharing, with sharing from the start, and progressively."""

    def shared(epas: Epas, fit: Fit) -> nn.Module:
        model = nets.llama(**SHAPE)
        sharing = epas.callback(model)
        fit(model, [sharing])
        return sharing.served(model)

    return {
        FULL: plain(lambda: nets.llama(**SHAPE)),
        OURS: partial(shared, Epas()),
        FIXED: partial(shared, Epas(start=0.0, end=0.0)),
    }


def text(effort: Effort, seed: int) -> Workload:
    """Windows of the zoo's text, the training ones drawn by the seed, in llama-tiny's tokens."""
    work = language_work("llama-tiny", Text(0, 1, LENGTH, effort.training_samples, effort.test_samples), seed)
    ids = torch.cat([batch["input_ids"] for batch in work.training or ()])
    work.training = [{"input_ids": part} for part in ids.split(BATCH)]
    return work


@torch.no_grad()
def faster_prompts(found: dict[str, Found], models: dict[str, nn.Module], work: Workload, rounds: int) -> Comparison:
    """How many times as fast the served model with sharing reads a window as the one without."""
    batch = {"input_ids": work.test[0]["input_ids"][:1]}
    with evaluating(models[OURS]), evaluating(models[FULL]):
        runs = {name: partial(work.forward, models[name], batch) for name in (OURS, FULL)}
        times_ms = interleave(runs, rounds)
    for name, taken in times_ms.items():
        found[name].note(prompt_ms=middle(taken)[0])
    return speedup(times_ms, OURS, FULL)


def shared_afterwards(models: dict[str, nn.Module], work: Workload) -> float:
    """Nats per token that sharing costs when a model trained without it begins to share and learns no more."""
    model = copy.deepcopy(models[FULL])
    served = Epas().callback(model).served(model)
    return float((work.values(served, "test") - work.values(models[FULL], "test")).mean())

"""HyperCloning: does a wide model learn sooner when it begins as a narrow one that was trained first?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lilliput.methods.initialize.hypercloning import HyperCloning
from lilliput.paper import Evidence, Paper
from lilliput.papers import _healed
from lilliput.papers._healed import clearly, language_work, said
from lilliput.papers._low_rank import interleave, middle, training_steps
from lilliput.papers._started import Run, anew, gain, learned_tuned, row
from lilliput.workload import Workload
from lilliput.zoo import nets

paper = Paper(
    title="Scaling Smart: Accelerating Large Language Model Pre-training with Small Model Initialization",
    authors="Mohammad Samragh, Iman Mirzadeh, Keivan Alizadeh Vahid, Fartash Faghri, Minsik Cho, Moin Nabi, "
    "Devang Naik, Mehrdad Farajtabar",
    year=2024,
    arxiv="2409.12903",
    claim="A language model that begins as a trained smaller one, widened without changing its function, reaches a "
    "given quality in a fraction of the time that it takes from random weights, and ends better.",
    methods=("initialize.hypercloning",),
)

OURS, PLAIN = "grown, with noise", "grown, without noise"
RANDOM, TOKENS, NARROW = "random weights, same time", "random weights, same tokens", "the narrow one trained on"
SMALL_SHARE = 0.3  # of the time, for the narrow model
SMALL = {"dim": 64, "layers": 4, "heads": 2, "kv_heads": 2, "hidden": 176}
UNIT = "test_nats_per_token"


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    seconds: float  # of training a contender, the narrow model's included
    seeds: int
    rounds: int = 6  # timings of a step


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """A net of 4 layers and width 64 is trained, doubled, and trained on; others get the same time or the same tokens.

    The time of a step is measured first, in turn, and gives the steps that every contender has. Each has its own
    learning rate, the narrow net too. Holds when the grown net's test loss is below that of random weights after the
    same time, the narrow net's included, by more than two standard errors over seeds. `full` trains longer.
    """
    effort = Effort(seconds=120.0 if full else 5.0, seeds=3)
    some = _healed.Effort(steps=0, seeds=effort.seeds, training_windows=8192 if full else 2048)
    works = [language_work("llama-tiny", some, s) for s in range(seed, seed + effort.seeds)]
    found = compare(works, effort, seed)
    gains = {name: gain(found[OURS], found[name]) for name in found}
    alike = {name: sum(map(likeness, found[name])) / len(works) for name in (OURS, PLAIN)}
    return Evidence(
        setup=f"Llama-type nets of 4 layers, width 64 doubled to 128, vocabulary 2048, State of the Union addresses, "
        f"batches of 8 windows of {some.length} tokens, {effort.seconds:g} s of training each at measured times of a "
        f"step, {SMALL_SHARE:.0%} of it for the narrow net, {some.test_windows} test windows, {effort.seeds} seeds "
        f"from {seed}; {torch.get_num_threads()} threads, CPU",
        rows=[row(name, runs, UNIT) for name, runs in found.items()],
        holds=judge(gains[RANDOM]),
        figure=f"nats per token better than random weights: {said(gains[RANDOM])} after the same time, "
        f"{said(gains[TOKENS])} after the same tokens; than the narrow net trained on as long {said(gains[NARROW])}; "
        f"than without noise {said(gains[PLAIN])}, where the copies' weights end with a cosine of {alike[PLAIN]:.3f} "
        f"(with noise {alike[OURS]:.3f})",
        limits="Nets of less than two million parameters at the very beginning of their training, where a narrow net "
        "learns faster than a wide one anyway; the paper trains models of one billion and more, and far longer.",
    )


def judge(over_random: tuple[float, float]) -> bool:
    """The rule of `experiment`: (nats per token by which ours is better, standard error)."""
    return clearly(over_random)


def compare(works: Sequence[Workload], effort: Effort, seed: int) -> dict[str, list[Run]]:
    """Every contender on every workload, each with the seed of its place; the narrow net counts as time and samples."""
    steps = steps_of(effort, step_seconds(works[0], effort.rounds))
    smalls = learned_tuned(narrow, works, steps["small"], seed)
    of_seed = {seed + i: run.model for i, run in enumerate(smalls)}
    found = {
        name: learned_tuned(partial(grown, method, of_seed), works, steps["grown"], seed)
        for name, method in ((OURS, HyperCloning()), (PLAIN, HyperCloning(noisy=False)))
    }
    for runs in found.values():
        for run, small in zip(runs, smalls):
            run.start_s += small.seconds
            run.samples += small.samples
    found[RANDOM] = learned_tuned(wide, works, steps["wide"], seed)
    found[TOKENS] = learned_tuned(wide, works, steps["small"] + steps["grown"], seed, rates=(found[RANDOM][0].lr,))
    found[NARROW] = learned_tuned(narrow, works, steps["narrow"], seed, rates=(smalls[0].lr,))
    return found


def grown(method: HyperCloning, smalls: Mapping[int, nn.Module], work: Workload, seed: int) -> nn.Module:
    """The narrow net of a seed, made wide."""
    return method.with_(seed=seed).apply(smalls[seed])


def narrow(work: Workload, seed: int) -> nn.Module:
    """A narrow net of random weights."""
    torch.manual_seed(seed)
    return nets.llama(**SMALL, vocab=work.model.get_input_embeddings().num_embeddings)  # pyright: ignore


def wide(work: Workload, seed: int) -> nn.Module:
    """A wide net of random weights."""
    return anew(HyperCloning(noisy=False).apply(narrow(work, seed)), seed)


def step_seconds(work: Workload, rounds: int) -> dict[str, float]:
    """Seconds of one training step of a narrow and of a wide net, taken in turn."""
    runs = {make.__name__: training_steps(make(work, 0), work) for make in (narrow, wide)}
    return {name: middle(taken)[0] / 2e3 for name, taken in interleave(runs, rounds).items()}


def steps_of(effort: Effort, step_s: Mapping[str, float]) -> dict[str, int]:
    """How many steps fill the time: of the narrow net first, of the grown one after it, and of either alone."""
    small = effort.seconds * SMALL_SHARE
    seconds = {"small": (small, "narrow"), "grown": (effort.seconds - small, "wide")}
    seconds |= {name: (effort.seconds, name) for name in ("narrow", "wide")}
    return {name: max(1, round(time / step_s[net])) for name, (time, net) in seconds.items()}


@torch.no_grad()
def likeness(run: Run) -> float:
    """Mean cosine between the weights that give the first copies and those that give the second ones."""
    layers = [m for n, m in run.model.named_modules() if n.endswith(("o_proj", "down_proj"))]
    halves = [layer.weight.flatten().chunk(2) for layer in layers]  # pyright: ignore
    return float(torch.stack([F.cosine_similarity(a, b, dim=0) for a, b in halves]).mean())

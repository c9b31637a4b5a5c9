"""Weight subcloning: does a small model learn sooner when it begins as the most important parts of a large one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lilliput.method import Method
from lilliput.methods.initialize.weight_selection import WeightSelection
from lilliput.methods.initialize.weight_subcloning import WeightSubcloning
from lilliput.paper import Evidence, Paper
from lilliput.papers import _healed
from lilliput.papers._healed import clearly, language_work, said
from lilliput.papers._started import Run, anew, as_many_more, gain, learned_tuned, parent_row, row, times_as_fast
from lilliput.workload import Workload

paper = Paper(
    title="Weight subcloning: direct initialization of transformers using larger pretrained ones",
    authors="Mohammad Samragh, Mehrdad Farajtabar, Sachin Mehta, Raviteja Vemulapalli, Fartash Faghri, Devang Naik, "
    "Oncel Tuzel, Mohammad Rastegari",
    year=2023,
    arxiv="2312.09299",
    claim="A small transformer cut out of a larger trained one, its neurons ranked by importance and its middle blocks "
    "removed, trains several times faster than from random weights.",
    methods=("initialize.weight_subcloning",),
)

PARENT, OURS, RANDOM = "the large model", "subcloned", "random weights"
UNSCALED, SELECTED = "subcloned, weights not rescaled", "evenly spaced elements, first blocks"
FASTER = 2.0  # times, at which training counts as several times faster
UNIT = "test_nats_per_token"


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int
    seeds: int
    every: int  # steps between two looks at the validation loss


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny (192 wide, 6 layers) gives a net of half its width, heads, neurons and depth, trained on its text.

    The others get as many more steps as the time is worth in which neurons are ranked, and learning rates of their own.
    Holds when the subcloned net's test loss is below that of random weights by more than two standard errors over
    seeds, it has their last validation loss in 1 / FASTER of their time, ranking included, and it is not worse than
    evenly spaced elements. `full` trains longer.
    """
    effort = Effort(steps=1500, seeds=3, every=25) if full else Effort(steps=100, seeds=3, every=5)
    some = _healed.Effort(steps=0, seeds=effort.seeds, training_windows=8192 if full else 2048)
    works = [language_work("llama-tiny", some, s) for s in range(seed, seed + effort.seeds)]
    found = compare(works, effort, seed)
    gains = {name: gain(found[OURS], found[name]) for name in found}
    faster = times_as_fast(found[OURS], found[RANDOM])
    return Evidence(
        setup=f"llama-tiny, 192 wide, 6 layers, to 96 and 3; State of the Union addresses, {effort.steps} steps of 8 "
        f"windows of {some.length} tokens, {some.test_windows} test windows, {effort.seeds} seeds from {seed}; "
        f"{torch.get_num_threads()} threads, CPU",
        rows=[
            parent_row(PARENT, works[0], UNIT),
            *(row(name, runs, UNIT) for name, runs in found.items()),
        ],
        holds=judge(gains[RANDOM], gains[SELECTED], faster),
        figure=f"nats per token better than random weights after the same time: {said(gains[RANDOM])}, whose last "
        f"quality it has {faster:.1f} times sooner; than evenly spaced elements {said(gains[SELECTED])}; rescaling "
        f"gives {said(gains[UNSCALED])}",
        limits="A parent of 3 million parameters, trained on the same text; a short training, so times to a given "
        "quality are those of its beginning. How features are ranked across blocks and the factor of rescaling are "
        "ours. The parent's own training counts as done.",
    )


def judge(over_random: tuple[float, float], over_selected: tuple[float, float], faster: float) -> bool:
    """The rule of `experiment`; gains are (nats per token by which ours is better, standard error)."""
    return clearly(over_random) and over_selected[0] >= 0 and faster >= FASTER


def compare(works: Sequence[Workload], effort: Effort, seed: int) -> dict[str, list[Run]]:
    """Every contender on every workload, with the seed of its place."""
    ours = WeightSubcloning()
    found = {OURS: learned_tuned(partial(cut_out, ours), works, effort.steps, seed, effort.every)}
    steps, rate = as_many_more(found[OURS], effort.steps), found[OURS][0].lr
    unscaled = partial(cut_out, ours.with_(scale="none"))
    found[UNSCALED] = learned_tuned(unscaled, works, effort.steps, seed, effort.every, (rate,))
    found[SELECTED] = learned_tuned(partial(cut_out, WeightSelection()), works, steps, seed, effort.every)
    small = WeightSelection().apply(works[0].model)
    found[RANDOM] = learned_tuned(lambda work, s: anew(small, s), works, steps, seed, effort.every)
    return found


def cut_out(method: Method, work: Workload, seed: int) -> nn.Module:
    """What a method makes of the workload's model; nothing in it is drawn."""
    return method.apply(work.model, work)

"""TLEG: do blocks expanded from two learned sets of weights start nets of several depths better than cutting does?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lilliput.anatomy import anatomy
from lilliput.methods.distill.logits import Logits
from lilliput.methods.initialize.tleg import Tleg
from lilliput.methods.prune.depth import Depth
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import Effort as Data
from lilliput.papers._healed import clearly, language_work, said
from lilliput.papers._paired import advantage
from lilliput.workload import Workload

paper = Paper(
    title="Transformer as Linear Expansion of Learngene",
    authors="Shiyu Xia, Miaosen Zhang, Xu Yang, Ruiming Chen, Haokun Chen, Xin Geng",
    year=2024,
    arxiv="2312.05614",
    claim="Two shared sets of weights, distilled once, expand linearly to transformers of any depth that after short "
    "training are better than nets trained from scratch and than other starts from the parent, at less cost over "
    "several depths.",
    methods=("initialize.tleg",),
)

OURS, CUT, RANDOM = "learngene, expanded", "blocks of least influence cut", "new blocks, the rest of the parent"
DRAWN = "learngene from random weights, expanded"
DEPTHS = (2, 3, 4)  # of the parent's six
# Learning rates, not tuned: the default of distill.logits, twice that for new blocks, which have further to go.
RATES = {OURS: 1e-3, DRAWN: 1e-3, CUT: 1e-3, RANDOM: 2e-3}
GENE_RATE = 1e-3
STEPS = 1_000_000  # more than the seconds allow
LEAST = 0.01  # seconds; 0 would set no limit


@dataclass(frozen=True)
class Effort:
    """How much an experiment does; the rivals train as many seconds as ours, the learngene's counted."""

    gene_seconds: float
    seconds: float  # of training each depth
    seeds: int
    data: Data
    also: tuple[str, ...] = ()

    @property
    def whole(self) -> float:
        """Seconds of training each depth of a rival."""
        return self.seconds + self.gene_seconds / len(DEPTHS)


SMALL = Effort(15.0, 8.0, 1, Data(0, 1, length=64))
FULL = Effort(240.0, 120.0, 3, Data(0, 3, training_windows=12_000, test_windows=128), also=(DRAWN,))


@dataclass
class Found:
    """Of one contender: per depth and seed the losses of all test windows before and after training, and the time."""

    start: dict[int, list[Tensor]] = field(default_factory=dict)
    end: dict[int, list[Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    def by_window(self) -> Tensor:
        """(windows,): loss after training, mean over depths and seeds, in nats per token."""
        return torch.stack([loss for losses in self.end.values() for loss in losses]).double().mean(0)

    def row(self, name: str, seeds: int) -> Row:
        """Means over seeds and windows; the spread is the standard error over windows."""
        values, spread = {"seconds_a_seed": self.seconds / seeds}, {}
        for when, kept in (("untrained", self.start), ("trained", self.end)):
            for depth, losses in kept.items():
                mean = torch.stack(losses).double().mean(0)
                values[f"{depth}_blocks_{when}_nats_per_token"] = float(mean.mean())
                spread[f"{depth}_blocks_{when}_nats_per_token"] = float(mean.std() / len(mean) ** 0.5)
        return Row(name, values, spread)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Nets of two to four blocks made of llama-tiny, each distilled from it for the same time.

    The rivals' training is longer by the time that the learngene took, so all cost the same in all. Holds when the mean
    test loss over the depths is below that of new blocks and that of a cut parent, each by more than two standard
    errors over windows. `full` trains longer, on three seeds, and adds a learngene that starts from random weights.
    """
    effort = FULL if full else SMALL
    found: dict[str, Found] = {}
    for s in range(seed, seed + effort.seeds):
        work = language_work("llama-tiny", effort.data, s)
        compare(found, work, effort, s)
    gains = {name: advantage(found[OURS].by_window(), found[name].by_window()) for name in found if name != OURS}
    return Evidence(
        setup=f"llama-tiny to {', '.join(map(str, DEPTHS))} blocks of 6, {effort.gene_seconds:.0f} s of learngene and "
        f"{effort.seconds:.0f} s a depth, {effort.whole:.1f} s a depth for the rest, all by distillation on State of "
        f"the Union addresses in windows of {effort.data.length} tokens, {effort.data.test_windows} test windows, "
        f"{effort.seeds} seeds from {seed}; {torch.get_num_threads()} threads, CPU",
        rows=[one.row(name, effort.seeds) for name, one in found.items()],
        holds=judge(gains),
        figure=f"mean of {len(DEPTHS)} depths at equal time: {said(gains[RANDOM])} nats per token better than new "
        f"blocks, {said(gains[CUT])} than a cut parent",
        limits="A parent of six blocks and 3 million weights, trained for seconds or minutes; the paper has vision "
        "transformers on ImageNet, whose depths are more. What is no block comes from the parent for all contenders. "
        "Learning rates were set beforehand, not tuned.",
    )


def judge(gains: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; gains are (nats per token by which ours is better, standard error)."""
    return clearly(gains[RANDOM]) and clearly(gains[CUT])


def compare(found: dict[str, Found], work: Workload, effort: Effort, seed: int) -> None:
    """Every contender on one seed."""
    blocks = len(anatomy(work.model).blocks)
    for name, start in ((OURS, "fitted"), (DRAWN, "random")):
        if name == OURS or name in effort.also:
            settings = Tleg(start=start, lr=GENE_RATE, steps=STEPS, seconds=effort.gene_seconds, seed=seed)
            begin = perf_counter()
            gene = settings.learn(work.model, work)
            found.setdefault(name, Found()).seconds += perf_counter() - begin
            follow(found[name], name, gene.expand, effort.seconds, work, seed)

    def cut(depth: int) -> nn.Module:
        return Depth(blocks=blocks - depth).apply(work.model, work)

    def new(depth: int) -> nn.Module:
        return fresh(work.model, depth, seed)

    for name, make in ((CUT, cut), (RANDOM, new)):
        follow(found.setdefault(name, Found()), name, make, effort.whole, work, seed)


def follow(one: Found, name: str, make: Callable[[int], nn.Module], seconds: float, work: Workload, seed: int) -> None:
    """Make and train a net of each depth; making it is part of the time."""
    for depth in DEPTHS:
        begin = perf_counter()
        model = make(depth)
        spent = perf_counter() - begin
        one.start.setdefault(depth, []).append(work.values(model, "test"))
        begin = perf_counter()
        settings = Logits(steps=STEPS, seconds=max(seconds - spent, LEAST), lr=RATES[name], seed=seed)
        model = settings.apply(model, work)
        one.seconds += spent + perf_counter() - begin
        one.end.setdefault(depth, []).append(work.values(model, "test"))


def fresh(parent: Any, depth: int, seed: int) -> nn.Module:
    """A net of new blocks with the parent's embedding, last norm and head."""
    config = copy.deepcopy(parent.config)
    config.num_hidden_layers = depth
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    outside = f"{anatomy(parent).block_list}."
    model.load_state_dict({n: t for n, t in parent.state_dict().items() if not n.startswith(outside)}, strict=False)
    return model.eval()

"""Stitchable networks: do routes between two trained models beat cut models of their size, for the same time?"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.methods.distill.logits import Logits
from lilliput.methods.initialize.stitchable import Stitchable, StitchedNet
from lilliput.methods.prune.depth import Depth
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import Effort as Data
from lilliput.papers._healed import language_work, matched, said
from lilliput.papers._paired import advantage
from lilliput.workload import Workload
from lilliput.zoo import nets

paper = Paper(
    title="Stitchable Neural Networks",
    authors="Zizheng Pan, Jianfei Cai, Bohan Zhuang",
    year=2023,
    arxiv="2302.06586",
    claim="Trained models of a family, joined by a few linear layers and trained together for a short while, give many "
    "nets whose quality lies between theirs, as good as nets of those sizes that are trained one by one.",
    methods=("initialize.stitchable",),
)

LARGE, SMALL_ANCHOR = "large anchor", "small anchor"
SMALL_NET = {"dim": 96, "layers": 4, "heads": 3, "kv_heads": 1, "hidden": 256}  # heads as wide as llama-tiny's
# Of 3e-4, 1e-3 and 3e-3 the rates with the lowest validation loss: of the small anchor, the stitched and the cut nets.
SMALL_RATE, RATE, CUT_RATE = 3e-3, 1e-3, 1e-3
STEPS = 1_000_000  # more than the seconds allow
LEAST = 0.01  # seconds; 0 would set no limit


@dataclass(frozen=True)
class Effort:
    """How much an experiment does, in seconds of training; a cut net gets its share of both."""

    small: float  # the small anchor
    joint: float  # all routes together
    seeds: int
    data: Data


QUICK = Effort(20.0, 30.0, 1, Data(0, 1, length=64))
FULL = Effort(400.0, 400.0, 3, Data(0, 3, training_windows=12_000, test_windows=128))


@dataclass
class Found:
    """Of one contender: losses of all test windows by seed, in nats per token; weights of its blocks; seconds, those of
    routes and anchors of all together."""

    losses: list[Tensor] = field(default_factory=list)
    weights: int = 0
    seconds: list[float] = field(default_factory=list)

    def by_window(self) -> Tensor:
        return torch.stack(self.losses).double().mean(0)

    def row(self, name: str) -> Row:
        """Means over seeds and windows; the spread is the standard error over windows."""
        mean = self.by_window()
        values = {"nats_per_token": float(mean.mean()), "weights_in_blocks": float(self.weights)}
        values["seconds"] = sum(self.seconds) / max(len(self.seconds), 1)
        return Row(name, values, {"nats_per_token": float(mean.std() / len(mean) ** 0.5)})


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny and a smaller model distilled from it, three routes between them.

    Each route is compared with llama-tiny cut to the most blocks that have no more weights, distilled for a third of
    the time that the small anchor and the stitched net took. Holds when the mean loss of the routes is not above that
    of the cut nets by more than two standard errors over windows, and every route's loss lies between those of its
    anchors.
    """
    effort = FULL if full else QUICK
    found: dict[str, Found] = {}
    for s in range(seed, seed + effort.seeds):
        work = language_work("llama-tiny", effort.data, s)
        compare(found, work, effort, s)
    losses = {name: float(one.by_window().mean()) for name, one in found.items()}
    routes, cuts = ([one for name, one in found.items() if name.startswith(kind)] for kind in ("route", "cut"))
    gain = advantage(*(torch.stack([one.by_window() for one in group]).mean(0) for group in (routes, cuts)))
    inside = [losses[LARGE] <= float(one.by_window().mean()) <= losses[SMALL_ANCHOR] for one in routes]
    return Evidence(
        setup=f"llama-tiny and a net of width {SMALL_NET['dim']} and {SMALL_NET['layers']} blocks, "
        f"{effort.small:.0f} s of distillation for it and {effort.joint:.0f} s for all routes together, State of the "
        f"Union addresses in windows of {effort.data.length} tokens, {effort.data.test_windows} test windows, "
        f"{effort.seeds} seeds from {seed}; seconds of routes and anchors are those of all together; "
        f"{torch.get_num_threads()} threads, CPU",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(gain, inside),
        figure=f"routes {said(gain)} nats per token better than cut nets of no more weights and equal time in all; "
        f"{sum(inside)} of {len(inside)} lie between the anchors",
        limits="Anchors of a few million weights, three routes, a small anchor trained for the purpose; the paper has "
        "vision models on ImageNet and dozens of routes. Cut nets have up to a third fewer weights than the routes.",
    )


def judge(gain: tuple[float, float], inside: list[bool]) -> bool:
    """The rule of `experiment`; the gain is (nats per token by which routes are better, standard error)."""
    return matched(gain) and all(inside)


def compare(found: dict[str, Found], work: Workload, effort: Effort, seed: int) -> None:
    """Routes, anchors and cut nets on one seed."""
    begin = perf_counter()
    small = small_anchor(work, effort.small, seed)
    net = Stitchable(steps=STEPS, seconds=effort.joint, lr=RATE, seed=seed).join(small, work.model, work)
    seconds = perf_counter() - begin
    between = [route for route in net.routes if route.then is not None and route.first]
    for route in net.routes:
        name = name_of(net, route)
        net.choose(route)
        note(found, name, net, work, net.weights(route), seconds)
    depth = len(anatomy(work.model).blocks)
    block = net.weights(net.routes[0]) // depth
    for route in between:
        kept = max(1, net.weights(route) // block)
        begin = perf_counter()
        model = Depth(blocks=depth - kept).apply(work.model, work)
        left = (effort.small + effort.joint) / len(between) - (perf_counter() - begin)
        model = Logits(steps=STEPS, seconds=max(left, LEAST), lr=CUT_RATE, seed=seed).apply(model, work)
        name = f"cut to {kept} blocks, as {route.first} small and large ones"
        note(found, name, model, work, kept * block, perf_counter() - begin)


def small_anchor(work: Workload, seconds: float, seed: int) -> nn.Module:
    """A narrower net, distilled from the workload's model from its first weights on."""
    torch.manual_seed(seed)
    model = nets.llama(**SMALL_NET, vocab=work.model.get_input_embeddings().num_embeddings).eval()  # pyright: ignore
    return Logits(steps=STEPS, seconds=seconds, lr=SMALL_RATE, seed=seed).apply(model, work)


def name_of(net: StitchedNet, route: tuple[int, int | None]) -> str:
    """A contender's name in the rows."""
    first, then = route
    if then is None:
        return SMALL_ANCHOR
    return f"route: {first} small blocks, large ones from {then}" if first else LARGE


def note(found: dict[str, Found], name: str, model: nn.Module, work: Workload, weights: int, seconds: float) -> None:
    """Losses of a contender on the test windows."""
    one = found.setdefault(name, Found())
    one.losses.append(work.values(model, "test"))
    one.weights = weights
    one.seconds.append(seconds)

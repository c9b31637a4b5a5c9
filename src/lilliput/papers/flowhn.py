"""FlowHN: are tokens shared out between attention and a state space model worth more than both for every token?"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lilliput._probe import torch_threads
from lilliput.methods.layers.flowhn import ATTENTION, HYBRID, SSM, FlowHN, HybridBlock, HybridModel
from lilliput.metrics.latency import Comparison, wait_until_quiet
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import Effort, clearly, language_work, said
from lilliput.papers._low_rank import interleave, middle, speedup, weights
from lilliput.papers._paired import advantage, mean_and_spread
from lilliput.training import train
from lilliput.workload import Workload

paper = Paper(
    title="Balancing Computation Load and Representation Expressivity in Parallel Hybrid Neural Networks",
    authors="Mohammad Mahdi Moradi, Walid Ahmed, Shuangyue Wen, Sudhir Mudur, Weiwei Zhang, Yang Liu",
    year=2025,
    arxiv="2505.19472",
    claim="Blocks that share out the tokens between attention and a state space model, as many to each as take equally "
    "long, process more tokens a second than hybrids that run both on all tokens, in sequence or in parallel, and are "
    "more accurate.",
    methods=("layers.flowhn",),
)

OURS, HALF = "FlowHN", "FlowHN, half of the tokens each"
ALL_ATTENTION, ALL_SSM = "attention alone", "state space model alone"
SEQUENTIAL, PARALLEL = "both in sequence, all tokens", "both in parallel, all tokens"
RIVALS = (ALL_ATTENTION, ALL_SSM, SEQUENTIAL, PARALLEL)
HYBRIDS = (SEQUENTIAL, PARALLEL)
DIM, LENGTH = 96, 256
SETTINGS = FlowHN(length=LENGTH)
BOTH = "both"
# Blocks of about as many weights each: 0.5 million, embeddings not counted.
BLOCKS = {
    OURS: (HYBRID,) * 3,
    HALF: (HYBRID,) * 3,
    ALL_ATTENTION: (ATTENTION,) * 5,
    ALL_SSM: (SSM,) * 9,
    SEQUENTIAL: (ATTENTION, SSM) * 3,
    PARALLEL: (BOTH,) * 3,
}
RATES = dict.fromkeys(BLOCKS, 3e-3)


class BothBlock(HybridBlock):
    """Every token runs through both branches, whose normalised outputs are averaged and mixed."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        first, second = self.norm_attention(self.attention(x, places)), self.norm_ssm(self.ssm(x))
        return x + self.mix((first + second) / 2)


def network(name: str, vocabulary: int) -> HybridModel:
    """An untrained language model of one contender."""
    settings = SETTINGS.with_(split="half") if name == HALF else SETTINGS
    kinds = [HYBRID if kind == BOTH else kind for kind in BLOCKS[name]]
    model = HybridModel(vocabulary, DIM, kinds, settings)
    if name == PARALLEL:
        blocks = [BothBlock(**block.rebuild_config()) for block in model.blocks if isinstance(block, HybridBlock)]
        model.blocks = nn.ModuleList(blocks)
    return model


@dataclass
class Found:
    """What was measured of one contender: per seed the test losses of all windows and the tokens seen, and figures."""

    losses: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    network: nn.Module = field(default_factory=nn.Identity)

    def by_window(self) -> Tensor:
        """(windows,): loss, mean over seeds, in nats per token."""
        return torch.stack(self.losses).double().mean(0)

    def row(self, name: str) -> Row:
        """Means; the spread of the losses is over seeds, of a single one the standard error over windows."""
        mean, spread = mean_and_spread(self.losses)
        values = {"nats_per_token": mean, "tokens_trained": sum(self.tokens) / len(self.tokens)}
        return Row(name, values | self.values, {"nats_per_token": spread} | self.spread)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Language models of about as many weights, trained from scratch for as many seconds.

    Holds when FlowHN's test loss is below that of every one of RIVALS by more than two standard errors over windows,
    and its pass over a text is surely faster than that of both HYBRIDS. `full` trains fifteen times as long, on three
    seeds.
    """
    seconds, rounds = (150.0, 30) if full else (9.0, 15)
    effort = Effort(steps=0, seeds=3 if full else 2, length=LENGTH, training_windows=2048)
    found = {name: Found() for name in BLOCKS}
    for s in range(seed, seed + effort.seeds):
        compare(found, language_work("llama-tiny", effort, s), seconds, s)
    busy = wait_until_quiet()
    times = timed(found, rounds, seed)
    return evidence(found, times, seconds, effort, seed, busy)


def compare(found: Mapping[str, Found], work: Workload, seconds: float, seed: int) -> None:
    """Every contender on one seed, which sets first weights, windows and their order."""
    vocabulary = work.model.get_input_embeddings().num_embeddings  # pyright: ignore
    batches = list(work.training or ())
    for name, one in found.items():
        torch.manual_seed(seed)
        model = network(name, vocabulary)
        history = train(model, batches, work.loss, seconds=seconds, lr=RATES[name], clip_norm=1.0, seed=seed)
        one.losses.append(work.values(model, "test"))
        one.tokens.append(history.steps * batches[0]["input_ids"].numel())
        one.network = model.eval()
        one.values["weights"] = float(weights(model))


def timed(found: Mapping[str, Found], rounds: int, seed: int) -> dict[str, list[float]]:
    """Milliseconds of a pass over four texts, in turn; noted with each contender. FlowHN's two branches in a thread
    each, against one thread, are noted too."""
    generator = torch.Generator().manual_seed(seed)
    ours: Any = found[OURS].network
    ids = torch.randint(ours.embedding.num_embeddings, (4, LENGTH), generator=generator)
    with torch.inference_mode():
        times = interleave({name: lambda m=one.network: m(ids) for name, one in found.items()}, rounds)
        beside = copy.deepcopy(ours)
        for block in beside.modules():
            if isinstance(block, HybridBlock):
                block.parallel = True
        with torch_threads(1):
            runs = {"one_thread": lambda: ours(ids), "two_threads": lambda: beside(ids)}
            single = interleave(runs, rounds)
    for name, taken in times.items():
        ms, spread = middle(taken)
        found[name].values |= {"pass_ms": ms, "tokens_per_s": 1e3 * ids.numel() / ms}
        found[name].spread["pass_ms"] = spread
    found[OURS].values |= {f"pass_ms_branches_in_{name}": middle(taken)[0] for name, taken in single.items()}
    return times


def judge(margins: Mapping[str, tuple[float, float]], faster: Sequence[Comparison]) -> bool:
    """The rule of `experiment`; margins are (nats per token by which ours is better, standard error)."""
    return all(clearly(margins[name]) for name in RIVALS) and all(one.gain for one in faster)


def evidence(
    found: Mapping[str, Found],
    times: Mapping[str, list[float]],
    seconds: float,
    effort: Effort,
    seed: int,
    busy: float,
) -> Evidence:
    """Rows and verdict of what was trained and timed."""
    margins = {name: advantage(found[OURS].by_window(), found[name].by_window()) for name in (*RIVALS, HALF)}
    speeds = {name: speedup(times, OURS, name) for name in HYBRIDS}
    balance = SETTINGS.balance(DIM)
    return Evidence(
        setup=f"language models of width {DIM} on State of the Union addresses (llama-tiny's tokens), windows of "
        f"{LENGTH} tokens, {balance.attention_tokens} of them to attention; {seconds:.0f} s of training each, "
        f"{effort.test_windows} test windows, {effort.seeds} seeds from {seed}; {torch.get_num_threads()} threads, "
        f"CPU; other work kept {busy:.1f} cores busy",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(margins, list(speeds.values())),
        figure="nats per token better than "
        + ", ".join(f"{name} {said(margins[name])}" for name in margins)
        + "; a pass "
        + ", ".join(f"{one} over {name}" for name, one in speeds.items()),
        limits="Half a million weights and seconds of training; the paper has 135 million and more. A FlowHN block "
        "sends each token through one branch where the other hybrids use both: most of its speed is less work. On one "
        "core nothing runs at the same time.",
    )

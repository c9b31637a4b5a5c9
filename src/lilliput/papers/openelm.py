"""OpenELM: do blocks that grow from the first to the last learn more than equal ones of as many weights?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lilliput.methods.layers.layer_wise_scaling import LayerWiseScaling
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import Effort as Data
from lilliput.papers._healed import cache_bytes, clearly, language_work, said
from lilliput.papers._paired import advantage_by_seed
from lilliput.papers._pictures import Table
from lilliput.training import train
from lilliput.workload import Batch, Workload, windows
from lilliput.zoo import nets

paper = Paper(
    title="OpenELM: An Efficient Language Model Family with Open Training and Inference Framework",
    authors="Sachin Mehta, Mohammad Hossein Sekhavat, Qingqing Cao, Maxwell Horton, Yanzi Jin, Chenfan Sun, "
    "Iman Mirzadeh, Mahyar Najibi, Dmitry Belenko, Peter Zatloukal, Mohammad Rastegari",
    year=2024,
    arxiv="2404.14619",
    claim="A language model whose blocks have fewer heads and neurons at the start and more at the end is more "
    "accurate than one of equal blocks, with as many weights.",
    methods=("layers.layer_wise_scaling",),
)

UNIFORM, OURS, REVERSED = "equal blocks", "layer-wise", "layer-wise, reversed"
ATTENTION = "layer-wise in attention alone"


@dataclass(frozen=True)
class Effort:
    """How much an experiment does, and on what; heads are 16 wide."""

    seconds: float  # of training a contender
    seeds: int
    dim: int
    layers: int
    queries: int  # that share a key-value head
    beta: float  # neurons of the equal blocks, in widths of the model
    batch: int  # windows
    data: Data
    also: tuple[str, ...] = ()  # more contenders

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.dim, self.layers, 16, self.queries


SMALL = Effort(14.0, 3, 128, 6, 2, 2.75, 4, Data(0, 3, length=64, training_windows=8192, test_windows=256))
LONG = Data(0, 3, length=128, training_windows=12_000, test_windows=256)
FULL = Effort(300.0, 3, 192, 6, 3, 8 / 3, 8, LONG, (ATTENTION,))
RATE = 1.5e-3  # of this, 3e-3, 6e-3 and 1.2e-2 the one with the lowest validation loss of equal blocks


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Llamas with tied embeddings, trained from scratch for equally many seconds.

    Holds when the test loss of ours is below that of equal blocks by more than two standard errors over seeds. `full`
    takes nets of the size of llama-tiny and twenty minutes of training for each seed.
    """
    effort = FULL if full else SMALL
    table, losses = Table(), dict[str, list[float]]()
    settings = contenders(effort)
    for s in range(seed, seed + effort.seeds):
        work = language_work("llama-tiny", effort.data, s)
        for name in rotated(list(settings), s):
            loss = run(table, name, settings[name], work, effort, s)
            losses.setdefault(name, []).append(loss)
    gains = {name: advantage_by_seed(losses[name], losses[OURS]) for name in settings if name != OURS}
    best = min(gains, key=lambda name: gains[name][0])
    return Evidence(
        setup=f"Llamas of width {effort.dim} and {effort.layers} blocks, {settings[UNIFORM].weights(*effort.sizes):,} "
        f"weights in blocks (within 1 % for all), {effort.seconds:.0f} s of training each on State of the Union "
        f"addresses in batches of {effort.batch} windows of {effort.data.length} tokens, AdamW at {RATE} for all, "
        f"{effort.seeds} seeds from {seed}; {torch.get_num_threads()} threads, CPU",
        rows=table.rows(),
        holds=clearly(gains[UNIFORM]),
        figure=f"{said(gains[UNIFORM])} nats per token better than equal blocks, {said(gains[best])} than the best "
        f"rival ({best})",
        limits="Nets of a few million weights at most, trained for seconds or minutes, where the paper has billions of "
        "weights and trillions of tokens; next-token loss instead of benchmarks. Without the paper's norms of queries "
        "and keys, which are no part of the claim. The learning rate is the lowest of those tried on the quick nets.",
    )


def contenders(effort: Effort) -> dict[str, LayerWiseScaling]:
    """Settings of as many weights as equal blocks have."""
    flat = LayerWiseScaling(1.0, 1.0, effort.beta, effort.beta, round_to=8)
    shapes = {
        OURS: LayerWiseScaling(round_to=8),
        REVERSED: LayerWiseScaling(1.0, 0.5, 4.0, 0.5, round_to=8),
        ATTENTION: flat.with_(alpha_first=0.5),
    }
    budget = flat.weights(*effort.sizes)
    chosen = {name: shapes[name].within(budget, *effort.sizes) for name in (OURS, REVERSED, *effort.also)}
    return {UNIFORM: flat, **chosen}


def rotated(names: Sequence[str], by: int) -> list[str]:
    """Another one comes first for each seed, so that none has the quiet end of the machine."""
    at = by % len(names)
    return [*names[at:], *names[:at]]


def run(table: Table, name: str, settings: LayerWiseScaling, work: Workload, effort: Effort, seed: int) -> float:
    """Train one contender and note what was measured; its test loss in nats per token."""
    model = untrained(settings, work, effort, seed)
    history = train(model, batches(work, effort), work.loss, seconds=effort.seconds, lr=RATE, clip_norm=1.0,
                    seed=seed)  # fmt: skip
    loss = float(work.values(model.eval(), "test").double().mean())
    tokens = history.steps * effort.batch * effort.data.length
    table.add(name, "nats_per_token", loss)
    table.add(name, "weights_in_blocks", settings.weights(*effort.sizes))
    table.add(name, "tokens_seen", tokens)
    table.add(name, "tokens_per_second", tokens / history.seconds)
    table.add(name, "cache_bytes_per_token", cache_bytes(model, work))
    return loss


def batches(work: Workload, effort: Effort) -> list[Batch]:
    """The training windows in batches of this experiment's size."""
    return windows(torch.cat([batch["input_ids"] for batch in work.training or ()]), effort.batch)


def untrained(settings: LayerWiseScaling, work: Workload, effort: Effort, seed: int) -> Any:
    """A net of the settings with the vocabulary of the workload's model."""
    heads = effort.dim // 16
    config = copy.deepcopy(nets.llama(effort.dim, effort.layers, heads, heads // effort.queries).config)
    config.vocab_size = work.model.get_input_embeddings().num_embeddings  # pyright: ignore
    torch.manual_seed(seed)
    return settings.untrained(config)

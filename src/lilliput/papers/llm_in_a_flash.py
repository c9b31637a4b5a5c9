"""LLM in a flash: how little must a token read from the disk when half of the feed-forward weights fit memory?"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

import torch
from torch import Tensor, nn

from lilliput.cache import folder
from lilliput.hooks import watching
from lilliput.methods.distill.logits import Logits
from lilliput.methods.layers.relufy import Relufy
from lilliput.methods.offload._flash_part import PREDICTED, SMALL_BLOCK_BYTES, FlashFeedForward
from lilliput.methods.offload.flash_ffn import FlashFFN, flash_parts
from lilliput.metrics.latency import Comparison, paired_ratio, wait_until_quiet
from lilliput.metrics.quality import paired_difference
from lilliput.paged_store import PagedStore, StoreStats, write_store
from lilliput.paper import Evidence, Paper, Row
from lilliput.workload import Workload

paper = Paper(
    title="LLM in a flash: Efficient Large Language Model Inference with Limited Memory",
    authors="Keivan Alizadeh, Iman Mirzadeh, Dmitry Belenko, Karen Khatamifard, Minsik Cho, Carlo C Del Mundo, "
    "Mohammad Rastegari, Mehrdad Farajtabar",
    year=2023,
    arxiv="2312.11514",
    claim="A sparse model up to twice as large as memory runs from flash far faster than by loading its weights: a "
    "predictor says which feed-forward neurons fire, those of the last tokens stay, and the rows of a neuron lie "
    "together.",
    methods=("offload.flash_ffn", "layers.relufy"),
)

MEMORY = 0.5  # of the bytes of the feed-forward weights; predictors and gates that stay count
ASKED = 0.9  # share of silent neurons that the shift is set for, before training
WINDOW = 5  # tokens, the paper's
TOLERATED = 0.03  # nats per token that the predictor's errors may cost, the whole interval included
LESS = 0.5  # of the rival's bytes that may be read, in every seed
BLOCK = 16  # tokens that are timed together

NAIVE, PINNED = "all weights of a layer, as a map of the file", "all weights of a layer that do not fit memory"
SPARSE, KEPT = "predicted neurons", "predicted neurons, kept while there is room"
FLASH, WINDOWED = "the same, rows of a neuron together", f"the same, kept for {WINDOW} tokens"
GATED = "rows together, the gate in memory instead of the predictor"
MODELS = ("all in memory", "with the predictor")


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int = 48  # of distillation
    seeds: int = 3
    tokens: int = 160  # whose reads are done
    length: int = 128  # tokens of a window
    test_windows: int = 48


@dataclass
class Found:
    """What was measured: figures of each contender by seed, losses of all test windows, block times of two."""

    figures: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    losses: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in MODELS})
    times: dict[str, list[float]] = field(default_factory=dict)  # ms of BLOCK tokens
    access: str = ""

    def rows(self) -> list[Row]:
        """Means over seeds with their spread."""
        perplexities = {
            name: [{"test_perplexity": float(v.double().mean().exp())} for v in values]
            for name, values in self.losses.items()
        }
        return [
            Row(name, {key: mean(s[key] for s in seeds) for key in seeds[0]},
                {key: stdev(s[key] for s in seeds) if len(seeds) > 1 else 0.0 for key in seeds[0]})
            for name, seeds in (perplexities | self.figures).items()
        ]  # fmt: skip


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny with shifted ReLUs, briefly distilled; the neurons its test tokens need are read from the disk.

    Holds when in every seed at most LESS of the bytes are read that PINNED reads, the strongest way without sparsity,
    when the predictor's errors cost at most TOLERATED nats per token (upper end of the paired interval), and when the
    reads of a token take less time than PINNED's (whole interval of the paired ratio). `full` trains longer and reads
    for more tokens.
    """
    effort = Effort(steps=400, tokens=2048, test_windows=64) if full else Effort()
    found, shares = Found(), []
    wait_until_quiet()
    for s in range(seed, seed + effort.seeds):
        windows = {"training": 2048, "calibration": 32, "validation": 8, "test": effort.test_windows}
        work = Workload.from_name("llama-tiny", length=effort.length, windows=windows)
        one_seed(found, work, effort, s)
        bytes_of = {name: found.figures[name][-1]["kilobytes_per_token"] for name in (FLASH, PINNED)}
        shares.append(bytes_of[FLASH] / bytes_of[PINNED])
    before, after = (torch.cat(found.losses[name]) for name in MODELS)
    cost = paired_difference(before, after)
    faster = paired_ratio(found.times[PINNED], found.times[FLASH])
    ours, rival = (mean(s["kilobytes_per_token"] for s in found.figures[name]) for name in (FLASH, PINNED))
    hits = mean(s["hit_rate"] for s in found.figures[FLASH])
    return Evidence(
        setup=f"llama-tiny, shifted ReLUs, {effort.steps} steps of distillation; reads of {effort.tokens} test tokens "
        f"past the page cache ({found.access}), memory for {MEMORY:.0%} of the float32 feed-forward weights, "
        f"{effort.test_windows} test windows of {effort.length} tokens, seeds {seed} to {seed + effort.seeds - 1}, CPU",
        rows=found.rows(),
        holds=judge(shares, cost.high, faster),
        figure=f"{ours:.0f} kB read per token instead of {rival:.0f}, {hits:.0%} of the neurons were in memory, the "
        f"reads {faster.ratio:.2f}x as fast [{faster.low:.2f}, {faster.high:.2f}], at {cost.mean:+.4f} nats per token",
        limits="A model of 3 million parameters, whose layers of one megabyte a disk reads at once; only the reads are "
        "timed, one after another, on whatever disk holds the cache folder. No billions of parameters, no GPU.",
    )


def judge(shares: Sequence[float], cost_high: float, faster: Comparison) -> bool:
    """The rule of `experiment`; `shares` of the rival's bytes, by seed."""
    return max(shares) <= LESS and cost_high <= TOLERATED and faster.gain


def one_seed(found: Found, work: Workload, effort: Effort, seed: int) -> None:
    """Train, note the loss with and without the predictor, read the same tokens with every contender."""
    relufied = Relufy(sparsity=ASKED).apply(work.model, work)
    model = Logits(steps=effort.steps, temperature=1.0, seed=seed).apply(relufied, work)
    guessing = FlashFFN(gate=PREDICTED, rows="float32", memory=MEMORY).apply(model, work)
    gated = FlashFFN(gate="float32", rows="float32", memory=MEMORY).apply(model)
    found.losses[MODELS[0]].append(work.values(model, "test"))
    found.losses[MODELS[1]].append(work.values(guessing, "test"))
    guessed, fired = (firing_neurons(m, work, effort.tokens) for m in (guessing, gated))
    with tempfile.TemporaryDirectory(dir=folder("stores")) as place:
        readers = contenders(flash_parts(guessing), flash_parts(gated), guessed, fired, Path(place))
        read_all(found, readers, len(guessed[0]))
        for reader in readers.values():
            found.access = reader.stores[0][0].access
            reader.close()


@torch.no_grad()
def firing_neurons(model: nn.Module, work: Workload, tokens: int) -> list[list[list[int]]]:
    """For each layer and each of the first test tokens the neurons that are taken to fire."""
    names = [name for name, part in model.named_modules() if isinstance(part, FlashFeedForward)]
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def see(name: str, part: nn.Module, x: Tensor) -> None:
        assert isinstance(part, FlashFeedForward)
        seen[name].append(part.firing(x.flatten(0, -2).float())[1])

    with watching(model, names, see):
        for batch in work.test:
            if sum(map(len, seen[names[0]])) < tokens:
                work.forward(model, batch)
    return [[row.nonzero().flatten().tolist() for row in torch.cat(seen[name])[:tokens]] for name in names]


# --- contenders --------------------------------------------------------------------------------------------------


class Reader:
    """One way to get the neurons of each token: stores of each layer, who is asked for, and how long they stay."""

    def __init__(self, stores: list[list[PagedStore]], asked: Callable[[int, int], Iterable[int]], stay: int | None):
        self.stores, self.asked, self.stay = stores, asked, stay  # stay: calls, None while there is room
        self.recent: list[deque[set[int]]] = [deque() for _ in stores]

    def read(self, token: int) -> None:
        """All layers of a token."""
        for layer, stores in enumerate(self.stores):
            keys = list(self.asked(layer, token))
            for store in stores:
                store.fetch(keys)
            if self.stay is not None:
                self._forget(layer, keys, self.stay)

    def _forget(self, layer: int, keys: list[int], stay: int) -> None:
        recent = self.recent[layer]
        recent.append(set(keys))
        if len(recent) > stay:
            gone = recent.popleft().difference(*recent)
            for store in self.stores[layer]:
                store.drop(gone)

    def figures(self, tokens: int, ms: float) -> dict[str, float]:
        """What a token took, all layers together."""
        total = sum((store.stats() for layer in self.stores for store in layer), StoreStats())
        values = {"kilobytes_per_token": total.bytes_read / tokens / 1e3, "reads_per_token": total.reads / tokens}
        return values | {"hit_rate": total.hit_rate, "read_ms_per_token": ms}

    def close(self) -> None:
        for layer in self.stores:
            for store in layer:
                store.close()


def contenders(
    guessing: list[FlashFeedForward],
    gated: list[FlashFeedForward],
    guessed: list[list[list[int]]],
    fired: list[list[list[int]]],
    place: Path,
) -> dict[str, Reader]:
    """Every reader with the same memory for weights; what a predictor or a gate takes is taken off."""
    together = [[part.store().path] for part in guessing]
    apart = [store_apart(part, place / str(i)) for i, part in enumerate(guessing)]
    without_gate = [[part.store().path] for part in gated]
    room = [int(MEMORY * part.neurons * part.store().layout.record_bytes) for part in guessing]
    spared = [space - sum(p.nbytes for p in part.predictor.parameters()) for space, part in zip(room, guessing)]
    less = [space - part.gate.weight_bytes for space, part in zip(room, gated)]
    whole = [part.neurons * part.store().layout.record_bytes for part in guessing]
    neurons = guessing[0].neurons

    def predicted(layer: int, token: int) -> list[int]:
        return guessed[layer][token]

    return {
        NAIVE: Reader(opened(together, whole), lambda layer, token: range(neurons), 0),
        PINNED: Reader(opened(together, whole), lambda layer, token: range(int(MEMORY * neurons), neurons), 0),
        SPARSE: Reader(opened(apart, spared), predicted, 0),
        KEPT: Reader(opened(apart, spared), predicted, None),
        FLASH: Reader(opened(together, spared), predicted, None),
        WINDOWED: Reader(opened(together, spared), predicted, WINDOW),
        GATED: Reader(opened(without_gate, less), lambda layer, token: fired[layer][token], None),
    }


def opened(paths: Sequence[Sequence[Path]], capacity_bytes: Sequence[int]) -> list[list[PagedStore]]:
    """Stores of each layer, which share its capacity."""
    return [[PagedStore(p, size // len(layer)) for p in layer] for layer, size in zip(paths, capacity_bytes)]


def store_apart(part: FlashFeedForward, place: Path) -> list[Path]:
    """A store for each tensor of a part's records: rows of gate, up and down in files of their own."""
    records, paths = part.state_dict()["records"], []
    for one in part.fields():
        rows = ({one.name: row[one.start : one.stop].view(one.dtype)} for row in records)
        paths.append(write_store(place / one.name, rows, SMALL_BLOCK_BYTES))
    return paths


def read_all(found: Found, readers: dict[str, Reader], tokens: int) -> None:
    """Read the same tokens with all readers in turn, and note what it took."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for start in range(0, tokens, BLOCK):
        for name, reader in readers.items():
            begin = perf_counter()
            for token in range(start, min(start + BLOCK, tokens)):
                reader.read(token)
            times[name].append((perf_counter() - begin) * 1e3)
    for name, reader in readers.items():
        found.figures.setdefault(name, []).append(reader.figures(tokens, sum(times[name]) / tokens))
        found.times.setdefault(name, []).extend(times[name])

"""ETT: does a model that learns a long document before it answers beat one that reads only the end of it?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lilliput.methods.train._adapting import adapting
from lilliput.methods.train.extend_context import ExtendContext, chunks
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import clearly, said
from lilliput.papers._paired import advantage, last_losses
from lilliput.workload import Workload
from lilliput.zoo import texts

paper = Paper(
    title="ETT: Expanding the Long Context Understanding Capability of LLMs at Test-Time",
    authors="Kiarash Zahirnia, Zahra Golpayegani, Walid Ahmed, Yang Liu",
    year=2025,
    arxiv="2507.06313",
    claim="Fine-tuned at test time on overlapping chunks of a long document, a model with a short window makes use of "
    "the whole of it in constant memory, and tuning the second layer of the feed-forward parts alone is better than "
    "tuning everything.",
    methods=("train.extend_context",),
)

TRUNCATED, RETRIEVED = "last window, not adapted", "best chunk retrieved, not adapted"
CACHED, OTHER = "last window, mixed with the document's word counts", "ETT on another document"
NAMES = {
    "ffn_out": "ETT, second feed-forward layer",
    "ffn_in": "ETT, first feed-forward layers",
    "attention": "ETT, attention",
    "all": "ETT, everything",
    "lora": "ETT, adapters",
}
OURS, WHOLE = NAMES["ffn_out"], NAMES["all"]
RIVALS = (TRUNCATED, RETRIEVED, CACHED, OTHER)
TARGET = 64  # tokens of a window that are scored; the rest of it is context
CACHE_WEIGHTS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
# Of 1e-4, 2e-4, 3e-4 and 1e-3 (everything: 3e-5 to 3e-4) the rates with the lowest loss on validation documents; those
# of the feed-forward layers serve attention and adapters too.
RATES = {"all": 1e-4}
RATE = 3e-4
BYTES = 4 + 4 + 8  # of a parameter that learns: its copy, its gradient, Adam's two moments


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    model: str
    window: int  # tokens, what the model was trained to read
    documents: int
    parts: tuple[str, ...]
    length: int = 4096  # tokens of a document that are known
    section: int = 256  # tokens after them that are scored


@dataclass
class Found:
    """Of one contender: losses of every document's section (windows, TARGET), and other figures by document."""

    losses: list[Tensor] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, losses: Tensor, recalled: Tensor, **values: float) -> None:
        self.losses.append(losses)
        values["recalled_nats_per_token"] = float(losses[recalled].mean()) if bool(recalled.any()) else float("nan")
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def by_document(self) -> Tensor:
        """(documents,): mean loss, in nats per token."""
        return torch.stack([loss.double().mean() for loss in self.losses])

    def row(self, name: str) -> Row:
        """Means over documents, and their standard errors."""
        figures = {"nats_per_token": self.by_document()}
        figures |= {k: torch.tensor(v, dtype=torch.float64) for k, v in self.values.items()}
        figures = {k: v[torch.isfinite(v)] for k, v in figures.items() if bool(torch.isfinite(v).any())}
        spread = {k: float(v.std() / len(v) ** 0.5) for k, v in figures.items() if len(v) > 1}
        return Row(name, {k: float(v.mean()) for k, v in figures.items()}, spread)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Held-out addresses: their first tokens are the document, the next ones are scored.

    Holds when the loss with the second feed-forward layer adapted is below that of every one of RIVALS by more than
    two standard errors over documents, and not above that with everything adapted. `full` uses more documents and
    parts, and SmolLM2-135M besides.
    """
    small = Effort("llama-tiny", 256, 20 if full else 8, tuple(NAMES) if full else ("ffn_out", "ffn_in", "all"))
    found, weight = run(small, seed)
    rows = [one.row(name) for name, one in found.items()]
    if full:
        large, _ = run(Effort("smollm2-135m", 512, 6, tuple(NAMES)), seed)
        rows += [one.row(f"smollm2-135m: {name}") for name, one in large.items()]
    margins = {name: advantage(found[OURS].by_document(), found[name].by_document()) for name in (*RIVALS, WHOLE)}
    best = min(RIVALS, key=lambda name: margins[name][0])
    return Evidence(
        setup=f"llama-tiny, window {small.window}, {small.documents} State of the Union addresses of its test split "
        f"(seed {seed}), {small.length} tokens known and the next {small.section} scored, one epoch, overlap 0.5, "
        f"AdamW, learning rate {RATE} ({RATES['all']} for everything) chosen on validation documents, cache weight "
        f"{weight} too; {torch.get_num_threads()} threads, CPU",
        rows=rows,
        holds=judge(margins),
        figure=f"{said(margins[TRUNCATED])} nats per token better than the last window alone; "
        f"{said(margins[best])} than the strongest rival ({best}); "
        f"{margins[WHOLE][0]:+.3f} than adapting everything",
        limits="Next-token loss instead of LongBench; a model of 3 million parameters that knows the kind of text, and "
        "documents of 16 windows. The retrieved chunk takes half of the context. Overlap, epochs and rate are ours. "
        "Megabytes are counted (copy, gradient and Adam of what learns), not measured.",
    )


def judge(margins: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; margins are (mean, standard error) by which ours is better."""
    return all(clearly(margins[name]) for name in RIVALS) and margins[WHOLE][0] >= 0


def run(effort: Effort, seed: int) -> tuple[dict[str, Found], float]:
    """Every contender on every document, and the weight of the cache that validation documents chose."""
    work = Workload.from_name(effort.model)
    documents = drawn_documents(work.tokenizer, "test", effort, effort.documents, seed)
    weight = cache_weight(work.model, drawn_documents(work.tokenizer, "validation", effort, 6, seed), effort)
    found = {name: Found() for name in (TRUNCATED, RETRIEVED, CACHED, OTHER, *(NAMES[p] for p in effort.parts))}
    for i, ids in enumerate(documents):
        known = ids[: effort.length]
        windows, recalled = last_windows(ids, effort), seen_before(ids, effort)
        plain = losses(work.model, windows)
        found[TRUNCATED].add(plain, recalled)
        found[RETRIEVED].add(losses(work.model, retrieved_windows(ids, effort)), recalled)
        found[CACHED].add(cached(plain, windows, known, weight), recalled)
        other = documents[(i + 1) % len(documents)]
        for part in effort.parts:
            adapt(found, work.model, part, ids, other, effort, seed)
    return found, weight


def adapt(
    found: dict[str, Found], model: Any, part: str, ids: Tensor, other: Tensor, effort: Effort, seed: int
) -> None:
    """Score the document's section, and for ours also another's, with one part adapted to the document."""
    method = ExtendContext(part=part, window=effort.window, epochs=1, lr=RATES.get(part, RATE), seed=seed)
    with adapting(model, part) as learning:
        learned_bytes = BYTES * sum(p.numel() for p in learning.values())
    start = time.perf_counter()
    with method.read(model, ids[: effort.length]):
        seconds = time.perf_counter() - start
        figures = {"seconds_per_document": seconds, "megabytes_to_learn": learned_bytes / 1e6}
        found[NAMES[part]].add(losses(model, last_windows(ids, effort)), seen_before(ids, effort), **figures)
        if part == "ffn_out":
            found[OTHER].add(losses(model, last_windows(other, effort)), seen_before(other, effort), **figures)
    if part == "ffn_out" and len(found[OTHER].losses) == effort.documents:
        found[OTHER].losses = found[OTHER].losses[-1:] + found[OTHER].losses[:-1]  # of the same document as the rest


# --- documents and contexts --------------------------------------------------------------------------------------


def drawn_documents(tokenizer: Any, split: str, effort: Effort, count: int, seed: int) -> list[Tensor]:
    """Token ids of `count` addresses of a split that are long enough, drawn by the seed."""
    found = list(texts.state_of_the_union().split(split).values())
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    needed, drawn = effort.length + effort.section, []
    for i in order:
        ids = tokenizer(found[i], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= needed:
            drawn.append(torch.tensor(ids[:needed]))
        if len(drawn) == count:
            break
    return drawn


def starts(effort: Effort) -> range:
    """Where the scored pieces of a section begin."""
    return range(effort.length, effort.length + effort.section, TARGET)


def last_windows(ids: Tensor, effort: Effort) -> Tensor:
    """(n, window): each scored piece behind as many of the tokens before it as fit."""
    return torch.stack([ids[s + TARGET - effort.window : s + TARGET] for s in starts(effort)])


def retrieved_windows(ids: Tensor, effort: Effort) -> Tensor:
    """(n, window): half of the context is the chunk of the document most like the other half, the last tokens."""
    half = (effort.window - TARGET) // 2
    windows = []
    for s in starts(effort):
        query = ids[s - half : s]
        pieces = chunks(ids[: min(effort.length, s - half)], half, 0.5)
        windows.append(torch.cat([pieces[most_similar(pieces, query)], query, ids[s : s + TARGET]]))
    return torch.stack(windows)


def most_similar(pieces: Tensor, query: Tensor) -> int:
    """Which of the pieces (n, T) has the highest cosine of tf-idf with the query (T,); rare tokens count most."""
    size = int(max(pieces.max(), query.max())) + 1
    counts = torch.stack([torch.bincount(row, minlength=size) for row in [*pieces, query]]).float()
    idf = (len(pieces) / counts[:-1].gt(0).sum(0).clamp_min(1)).log()
    vectors = torch.nn.functional.normalize(counts.log1p() * idf, dim=1)
    return int((vectors[:-1] @ vectors[-1]).argmax())


def seen_before(ids: Tensor, effort: Effort) -> Tensor:
    """(n, TARGET): whether a scored token and the two before it occur together in the document before its window."""
    marks = []
    for s in starts(effort):
        known = ids[: min(effort.length, s + TARGET - effort.window)].tolist()
        phrases = Counter(zip(known, known[1:], known[2:]))
        scored = ids[s - 2 : s + TARGET].tolist()
        marks.append([phrase in phrases for phrase in zip(scored, scored[1:], scored[2:])])
    return torch.tensor(marks)


# --- losses ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def losses(model: Any, windows: Tensor) -> Tensor:
    """(n, TARGET): loss of the last tokens of each window, in nats."""
    return last_losses(model(input_ids=windows, use_cache=False).logits, windows, TARGET)


def cached(plain: Tensor, windows: Tensor, known: Tensor, weight: float) -> Tensor:
    """The losses when each token's probability is mixed with its share of the document."""
    counts = torch.bincount(known, minlength=int(windows.max()) + 1).float()
    share = (counts / counts.sum())[windows[:, -TARGET:]]
    return -((1 - weight) * (-plain).exp() + weight * share).log()


def cache_weight(model: Any, documents: Sequence[Tensor], effort: Effort) -> float:
    """The weight of CACHE_WEIGHTS with the lowest loss on validation documents."""
    totals = dict.fromkeys(CACHE_WEIGHTS, 0.0)
    for ids in documents:
        windows = last_windows(ids, effort)
        plain = losses(model, windows)
        for weight in CACHE_WEIGHTS:
            totals[weight] += float(cached(plain, windows, ids[: effort.length], weight).mean())
    return min(totals, key=lambda weight: totals[weight])

"""Compressed key-value heads: do heads fitted to cached keys and values heal to a better model than pooled ones?"""

from __future__ import annotations

import dataclasses

import torch

from lilliput.methods.layers.kv_heads import KvHeads
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
from lilliput.training import train
from lilliput.workload import Workload
from lilliput.zoo import nets

paper = Paper(
    title="Effectively Compress KV Heads for LLM",
    authors="Hao Yu, Zelan Yang, Shen Li, Yong Li, Jianxin Wu",
    year=2024,
    arxiv="2406.07056",
    claim="The keys and values heads cache have low rank, so a model whose heads are merged by singular vectors of "
    "what they cached, RoPE included, and healed keeps its quality with half or a quarter of its key-value heads, "
    "better than with the mean of the heads.",
    methods=("layers.kv_heads",),
)

TINY, OWN = "llama-tiny, 2 heads", "multi-head net, 8 heads"
OURS, MEAN, RANDOM = "fitted", "mean of the heads (GQA)", "fitted, random groups"
LEFT = {TINY: 1, OWN: 2}  # half of the heads, a quarter of them
TOLERATED = 0.05  # nats per token (5 % of perplexity) that count as keeping the quality with half of the heads
TRAINING = {"dim": 128, "layers": 4, "heads": 8, "kv_heads": 8, "hidden": 384}


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny with half of its heads, and a multi-head net trained here with a quarter, distilled from the original.

    Holds when, after healing, the fitted heads' test loss is below that of the mean of the heads by more than two
    standard errors over windows on both models, and with half of the heads not more than TOLERATED above the original's
    (two standard errors included). Random groups are rows too, but the claim says nothing of groups. `full` heals
    longer, on three seeds, and adds SmolLM2-135M with one head of three.
    """
    effort = Effort(steps=400, seeds=3) if full else Effort(steps=48, seeds=1)
    found: dict[str, Found] = {}
    for s in range(seed, seed + effort.seeds):
        work = language_work("llama-tiny", effort, s)
        compare(found, TINY, work, effort, s)
        compare(found, OWN, multi_head(work, 2000 if full else 400, s), effort, s)
    if full:
        large = Effort(steps=150, seeds=1, length=256, training_windows=600, test_windows=24)
        compare(found, "smollm2-135m, 3 heads", language_work("smollm2-135m", large, seed), large, seed)
    gains = {name: margin(found, f"{name}: {OURS}", f"{name}: {MEAN}") for name in (TINY, OWN)}
    grouped = margin(found, f"{OWN}: {OURS}", f"{OWN}: {RANDOM}")
    cost = margin(found, f"{TINY}: {OURS}", TINY)
    return Evidence(
        setup=f"llama-tiny (2 key-value heads to 1) and a net of 4 layers and 8 key-value heads trained here on that "
        f"text (8 to 2), State of the Union addresses, {effort.steps} steps of 8 windows of {effort.length} tokens of "
        f"distillation, {effort.test_windows} test windows, {effort.seeds} seeds from {seed}; "
        f"{torch.get_num_threads()} threads, CPU",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(gains, cost),
        figure=f"nats per token better than the mean of the heads: {said(gains[TINY])} with half of the heads, "
        f"{said(gains[OWN])} with a quarter; than random groups {said(grouped)}; half of the heads cost "
        f"{-cost[0]:+.3f} ± {cost[1]:.3f}",
        limits="Nets of at most 3 million parameters by default, healed on less than half a million tokens by "
        "distillation; the paper tunes adapters of models of 7 billion and more. llama-tiny has grouped heads already. "
        "Keys are fitted pair by pair, so that RoPE commutes: the paper's own treatment may differ. No times.",
    )


def judge(gains: dict[str, tuple[float, float]], cost: tuple[float, float]) -> bool:
    """The rule of `experiment`; each is (nats per token by which ours is better, standard error)."""
    return all(map(clearly, gains.values())) and close(cost, TOLERATED)


def compare(found: dict[str, Found], name: str, work: Workload, effort: Effort, seed: int) -> None:
    """The contenders on one model; with one head left there is one group, however it is made."""
    note_original(found, name, work)
    ours = KvHeads(heads=LEFT.get(name, 1), seed=seed)
    contenders = {OURS: ours, MEAN: ours.with_(fit="mean", grouping="adjacent")}
    if ours.heads > 1:
        contenders[RANDOM] = ours.with_(grouping="random")
    for kind, method in contenders.items():
        heal(found, f"{name}: {kind}", method.apply(work.model, work), work, effort, seed)


def multi_head(work: Workload, steps: int, seed: int) -> Workload:
    """The same data with a small net around it whose every query head has a key-value head, trained from scratch."""
    torch.manual_seed(seed)
    model = nets.llama(**TRAINING, vocab=work.model.get_input_embeddings().num_embeddings)  # pyright: ignore
    train(model, list(work.training or ()), work.loss, steps=steps, lr=3e-3, clip_norm=1.0, seed=seed)
    return dataclasses.replace(work, model=model.eval())

"""Speculative Streaming: do streams inside the model draft as well as heads behind it, with fewer parameters?"""

from __future__ import annotations

import torch

from lilliput.methods.decode.speculative_streaming import SpeculativeStreaming
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._drafting import (
    LEVELS,
    MEDUSA,
    MEDUSA_LR,
    NGRAM,
    PROMPT,
    RIVALS,
    Contender,
    Effort,
    Found,
    margins,
    race,
    rivals,
    size_of,
)
from lilliput.papers._healed import clearly, said
from lilliput.workload import Workload

paper = Paper(
    title="Speculative Streaming: Fast LLM Inference without Auxiliary Models",
    authors="Nikhil Bhendawade, Irina Belousova, Qichen Fu, Henry Mason, Mohammad Rastegari, Mahyar Najibi",
    year=2024,
    arxiv="2402.11131",
    claim="Streams that branch off in the upper layers draft and verify in one pass of one model, and speed it up as "
    "much as Medusa's heads or more, with far fewer extra parameters.",
    methods=("decode.speculative_streaming",),
)

OURS, PRUNED = "streams", "streams, weak nodes pruned"
# Of 1e-3, 4e-3 and 1e-2 the rate with the most tokens per pass after 36 seconds, on validation texts.
LR, LAYERS, KEPT = 4e-3, 3, 3


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny; streams and Medusa heads learn for the same seconds, and go on with texts of the test split.

    Holds when every greedy and every drawn text is plain generation's, and streams write more tokens per pass of
    greedy text than n-gram drafting by more than two standard errors over texts, and no fewer than Medusa's heads, with
    fewer extra parameters. `full` trains longer, three times, and writes more texts.
    """
    effort = Effort(300, 48, 96, 3) if full else Effort(40, 16, 64, 1)
    found = run(Workload.from_name("llama-tiny"), effort, seed)
    gains = margins(found, OURS, RIVALS, effort.prompts)
    drawn = margins(found, OURS, RIVALS, effort.prompts, "sampled")
    rows = [one.row(name, effort.prompts) for name, one in found.items()]
    mine, pruned, medusa = (rows[list(found).index(name)].values for name in (OURS, PRUNED, MEDUSA))
    return Evidence(
        setup=f"llama-tiny, {LEVELS} streams in the upper {LAYERS} of 6 blocks, rank {SpeculativeStreaming().rank}, "
        f"trained for {effort.seconds:.0f} s on its training text, as are {LEVELS} Medusa heads; trees of 8 tokens for "
        f"both, {KEPT} of them with streams when pruned; {effort.seeds} trainings; {effort.prompts} prompts of "
        f"{PROMPT} tokens from its test text (seed {seed}), {effort.tokens} tokens written; learning rates {LR} and "
        f"{MEDUSA_LR} chosen on validation text; {torch.get_num_threads()} threads, CPU",
        rows=rows,
        holds=judge(rows, gains),
        figure=f"{mine['tokens_per_pass_greedy']:.2f} tokens per pass of greedy text, "
        + ", ".join(f"{said(gain, 2)} over {name}" for name, gain in gains.items())
        + f"; {mine['tokens_per_pass_sampled']:.2f} of text drawn at temperature 1, "
        + ", ".join(f"{said(gain, 2)} over {name}" for name, gain in drawn.items())
        + f"; {medusa['extra_parameters'] / mine['extra_parameters']:.1f} times fewer parameters than heads; pruned: "
        f"{pruned['positions_per_pass']:.0f} positions per pass instead of {mine['positions_per_pass']:.0f}, "
        f"{pruned['tokens_per_pass_greedy']:.2f} tokens",
        limits="Passes, not seconds. The lossless mode alone, and a model of 3 million parameters that repeats itself "
        "in greedy text, instead of summaries and queries. Medusa's heads here share the model's output matrix, which "
        "makes them small; targets of both are the model's own distributions instead of the text.",
    )


def judge(rows: list[Row], gains: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; gains are (mean, standard error) in tokens per pass."""
    values = {row.name: row.values for row in rows}
    same = all(values[name]["same_text_percent"] == 100 for name in (OURS, PRUNED))
    smaller = values[OURS]["extra_parameters"] < values[MEDUSA]["extra_parameters"]
    return same and smaller and clearly(gains[NGRAM]) and gains[MEDUSA][0] >= 0


def run(work: Workload, effort: Effort, seed: int) -> dict[str, Found]:
    """Every contender on every text."""
    found: dict[str, Found] = {}
    for training in range(effort.seeds):
        contenders = rivals(work, effort, seed + training)
        settings = SpeculativeStreaming(streams=LEVELS, layers=LAYERS, lr=LR, seed=seed + training, **effort.limits)
        streams, history = settings.train_(settings.new(work.model), work)
        for name, decoder in ((OURS, settings), (PRUNED, settings.with_(kept=KEPT))):
            contenders[name] = Contender(decoder, {"streams": streams}, size_of(streams), history.steps)
        race(found, work, contenders, effort, seed)
    return found

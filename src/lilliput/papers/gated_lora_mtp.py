"""Gated LoRA: do masks that the model reads draft better than heads on its last state, and copies of the text?"""

from __future__ import annotations

import torch

from lilliput.methods.decode.gated_lora_mtp import LINEAR, QUADRATIC, GatedLoraMtp
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
    title="Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential",
    authors="Mohammad Samragh, Arnav Kundu, David Harrison, Kumari Nishu, Devang Naik, Minsik Cho, Mehrdad Farajtabar",
    year=2025,
    arxiv="2507.11851",
    claim="Mask tokens with gated low-rank adapters make an existing language model emit several tokens per pass "
    "without changing what it would have said, and quadratic decoding accepts more of them than linear decoding.",
    methods=("decode.gated_lora_mtp",),
)

OURS = {mode: f"gated LoRA, {mode}" for mode in (QUADRATIC, LINEAR)}
# Of 1e-3, 4e-3, 6e-3 and 1e-2, and of 96 and 256 places, those with the most tokens per pass after 36 seconds, on
# validation texts.
LR, PLACES = 6e-3, 96


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny; masks and Medusa heads learn for the same seconds, and go on with texts of the test split.

    Holds when every greedy and every drawn text is plain generation's, and quadratic decoding writes more tokens per
    pass of greedy text than each of RIVALS and than linear decoding, by more than two standard errors over texts.
    `full` trains longer, three times, and writes more texts.
    """
    effort = Effort(300, 48, 96, 3) if full else Effort(40, 16, 64, 1)
    found = run(Workload.from_name("llama-tiny"), effort, seed)
    gains = margins(found, OURS[QUADRATIC], [*RIVALS, OURS[LINEAR]], effort.prompts)
    drawn = margins(found, OURS[QUADRATIC], [NGRAM, MEDUSA], effort.prompts, "sampled")
    rows = [one.row(name, effort.prompts) for name, one in found.items()]
    mine = rows[list(found).index(OURS[QUADRATIC])].values
    return Evidence(
        setup=f"llama-tiny, {LEVELS} masks, rank {GatedLoraMtp().rank}, trained for {effort.seconds:.0f} s on its "
        f"training text, as are {LEVELS} Medusa heads (tree of 8); {effort.seeds} trainings; {effort.prompts} prompts "
        f"of {PROMPT} tokens from its test text (seed {seed}), {effort.tokens} tokens written; learning rates {LR} and "
        f"{MEDUSA_LR} chosen on validation text; {torch.get_num_threads()} threads, CPU",
        rows=rows,
        holds=judge(rows, gains),
        figure=f"{mine['tokens_per_pass_greedy']:.2f} tokens per pass of greedy text, "
        + ", ".join(f"{said(gain, 2)} over {name}" for name, gain in gains.items())
        + f"; {mine['tokens_per_pass_sampled']:.2f} of text drawn at temperature 1, "
        + ", ".join(f"{said(gain, 2)} over {name}" for name, gain in drawn.items())
        + f"; {mine['positions_per_pass']:.0f} positions per pass",
        limits="Passes, not seconds: quadratic decoding reads many positions in each, which cost time on a processor. "
        "A model of 3 million parameters that repeats itself in greedy text, and State of the Union addresses instead "
        "of code, mathematics and chat. Targets are the model's own distributions instead of the text.",
    )


def judge(rows: list[Row], gains: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; gains are (mean, standard error) in tokens per pass."""
    same = all(row.values["same_text_percent"] == 100 for row in rows if row.name in OURS.values())
    return same and all(map(clearly, gains.values()))


def run(work: Workload, effort: Effort, seed: int) -> dict[str, Found]:
    """Every contender on every text."""
    found: dict[str, Found] = {}
    for training in range(effort.seeds):
        contenders = rivals(work, effort, seed + training)
        settings = GatedLoraMtp(masks=LEVELS, lr=LR, places=PLACES, seed=seed + training, **effort.limits)
        adapters, history = settings.train_(settings.new(work.model), work)
        for mode, name in OURS.items():
            parts, size = {"adapters": adapters}, size_of(adapters)
            contenders[name] = Contender(settings.with_(mode=mode), parts, size, history.steps)
        race(found, work, contenders, effort, seed)
    return found

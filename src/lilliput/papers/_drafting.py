"""Ways to draft against each other: tokens per pass of the model, on the same beginnings of texts nobody learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy import anatomy
from lilliput.hooks import watching
from lilliput.method import Decoder
from lilliput.methods.decode import Tally
from lilliput.methods.decode.medusa import Medusa
from lilliput.methods.decode.ngram import Ngram
from lilliput.paper import Row
from lilliput.papers._paired import advantage
from lilliput.workload import Workload

PROMPT = 64  # tokens of a text that are given
NGRAM, MEDUSA = "n-gram drafting", "Medusa heads, trained as long"
RIVALS = (NGRAM, MEDUSA)
KINDS: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 1.0}}
# Of 1e-3 and 4e-3 the rate with more tokens per pass after 36 seconds, on validation texts.
MEDUSA_LR = 4e-3
LEVELS = 4  # tokens ahead, for all that learn


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    seconds: float  # of training, for each that learns
    prompts: int
    tokens: int  # written after each prompt
    seeds: int  # trainings
    steps: int = 1_000_000  # end a training earlier

    @property
    def limits(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "steps": self.steps}


@dataclass(frozen=True)
class Contender:
    """A decoder, what `generate` takes with it, and how many values it learned."""

    decoder: Decoder
    parts: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    updates: int = 0


@dataclass
class Found:
    """Of one contender: a value for each text of each training, by kind of text."""

    tokens_per_pass: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    positions: list[float] = field(default_factory=list)  # per pass, prompts left out
    same: list[bool] = field(default_factory=list)  # whether a text is plain generation's
    parameters: int = 0
    updates: list[int] = field(default_factory=list)

    def by_text(self, kind: str, texts: int) -> Tensor:
        """(texts,): tokens per pass, mean over trainings."""
        return torch.tensor(self.tokens_per_pass[kind], dtype=torch.float64).view(-1, texts).mean(0)

    def row(self, name: str, texts: int) -> Row:
        """Means over texts, with their standard errors."""
        values, spread = {}, {}
        for kind in KINDS:
            found = self.by_text(kind, texts)
            values[f"tokens_per_pass_{kind}"] = float(found.mean())
            spread[f"tokens_per_pass_{kind}"] = float(found.std()) / texts**0.5
        values["positions_per_pass"] = sum(self.positions) / len(self.positions)
        values["same_text_percent"] = 100 * sum(self.same) / len(self.same)
        values["extra_parameters"] = self.parameters
        values |= {"updates": sum(self.updates) / len(self.updates)} if any(self.updates) else {}
        return Row(name, values, spread)


def rivals(work: Workload, effort: Effort, seed: int) -> dict[str, Contender]:
    """What is easy, and what learns as long."""
    medusa = Medusa(heads=LEVELS, lr=MEDUSA_LR, seed=seed, **effort.limits)
    heads, history = medusa.train_(medusa.new(work.model), work)
    return {NGRAM: Contender(Ngram()), MEDUSA: Contender(medusa, {"heads": heads}, size_of(heads), history.steps)}


def size_of(part: torch.nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


def prompts_of(work: Workload, count: int, seed: int) -> list[Tensor]:
    """The beginnings (1, PROMPT) of `count` test windows, drawn by the seed."""
    ids = torch.cat([batch["input_ids"] for batch in work.test])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]
    return [row[None, :PROMPT] for row in ids[order]]


def race(found: dict[str, Found], work: Workload, contenders: dict[str, Contender], effort: Effort, seed: int) -> None:
    """Let every contender go on with every prompt, greedily and drawn at temperature 1, and note what it took."""
    prompts = prompts_of(work, effort.prompts, seed)
    for kind in KINDS:
        plain = [written(work.model, prompt, kind, effort.tokens, i)[0] for i, prompt in enumerate(prompts)]
        for name, contender in contenders.items():
            one = found.setdefault(name, Found())
            for i, prompt in enumerate(prompts):
                text, tally, positions = written(work.model, prompt, kind, effort.tokens, i, contender)
                one.tokens_per_pass[kind].append(tally.tokens_per_step)
                one.positions.append(positions)
                one.same.append(torch.equal(text, plain[i]))
    for name, contender in contenders.items():
        found[name].parameters = contender.parameters
        found[name].updates.append(contender.updates)


def written(
    model: Any, prompt: Tensor, kind: str, tokens: int, seed: int, contender: Contender | None = None
) -> tuple[Tensor, Tally, float]:
    """(text, tally, positions per pass in the last block, the prompt's left out)."""
    block, seen, tally = anatomy(model).blocks[-1], [], Tally()
    assert block.mlp is not None
    options = {**KINDS[kind], "top_k": 0, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
    loop = {} if contender is None else {"custom_generate": contender.decoder, "tally": tally, **contender.parts}
    torch.manual_seed(seed)
    with watching(model, [block.mlp.down], lambda name, layer, x: seen.append(x.shape[-2])):
        text = model.generate(prompt, **loop, **options)
    return text, tally, (sum(seen) - prompt.shape[1] + 1) / len(seen)


def margins(
    found: dict[str, Found], ours: str, others: Sequence[str], texts: int, kind: str = "greedy"
) -> dict[str, tuple[float, float]]:
    """By how many tokens per pass ours is better than each of the others: (mean over texts, standard error)."""
    mine = found[ours].by_text(kind, texts)
    return {name: advantage(found[name].by_text(kind, texts), mine) for name in others}

"""RoE: do several routes through one mixture of experts predict better than one, for the same weights?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.hooks import attached
from lilliput.methods.experts._routing import mixtures_of, routers_of
from lilliput.methods.experts.roe import NAME, PROBABILITIES, RoE, averaged, clean_cache
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import clearly, said
from lilliput.papers._mixtures import text_of, tiny_mixture
from lilliput.papers._paired import advantage

paper = Paper(
    title="MoEs Are Stronger than You Think: Hyper-Parallel Inference Scaling with RoE",
    authors="Soheil Zibakhsh, Mohammad Samragh, Kumari Nishu, Lauren Hannah, Arnav Kundu, Minsik Cho",
    year=2025,
    arxiv="2509.17238",
    claim="Averaging a token's predictions over several noisy choices of experts makes a mixture predict better "
    "without training, the more the more choices, at the memory of one.",
    methods=("experts.roe", "experts.upcycle"),
)

EXPERTS, TOP_K = 32, 8
PLAIN, WIDER, DROPPED = "plain", "more experts a token", "dropout ensemble"
TEMPERATURES, VOTED = "ensemble of temperatures", "draws at a temperature, voted"
RIVALS = (PLAIN, WIDER, DROPPED, TEMPERATURES)
SOFTMAX = (0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3)  # temperatures of a contender's answers
MORE = (12, 16, 24, 32)  # experts a token, of the rival that takes more; all cost less than two routes
HIGHEST = 0.3  # noise; the logits of these routers have a standard deviation of about 0.5
RATES = (0.02, 0.05, 0.1, 0.2)  # of dropout
SPREADS = (1.1, 1.25, 1.5, 2.0)  # highest temperature of an ensemble over its mean
DRAWN = (0.3, 0.6, 1.0)  # temperatures of draws that vote
BATCH = 4  # windows at once
Answer = Callable[[Tensor], Tensor]  # ids (B, T) -> logits (B, T, V)


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int  # updates that heal the mixture
    windows: int  # of test text
    tuning: int  # of validation text
    trials: int  # of the noise
    samples: tuple[int, ...]
    seeds: int = 1


@dataclass
class Found:
    """Of one contender: nats per token and percent right of each test window, as it is and at its best temperature."""

    nats: list[Tensor] = field(default_factory=list)
    calibrated: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    compute: float = 1.0  # times that of the plain mixture

    def row(self, name: str) -> Row:
        """Means over windows and seeds with their standard errors."""
        named = {"nats_per_token": self.nats, "nats_per_token_at_best_temperature": self.calibrated,
                 "accuracy_percent": self.right}  # fmt: skip
        figures = {key: torch.cat(parts).double() for key, parts in named.items() if parts}
        values = {key: float(v.mean()) for key, v in figures.items()} | {"compute": self.compute}
        if self.nats:
            values["perplexity"] = float(figures["nats_per_token"].mean().exp())
        return Row(name, values, {key: float(v.std() / len(v) ** 0.5) for key, v in figures.items()})


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """A mixture made of llama-tiny; what each contender may choose is chosen on validation text.

    Holds when, each at its best softmax temperature, the most samples have a lower loss on test windows than every one
    of RIVALS by more than two standard errors, and no lower accuracy than the plain mixture.
    """
    small = Effort(steps=128, windows=24, tuning=8, trials=16, samples=(2, 4, 8))
    effort = Effort(steps=600, windows=64, tuning=16, trials=60, samples=(2, 4, 8, 16), seeds=3) if full else small
    found: dict[str, Found] = {}
    noise: list[tuple[float, ...]] = []
    for s in range(seed, seed + effort.seeds):
        work, model = tiny_mixture(EXPERTS, TOP_K, effort.steps, effort.windows, s)
        texts = text_of(work, "validation", effort.tuning), text_of(work, "test", effort.windows)
        noise.append(compare(found, model, *texts, effort, s))
    ours = name_of(effort.samples[-1])
    margins = {name: margin(found, ours, name) for name in RIVALS}
    better = float(torch.cat(found[ours].right).mean() - torch.cat(found[PLAIN].right).mean())
    best = min(margins, key=lambda name: margins[name][0])
    return Evidence(
        setup=f"llama-tiny split into {EXPERTS} experts a layer, {TOP_K} used, {effort.steps} steps of healing, "
        f"{effort.windows} test windows of 128 tokens, noise {[[round(t, 3) for t in taus] for taus in noise]} found "
        f"in {effort.trials} trials on {effort.tuning} validation windows, seeds from {seed}, CPU",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(margins, better),
        figure=f"{effort.samples[-1]} routes: {said(margins[PLAIN], 4)} nats per token better than one, {better:+.2f} "
        f"points of accuracy; {said(margins[best], 4)} than the strongest rival ({best})",
        limits="A mixture split off a dense model of 3 million parameters and healed shortly, next-token loss instead "
        "of benchmarks. How routes are weighted and averaged is reconstructed. Compute counts weights, not time.",
    )


def judge(margins: dict[str, tuple[float, float]], better: float) -> bool:
    """The rule of `experiment`; margins are (mean, standard error) by which ours is better, `better` is accuracy."""
    return all(clearly(margins[name]) for name in RIVALS) and better >= 0


def name_of(samples: int) -> str:
    return f"RoE, {samples} routes"


def margin(found: dict[str, Found], ours: str, other: str) -> tuple[float, float]:
    """Nats per token that ours is better than another, each at its best temperature, with the standard error."""
    return advantage(torch.cat(found[ours].calibrated), torch.cat(found[other].calibrated))


# --- contenders --------------------------------------------------------------------------------------------------


def compare(
    found: dict[str, Found], model: Any, tuning: Tensor, test: Tensor, effort: Effort, seed: int
) -> tuple[float, ...]:
    """Every contender on one mixture; the noise of RoE, found with four samples."""
    most = effort.samples[-1]

    def note(name: str, answer: Answer, compute: float) -> None:
        found.setdefault(name, Found()).compute = compute
        score(found[name], answer, tuning, test)

    plain = answer_of(model)
    note(PLAIN, plain, 1.0)
    taus = RoE(samples=4, seed=seed).tuned(model, list(tuning.split(BATCH)), effort.trials, HIGHEST)
    for samples in effort.samples:
        settings = RoE(samples=samples, seed=seed)
        note(name_of(samples), lambda ids, s=settings: s.logits(model, ids, taus), float(samples))
    wide, share = wider(model, tuning)
    note(WIDER, wide, share)
    note(DROPPED, dropout(model, tuning, most, seed), float(most))
    note(TEMPERATURES, temperatures(plain, tuning, most), float(most))
    vote(found.setdefault(VOTED, Found(compute=float(most))), plain, tuning, test, most, seed)
    return taus


def wider(model: Any, tuning: Tensor) -> tuple[Answer, float]:
    """The model with as many experts a token, and that sum of their weights, as predict best, and its compute."""
    usual = RoE(samples=1).cost(model, 1).flops
    options = {}
    for top_k in MORE:
        for scale in (float(TOP_K), float(top_k)):
            other = copy.deepcopy(model)
            for router in routers_of(other, NAME):
                router.top_k, router.scale = top_k, scale
            options[other] = RoE(samples=1).cost(other, 1).flops / usual
    answers = {other: answer_of(other) for other in options}
    best = min(options, key=lambda other: float(nats(answers[other], tuning).mean()))
    return answers[best], options[best]


def answer_of(model: Any) -> Answer:
    """The logits of a model."""

    def answer(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return answer


def dropout(model: Any, tuning: Tensor, samples: int, seed: int) -> Answer:
    """The average over dropout behind the mixtures, the first sample without and alone writing keys and values, at the
    best of RATES."""

    def at(rate: float) -> Answer:
        def answer(ids: Tensor) -> Tensor:
            cache = clean_cache(model)
            for layer in cache.layers:
                layer.samples = samples  # pyright: ignore[reportAttributeAccessIssue]
            with torch.no_grad(), dropping(model, rate, samples, torch.Generator().manual_seed(seed)):
                rows = ids.repeat_interleave(samples, 0)
                logits = model(input_ids=rows, past_key_values=cache, use_cache=True).logits
            return averaged(logits.unflatten(0, (len(ids), samples)), PROBABILITIES)

        return answer

    return min(map(at, RATES), key=lambda answer: float(nats(answer, tuning).mean()))


@contextmanager
def dropping(model: nn.Module, rate: float, samples: int, generator: torch.Generator) -> Iterator[None]:
    """Inside, what mixtures give (B K, T, d) is dropped out, in all rows but the first of each text."""

    def hook(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        keep = (torch.rand(output.shape, generator=generator) >= rate) / (1 - rate)
        keep[::samples] = 1
        return output * keep

    handles = [model.get_submodule(part.name).register_forward_hook(hook) for part in mixtures_of(model, NAME)]
    with attached(handles):
        yield


def temperatures(plain: Answer, tuning: Tensor, samples: int) -> Answer:
    """The average of the plain model's answers at temperatures spread about 1, at the best of SPREADS."""

    def at(spread: float) -> Answer:
        scales = torch.logspace(-1, 1, samples, base=spread)

        def answer(ids: Tensor) -> Tensor:
            return averaged(plain(ids)[:, None] / scales[:, None, None], PROBABILITIES)

        return answer

    return min(map(at, SPREADS), key=lambda answer: float(nats(answer, tuning).mean()))


def vote(found: Found, plain: Answer, tuning: Tensor, test: Tensor, draws: int, seed: int) -> None:
    """Accuracy of the most frequent of some tokens drawn from the plain model, at the best temperature of DRAWN."""

    def rights(ids: Tensor, temperature: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = (plain(ids)[:, :-1] / temperature).softmax(-1).flatten(0, 1).multinomial(
            draws, replacement=True, generator=generator
        )  # fmt: skip
        voted = drawn.mode(-1).values.view(len(ids), -1)
        return 100 * (voted == ids[:, 1:]).float().mean(-1)

    best = max(DRAWN, key=lambda t: float(torch.cat([rights(ids, t) for ids in tuning.split(BATCH)]).mean()))
    found.right.append(torch.cat([rights(ids, best) for ids in test.split(BATCH)]))


# --- scores ------------------------------------------------------------------------------------------------------


def nats(answer: Answer, texts: Tensor, scales: Sequence[float] = (1.0,)) -> Tensor:
    """(n, len(scales)): loss of each window, in nats per token, with logits divided by each temperature."""
    return torch.cat([losses(answer(ids), ids, scales) for ids in texts.split(BATCH)])


def losses(logits: Tensor, ids: Tensor, scales: Sequence[float]) -> Tensor:
    """(B, len(scales))"""
    targets = ids[:, 1:].flatten()
    found = [F.cross_entropy(logits[:, :-1].float().flatten(0, 1) / t, targets, reduction="none") for t in scales]
    return torch.stack([one.view(len(ids), -1).mean(-1) for one in found], -1)


def score(found: Found, answer: Answer, tuning: Tensor, test: Tensor) -> None:
    """Add losses and accuracy on the test windows, the temperature chosen on the others."""
    best = int(nats(answer, tuning, SOFTMAX).mean(0).argmin())
    parts, right = [], []
    for ids in test.split(BATCH):
        logits = answer(ids)
        parts.append(losses(logits, ids, (1.0, SOFTMAX[best])))
        right.append(100 * (logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean(-1))
    both = torch.cat(parts)
    found.nats.append(both[:, 0])
    found.calibrated.append(both[:, 1])
    found.right.append(torch.cat(right))

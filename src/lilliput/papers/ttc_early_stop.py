"""Early stopping aware of test-time compute: do more tries at each question make up for the training left out?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.methods.train._curves import pass_at_k
from lilliput.methods.train.early_stop import Decision, EarlyStop, Stopper
from lilliput.methods.train.verified_stream import Verifier, sample
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._letters import (
    Letters,
    drawn,
    greedy,
    held_out,
    learned_verifier,
    longest_answer,
    taught,
    tokens_of,
    voted,
    words,
)
from lilliput.papers._paired import advantage
from lilliput.training import Callback, State
from lilliput.zoo import nets

paper = Paper(
    title="FLOP-Efficient Training: Early Stopping Based on Test-Time Compute Awareness",
    authors="Hossam Amer, Maryam Dialameh, Hossein Rajabzadeh, Walid Ahmed, Weiwei Zhang, Yang Liu",
    year=2026,
    arxiv="2601.01332",
    claim="An intermediate checkpoint with several tries per question matches or exceeds the accuracy of the fully "
    "trained model; curves fitted to a few cheap measurements find it while training, and save most of the operations.",
    methods=("train.early_stop",),
)

LENGTHS = (4, 5, 6)  # letters of a word
FULL, FULL_TRIES = "full training, one greedy answer", "full training, as many tries"
STOPPED, PATIENCE = "stopped by the forecast, several tries", "patience, one greedy answer"
LEAST_SAVED = 0.1  # of the training operations
TEMPERATURE = 0.7
SAMPLES = 8  # at each look
PATIENT_LOOKS = 2  # without a better greedy accuracy end the rival's training


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int
    every: int
    validation_words: int
    test_words: int


@dataclass(frozen=True)
class Tested:
    """One model on the test words: right or wrong, (words,)."""

    greedy: Tensor
    passed: Tensor  # any of K tries, expected
    voted: Tensor
    picked: Tensor  # by the verifier


class Snapshots(Callback):
    """The weights at each look."""

    def __init__(self, every: int):
        self.every, self.weights = every, {}

    def on_step(self, state: State) -> None:
        if state.step % self.every == 0:
            self.weights[state.done] = {k: v.clone() for k, v in state.model.state_dict().items()}


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny learns to sort the letters of words, to the end, so that the forecast can be compared with the truth.

    Holds when the forecast stops the run with at least LEAST_SAVED of the training operations saved, and the answer
    that a learned verifier picks among the K* tries is right for at least as many test words as the full training's
    greedy answer. Pass@K, which needs to know the right answer, does not count. `full` trains longer and asks more.
    """
    effort = Effort(480, 20, 128, 400) if full else Effort(240, 20, 64, 200)
    task = Letters(nets.load_tokenizer())
    pool, kept = held_out(words("training", LENGTHS))
    kept = drawn(kept, effort.validation_words + effort.test_words, seed)
    validation, test = ([task.prompt(w) for w in part] for part in _cut(kept, effort.validation_words))
    stopper = EarlyStop(every=effort.every, seed=seed).stopper(lambda m: evaluated(m, task, validation), stops=False)
    snapshots = Snapshots(effort.every)
    model = taught(task, pool, effort.steps, seed, [stopper, snapshots])
    tokens, parameters = tokens_of(pool, effort.steps), sum(p.numel() for p in model.parameters())
    decision = stopper.decision or stopper.decisions[-1]
    tries = decision.tries or 1
    rows, tested = rows_of(model, task, stopper, snapshots, decision, tries, validation, test)
    truth = float(stopper.scores[-1][1].mean())
    gain, error = advantage(tested[FULL].greedy, tested[STOPPED].picked)
    queries = decision.breakeven(parameters, tokens, longest_answer(test), 2.0 * parameters * 2 * longest_answer(test))
    if math.isfinite(queries):
        rows[STOPPED].values["breakeven_questions"] = queries
    return Evidence(
        setup=f"llama-tiny sorting the letters of State of the Union words of {LENGTHS} letters, {effort.steps} steps "
        f"({tokens:.0f} tokens), a look every {effort.every} with {len(validation)} validation words and {SAMPLES} "
        f"answers of temperature {TEMPERATURE}, {len(test)} test words, seed {seed}; "
        f"{torch.get_num_threads()} threads, CPU",
        rows=list(rows.values()),
        holds=judge(stopper.decision, gain),
        figure=f"stops after {decision.share:.0%} of the training with {tries} tries; verifier-picked {100 * gain:+.1f}"
        f" ± {100 * error:.1f} points against full training's greedy answer; forecast {100 * decision.forecast:.0f} "
        f"[{100 * decision.low:.0f}, {100 * decision.high:.0f}] %, truth {100 * truth:.0f} %; the tries use up the "
        f"saving after {queries:.3g} questions",
        limits="A small model on one synthetic task with a short training, one seed; the learning rate falls over the "
        "whole run, so an early checkpoint has had a higher one. Operations are counted (6 N D and 2 N L), looks are "
        "not. The accuracy begins near zero, where no curve can forecast.",
    )


def _cut(kept: Sequence[str], at: int) -> tuple[Sequence[str], Sequence[str]]:
    return kept[:at], kept[at:]


def judge(decision: Decision | None, gain: float) -> bool:
    """The rule of `experiment`; `gain` is the picked answers' accuracy over the full training's greedy one."""
    return decision is not None and 1 - decision.share >= LEAST_SAVED and gain >= 0


def evaluated(model: nn.Module, task: Letters, prompts: Sequence[Tensor]) -> dict[int, Tensor]:
    """What the stopper sees: the greedy answer for one try, pass@K of samples for more."""
    answers = sample(model, prompts, SAMPLES, longest_answer(prompts), TEMPERATURE, 0)
    right = task.rights(prompts, answers)
    return {1: greedy(model, task, prompts)} | {k: pass_at_k(right, k) for k in (2, 4, SAMPLES)}


def rows_of(
    model: nn.Module,
    task: Letters,
    stopper: Stopper,
    snapshots: Snapshots,
    decision: Decision,
    tries: int,
    validation: Sequence[Tensor],
    test: Sequence[Tensor],
) -> tuple[dict[str, Row], dict[str, Tested]]:
    """The contenders on the test words. The verifier has learned from the stopped model's answers to validation
    words, and judges for the fully trained one too."""
    best, ended = patience(stopper)
    model.load_state_dict(snapshots.weights[decision.share])
    verifier = learned_verifier(model, task, validation, SAMPLES, TEMPERATURE, seed=1)
    tested = {STOPPED: tested_on(model, task, test, tries, verifier)}
    model.load_state_dict(snapshots.weights[best])
    patient = greedy(model, task, test)
    model.load_state_dict(snapshots.weights[max(snapshots.weights)])
    tested[FULL] = tested_on(model, task, test, tries, verifier)
    rows = {
        FULL: Row(FULL, {"training_percent": 100.0, "tries": 1, **accuracy("greedy", tested[FULL].greedy)}),
        FULL_TRIES: row_with_tries(FULL_TRIES, tested[FULL], 1.0, tries),
        STOPPED: row_with_tries(STOPPED, tested[STOPPED], decision.share, tries),
        PATIENCE: Row(PATIENCE, {"training_percent": 100 * ended, "tries": 1, **accuracy("greedy", patient)}),
    }
    truth = float(stopper.scores[-1][1].mean())
    rows[STOPPED].values["forecast_error_points"] = 100 * (decision.forecast - truth)
    return rows, tested


def patience(stopper: Stopper) -> tuple[float, float]:
    """A training that waits PATIENT_LOOKS for a better greedy accuracy: the shares of its best look and of its end."""
    best, at, end = -1.0, 0, len(stopper.scores) - 1
    for i, scores in enumerate(stopper.scores):
        value = float(scores[1].mean())
        if value > best:
            best, at = value, i
        elif i - at >= PATIENT_LOOKS:
            end = i
            break
    return stopper.shares[at], stopper.shares[end]


def tested_on(model: nn.Module, task: Letters, prompts: Sequence[Tensor], tries: int, verifier: Verifier) -> Tested:
    """Every way to answer with one model."""
    answers = sample(model, prompts, max(tries, SAMPLES), longest_answer(prompts), TEMPERATURE, 2)
    votes = [voted(found[:tries]) for found in answers]
    picks = [found[int(verifier(prompt, found[:tries]).argmax())] for prompt, found in zip(prompts, answers)]
    chosen = [torch.tensor([task.right(p, a) for p, a in zip(prompts, by)]).double() for by in (votes, picks)]
    return Tested(greedy(model, task, prompts), pass_at_k(task.rights(prompts, answers), tries), *chosen)


def row_with_tries(name: str, tested: Tested, share: float, tries: int) -> Row:
    """A contender with several tries."""
    values = {"training_percent": 100 * share, "tries": float(tries)}
    for way in ("greedy", "picked", "voted", "passed"):
        values |= accuracy(way, getattr(tested, way))
    return Row(name, values)


def accuracy(way: str, right: Tensor) -> dict[str, float]:
    """Accuracy of one way to answer, in percent."""
    return {f"{way}_accuracy_percent": 100 * float(right.mean())}

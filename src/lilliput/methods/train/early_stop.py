"""Stop training once several tries per question make up for the rest of it.

After each look at the model two curves are fitted: accuracy over training, which forecasts the end of the whole run,
and accuracy over tries K of the model as it is. Training stops at the first point where K* <= `most_tries` tries reach
the forecast, and `decision.breakeven(...)` says for how many questions that pays.

    stopper = EarlyStop().stopper(evaluate)          # evaluate(model) -> right or wrong, (questions, samples)
    train(model, batches, loss, steps=1000, callbacks=[stopper])            # lilliput's own loop
    Trainer(model, args, callbacks=[stopper.for_trainer()])                 # transformers

Paper: Amer et al., FLOP-Efficient Training: Early Stopping Based on Test-Time Compute Awareness, 2026 (arXiv
2601.01332). The form of the curve over tries, the bootstrap over questions and the limits on the first stop are
completions of our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import LABELLED, Facts, Settings, knob
from lilliput.methods.train._curves import (
    CURVES,
    breakeven_queries,
    fewest_tries,
    fit_saturating,
    pass_at_k,
    rising,
    training_operations,
)
from lilliput.training import Callback, State

Scores = Mapping[int, Tensor]  # tries -> accuracy of each question (questions,)
Evaluate = Callable[[Any], Tensor | Scores]
FEWEST_POINTS = 3


@dataclass(frozen=True)
class Decision:
    """What was seen after one look: the share of the run, the forecast of its end and the tries that reach it."""

    share: float  # of the training
    accuracy: float  # of one try
    forecast: float  # of one try at the end of the run, median of the draws
    low: float  # 10th and 90th percentile of the forecast
    high: float
    tries: int | None  # fewest that reach the forecast in enough of the draws
    stop: bool

    def saved_operations(self, parameters: int, tokens: float) -> float:
        """Of a training of `tokens` tokens: what is left out by stopping here."""
        return training_operations(parameters, (1 - self.share) * tokens)

    def breakeven(
        self, parameters: int, tokens: float, tokens_per_answer: float, verifier_operations: float = 0.0
    ) -> float:
        """Questions until the further tries have used up what the training saved; infinite for one try."""
        left = (1 - self.share) * tokens
        return breakeven_queries(parameters, left, tokens_per_answer, self.tries or 1, verifier_operations)


@dataclass(frozen=True)
class EarlyStop(Settings):
    """End a training when more tries at each question are forecast to give what the rest of it would."""

    most_tries: int = knob(16, low=1, high=10_000, help="tries per question that may be spent")
    every: int = knob(50, low=1, high=1_000_000, help="steps between two looks")
    earliest: float = knob(0.25, low=0.0, high=1.0, help="share of the run before which it does not stop")
    curve: str = knob("sigmoid", choices=tuple(CURVES), help="accuracy over tries")
    draws: int = knob(50, low=1, high=10_000, help="bootstrap draws of the questions")
    confidence: float = knob(0.5, low=0.0, high=1.0, help="share of the draws in which the tries must suffice")
    seed: int = knob(0, low=0, help="of the draws")
    facts: ClassVar[Facts] = Facts(stage="train", data=LABELLED, effect="shorter training, several tries per answer")
    paper: ClassVar[str] = "ttc_early_stop"

    def stopper(self, evaluate: Evaluate, stops: bool = True) -> Stopper:
        """A callback of `lilliput.training.train`; `.for_trainer()` gives the one of transformers.

        `evaluate(model)` gives right or wrong of several samples, (questions, samples), or by number of tries the
        accuracy of each question with the selection that will serve, such as {1: (questions,), 4: (questions,)}. With
        `stops=False` the run goes on, and `decisions` tell where it would have ended.
        """
        return Stopper(self, evaluate, stops)


class Stopper(Callback):
    """Looks at a training every few steps. `decisions` holds every look, `decision` the one that stopped it."""

    def __init__(self, settings: EarlyStop, evaluate: Evaluate, stops: bool = True):
        self.settings, self.evaluate, self.stops = settings, evaluate, stops
        self.shares: list[float] = []
        self.scores: list[dict[int, Tensor]] = []
        self.decisions: list[Decision] = []

    @property
    def decision(self) -> Decision | None:
        """The first look that could end the training, None before."""
        return next((d for d in self.decisions if d.stop), None)

    def look(self, share: float, model: nn.Module) -> Decision:
        """Evaluate the model after a share of its training, and decide."""
        with evaluating(model), torch.no_grad():
            scores = by_tries(self.evaluate(model))
        return self.see(share, scores)

    def see(self, share: float, scores: Scores) -> Decision:
        """Decide on scores that are already there."""
        if self.scores and {k: len(v) for k, v in scores.items()} != {k: len(v) for k, v in self.scores[-1].items()}:
            raise UserError(f"evaluate gave tries {sorted(scores)} now and {sorted(self.scores[-1])} before; keep them")
        self.shares.append(share)
        self.scores.append(dict(scores))
        self.decisions.append(decide(self.settings, self.shares, self.scores))
        return self.decisions[-1]

    def on_step(self, state: State) -> None:
        if state.step % self.settings.every == 0 and self.look(state.done, state.model).stop and self.stops:
            state.stop = True

    def for_trainer(self) -> Any:
        """The same as a `transformers.TrainerCallback`."""
        from lilliput.methods.train._trainer_callback import TrainerStopper

        return TrainerStopper(self)

    def memory(self) -> dict[str, Any]:
        if not self.scores:
            return {}
        tries = sorted(self.scores[0])
        stacked = torch.stack([torch.stack([scores[k] for k in tries]) for scores in self.scores])
        return {"shares": self.shares, "tries": tries, "scores": stacked}

    def recall(self, memory: dict[str, Any]) -> None:
        self.shares, self.scores, self.decisions = [], [], []
        for share, scores in zip(memory["shares"], memory["scores"]):
            self.see(share, dict(zip(memory["tries"], scores)))


def by_tries(seen: Tensor | Scores) -> dict[int, Tensor]:
    """What `evaluate` gave as tries -> accuracy of each question; of samples by pass@K for K = 1, 2, 4, ...

    Raises UserError for shapes and values that are no accuracies.
    """
    if isinstance(seen, Tensor):
        if seen.ndim != 2 or 0 in seen.shape:
            raise UserError(f"evaluate gave the shape {tuple(seen.shape)}; give right or wrong as (questions, samples)")
        seen = {2**i: pass_at_k(seen, 2**i) for i in range(int(math.log2(seen.shape[1])) + 1)}
    scores = {int(k): torch.as_tensor(v).double().cpu() for k, v in seen.items()}
    if 1 not in scores or len(scores) < 2 or len({v.shape for v in scores.values()}) != 1 or scores[1].ndim != 1:
        raise UserError(f"evaluate gave tries {sorted(scores)}; give 1 and more, each with one number per question")
    if not all(bool(((v >= 0) & (v <= 1)).all()) for v in scores.values()):
        raise UserError("evaluate gave accuracies outside of 0 to 1")
    return scores


def decide(settings: EarlyStop, shares: list[float], scores: list[dict[int, Tensor]]) -> Decision:
    """The forecast and the tries after all looks so far, over bootstrap draws of the questions."""
    now, last = shares[-1], scores[-1]
    singles = torch.stack([s[1] for s in scores])  # (looks, questions)
    accuracy = float(singles[-1].mean())
    if len(shares) < FEWEST_POINTS:
        return Decision(now, accuracy, accuracy, accuracy, accuracy, None, False)
    questions, generator = singles.shape[1], torch.Generator().manual_seed(settings.seed)
    picks = torch.randint(questions, (settings.draws, questions), generator=generator)
    forecasts, needed = [], []
    for pick in picks:
        forecasts.append(forecast(shares, singles[:, pick].mean(1).tolist()))
        curve = CURVES[settings.curve](sorted(last), [float(last[k][pick].mean()) for k in sorted(last)])
        needed.append(fewest_tries(curve, forecasts[-1], settings.most_tries) or math.inf)
    at = math.ceil(settings.confidence * len(needed)) - 1
    tries = sorted(needed)[max(at, 0)]
    low, middle, high = torch.tensor(forecasts).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    found = int(tries) if math.isfinite(tries) else None
    return Decision(now, accuracy, middle, low, high, found, found is not None and settings.earliest <= now < 1)


def forecast(shares: list[float], accuracies: list[float]) -> float:
    """Accuracy at the whole run: the saturating curve through the rising points, from the best of them up to 1.

    With fewer than FEWEST_POINTS rising points it is the best of them.
    """
    kept = rising(accuracies)
    best = accuracies[kept[-1]]
    if len(kept) < FEWEST_POINTS:
        return best
    curve = fit_saturating([shares[i] for i in kept], [accuracies[i] for i in kept])
    return min(max(curve(1.0), best), 1.0)

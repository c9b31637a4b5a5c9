"""VDS-TTT: does learning the answers that a verifier trusts beat picking answers by the same verifier?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lilliput.methods.train.verified_stream import Answer, VerifiedStream, Verifier
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import clearly
from lilliput.papers._letters import Letters, drawn, greedy, held_out, learned_verifier, taught, voted, words
from lilliput.papers._paired import advantage
from lilliput.zoo import nets

paper = Paper(
    title="Continuous Self-Improvement of Large Language Models by Test-time Training with Verifier-Driven Sample "
    "Selection",
    authors="Mohammad Mahdi Moradi, Hossam Amer, Sudhir Mudur, Weiwei Zhang, Yang Liu, Walid Ahmed",
    year=2025,
    arxiv="2505.19475",
    claim="A model that trains low-rank adapters, while it answers unlabelled queries of a shifted kind, on those of "
    "its own answers that a learned verifier trusts, answers better than the model itself and than the same verifier "
    "picking among the answers of the unchanged model.",
    methods=("train.verified_stream",),
)

EASY, HARD = (4, 5, 6), 7  # letters of the words that are learned, and of the queries
GREEDY, VOTE, PICKED = "base, greedy", "base, majority vote", "base, picked by the verifier"
OURS, UNFILTERED, ORACLE = "VDS-TTT", "TTT on unfiltered answers", "TTT on right answers (oracle, upper bound)"
RIVALS = (GREEDY, VOTE, PICKED)
STEPS = 160  # of learning the task
VERIFIER_WORDS, VERIFIER_SAMPLES = 160, 6
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    queries: int
    orders: int
    easy: int = 96  # words of the learned lengths that show what is forgotten


@dataclass
class Found:
    """Of one contender: right or wrong of every query, in the same order of queries for all, and other figures."""

    right: list[Tensor] = field(default_factory=list)  # one (queries,) for each order
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, right: Tensor, **values: float) -> None:
        self.right.append(right.double())
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def by_query(self) -> Tensor:
        """(queries,): share of the orders in which the answer was right."""
        return torch.stack(self.right).mean(0)

    def row(self, name: str) -> Row:
        """Means; the spread of the accuracy is its standard error over queries, of the rest over orders."""
        right = self.by_query()
        values = {"accuracy_percent": 100 * float(right.mean())}
        spread = {"accuracy_percent": 100 * float(right.std()) / len(right) ** 0.5}
        for key, numbers in self.values.items():
            figures = torch.tensor(numbers, dtype=torch.float64)
            values[key] = float(figures.mean())
            spread |= {key: float(figures.std())} if len(figures) > 1 else {}
        return Row(name, values, spread)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny learns to sort the letters of words of 4 to 6 letters; the stream asks for words of 7.

    Holds when the accuracy of VDS-TTT over the stream, mean of three or more random orders, is above that of each of
    RIVALS by more than two standard errors over queries. `full` asks more queries in five orders.
    """
    effort = Effort(512, 5, 192) if full else Effort(96, 2)
    task = Letters(nets.load_tokenizer())
    pool, kept = held_out(words("training", EASY))
    model = taught(task, pool, STEPS, seed)
    kept = drawn(kept, VERIFIER_WORDS + effort.easy, seed)
    known = [task.prompt(word) for word in kept[:VERIFIER_WORDS]]
    verifier = learned_verifier(model, task, known, VERIFIER_SAMPLES, TEMPERATURE, seed)
    queries = [task.prompt(word) for word in drawn(words("test", [HARD])[HARD], effort.queries, seed)]
    easy = [task.prompt(word) for word in kept[VERIFIER_WORDS:]]
    found = compare(model, task, verifier, queries, easy, effort, seed)
    margins = {name: advantage(found[name].by_query(), found[OURS].by_query()) for name in RIVALS}
    learned, trusted = found[OURS].values["learned_share"], found[OURS].values["learned_right_share"]
    return Evidence(
        setup=f"llama-tiny, {STEPS} steps of sorting letters of State of the Union words of {EASY} letters, then "
        f"{len(queries)} words of {HARD} letters in {effort.orders} random orders (seed {seed}); 8 answers of "
        f"temperature {TEMPERATURE}, threshold {VerifiedStream().threshold}; verifier: a probe of the base model "
        f"trained on held-out words of {EASY} letters; {torch.get_num_threads()} threads, CPU",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(margins),
        figure="; ".join(f"{100 * m:+.1f} ± {100 * e:.1f} points over {name}" for name, (m, e) in margins.items())
        + f"; learned {100 * sum(learned) / len(learned):.0f} % of its answers, of which "
        f"{100 * sum(trusted) / len(trusted):.0f} % were right",
        limits="A model of 3 million parameters and a task of its own instead of GSM8K, MATH and AIME with large "
        "models. One random order for the rivals that learn. Number of answers, threshold, rate and updates are ours.",
    )


def judge(margins: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; margins are (mean, standard error) by which ours is more accurate."""
    return all(map(clearly, margins.values()))


def compare(
    model: nn.Module,
    task: Letters,
    verifier: Verifier,
    queries: list[Tensor],
    easy: list[Tensor],
    effort: Effort,
    seed: int,
) -> dict[str, Found]:
    """Every contender on the same queries."""
    found = {name: Found() for name in (GREEDY, VOTE, PICKED, OURS, UNFILTERED, ORACLE)}
    base_easy = 100 * float(greedy(model, task, easy).mean())
    found[GREEDY].add(greedy(model, task, queries), easy_accuracy_percent=base_easy)
    oracle = right_or_wrong(task)
    for i in range(effort.orders):
        order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(1000 * seed + i))
        method = VerifiedStream(temperature=TEMPERATURE, new_tokens=HARD + 1, block=8, seed=1000 * seed + i)
        asked = [queries[j] for j in order.tolist()]
        answers = stream(found[PICKED], method.with_(steps=0), model, task, verifier, asked, order)
        votes = torch.tensor([task.right(q, voted(a.candidates)) for q, a in zip(asked, answers)]).double()
        found[VOTE].add(votes[order.argsort()])
        stream(found[OURS], method, model, task, verifier, asked, order, easy=easy)
        if i == 0:
            stream(found[UNFILTERED], method, model, task, verifier, asked, order, first, easy)
            stream(found[ORACLE], method, model, task, verifier, asked, order, oracle, easy)
    return found


def stream(
    one: Found,
    method: VerifiedStream,
    model: nn.Module,
    task: Letters,
    verifier: Verifier,
    asked: list[Tensor],
    order: Tensor,
    teacher: Verifier | None = None,
    easy: Sequence[Tensor] = (),
) -> list[Answer]:
    """Ask all queries in an order, and note what came out."""
    start = time.perf_counter()
    with method.open(model, verifier, teacher) as opened:
        answers = [a for i in range(0, len(asked), method.block) for a in opened.ask(asked[i : i + method.block])]
        seconds = time.perf_counter() - start
        figures = {"easy_accuracy_percent": 100 * float(greedy(model, task, easy).mean())} if easy else {}
    right = torch.tensor([task.right(q, a.tokens) for q, a in zip(asked, answers)]).double()
    learned = [task.right(q, a.learned) for q, a in zip(asked, answers) if a.learned is not None]
    if method.steps:
        figures["learned_share"] = len(learned) / len(asked)
        figures["learned_right_share"] = sum(learned) / max(len(learned), 1)
    trust = torch.tensor([a.trust for a in answers])
    quarter = len(asked) // 4
    one.add(
        right[order.argsort()],
        first_quarter_percent=100 * float(right[:quarter].mean()),
        last_quarter_percent=100 * float(right[-quarter:].mean()),
        trust_above_accuracy_points=100 * float(trust.mean() - right.mean()),
        seconds_per_query=seconds / len(asked),
        **figures,
    )
    return answers


def right_or_wrong(task: Letters) -> Verifier:
    """A verifier that knows."""
    return lambda prompt, answers: torch.tensor([float(task.right(prompt, a)) for a in answers])


def first(prompt: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """Full trust in the answer that was drawn first: no filter."""
    return torch.tensor([1.0, *[0.0] * (len(answers) - 1)])

"""Bayesian mixture of experts: does a Laplace approximation of the experts give a fine-tuned mixture honest doubt?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.methods.defend._expert_tokens import sites_of
from lilliput.methods.defend.bayesian_moe import AnswerTokens, BayesianMoe, best_by_likelihood
from lilliput.methods.experts.upcycle import COPY, Upcycle
from lilliput.metrics.intervals import ranking_area
from lilliput.metrics.latency import measure
from lilliput.metrics.quality import calibration_error
from lilliput.paper import Evidence, Paper
from lilliput.papers._by_seed import BySeed
from lilliput.papers._eras import Eras, answer_tokens, eras
from lilliput.papers._healed import clearly, close, said
from lilliput.training import train
from lilliput.workload import Batch, Workload
from lilliput.zoo import nets

paper = Paper(
    title="Bayesian Mixture of Experts For Large Language Models",
    authors="Maryam Dialameh, Hossein Rajabzadeh, Weiwei Zhang, Walid Ahmed, Hyock Ju Kwon",
    year=2025,
    arxiv="2511.08968",
    claim="A Kronecker-factored Laplace approximation of the second linear layer of each expert, made after "
    "fine-tuning and without new parameters, gives a mixture of experts a lower calibration error and a lower negative "
    "log-likelihood than the point estimate, dropout at test time and ensembles.",
    methods=("defend.bayesian_moe", "experts.upcycle"),
)

POINT, TEMPERATURE, DROPOUT, ENSEMBLE = "point estimate", "temperature scaling", "dropout at test time", "ensemble of 3"
OURS, TUNED = "Laplace, prior by evidence", "Laplace, prior by validation"
RIVALS = (POINT, DROPOUT, ENSEMBLE)
PLAIN = "plain model"  # is put before the names of the contenders without experts
MEMBERS = 3
EXPERTS, TOP_K, NOISE = 4, 2, 0.02
TEMPERATURES = tuple(2 ** (i / 4) for i in range(-8, 17))
RATES, PASSES = (0.05, 0.2), 5
LR = 1e-3
NEAR = 0.02  # nats by which ours may be behind temperature scaling


@dataclass(frozen=True)
class Effort:
    """How much the experiment does."""

    seeds: int
    training: int  # windows of each of the four times
    steps: int
    validation: int
    test: int
    length: int = 24
    blocks: int = 2  # whose experts are uncertain; 0: all
    rank: int = 64


DEFAULT = Effort(seeds=3, training=60, steps=100, validation=25, test=40)
FULL = Effort(seeds=8, training=200, steps=400, validation=100, test=120, length=64, blocks=0, rank=0)

Answer = Callable[[Batch], Tensor]  # log-probabilities (B, C)


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny, its feed-forward parts copied to EXPERTS experts, fine-tuned until it is too sure of which of four
    times a piece of an address is; and the same without experts.

    Holds when Laplace with the evidence's prior has a lower calibration error and a lower negative log-likelihood on
    test documents than each of RIVALS by more than two standard errors over seeds, and is not more than NEAR nats
    behind temperature scaling, which knows the validation labels.
    """
    effort = FULL if full else DEFAULT
    counts = {"training": effort.training, "validation": effort.validation, "test": effort.test}
    data = eras(counts, effort.length, seed)
    found, first = BySeed(), 1000 * seed
    seeds = range(first, first + max(effort.seeds, MEMBERS) + 1)
    mixtures = [tuned_model(mixture(s), data, effort, s) for s in seeds]
    for place, s in enumerate(seeds[: effort.seeds]):
        members = [mixtures[(place + i) % len(mixtures)] for i in range(MEMBERS)]
        note(found, contenders(mixtures[place], members, data, effort), data)
        plain = tuned_model(AnswerTokens(nets.load("llama-tiny"), answer_tokens()), data, effort, s)
        note(found, contenders(plain, [], data, effort), data, f"{PLAIN}, ")
    return evidence(found, effort, seed)


# --- the models --------------------------------------------------------------------------------------------------


def mixture(seed: int) -> nn.Module:
    """llama-tiny with copies of its feed-forward parts as experts: nearly the same function at first."""
    method = Upcycle(experts=EXPERTS, top_k=TOP_K, how=COPY, noise=NOISE, steps=0, seed=seed)
    return AnswerTokens(method.apply(nets.load("llama-tiny")), answer_tokens())


def tuned_model(model: nn.Module, data: Eras, effort: Effort, seed: int) -> nn.Module:
    """Fine-tuned on few windows, many times over."""
    train(model, data.training, lambda net, batch: F.cross_entropy(net(batch["input"]), batch["label"]),
          steps=effort.steps, lr=LR, clip_norm=1.0, seed=seed)  # fmt: skip
    return model.eval()


# --- the contenders ----------------------------------------------------------------------------------------------


def contenders(model: nn.Module, members: Sequence[nn.Module], data: Eras, effort: Effort) -> dict[str, Answer]:
    """Ways to get probabilities; all of them where there are `members` of an ensemble."""
    work = Workload.classifier(model, data.training, data.validation, data.test, training=data.training)
    guarded = BayesianMoe(blocks=effort.blocks, rank=effort.rank).wrap(model, work)
    found: dict[str, Answer] = {POINT: plain_answer(model), TEMPERATURE: tempered(model, data.validation)}
    found[OURS] = plain_answer(guarded)
    if not members:
        return found
    likeliest = copy.copy(guarded)
    likeliest.precision = best_by_likelihood(guarded, work)
    found[TUNED] = plain_answer(likeliest)
    return found | {DROPOUT: dropped(model, data.validation), ENSEMBLE: averaged([plain_answer(m) for m in members])}


def plain_answer(model: nn.Module) -> Answer:
    """The log-softmax of what a model gives."""

    @torch.no_grad()
    def answer(batch: Batch) -> Tensor:
        return model(batch["input"]).log_softmax(-1)

    return answer


def tempered(model: nn.Module, validation: Sequence[Batch]) -> Answer:
    """Logits over the temperature that is the likeliest on validation data."""
    answer = plain_answer(model)
    logits, labels = everything(answer, validation), labels_of(validation)
    best = min(TEMPERATURES, key=lambda t: float(F.cross_entropy(logits / t, labels)))
    return lambda batch: (answer(batch) / best).log_softmax(-1)


def averaged(answers: Sequence[Answer]) -> Answer:
    """The mean of probabilities."""
    return lambda batch: torch.stack([answer(batch) for answer in answers]).exp().mean(0).log()


def dropped(model: nn.Module, validation: Sequence[Batch]) -> Answer:
    """Mean over PASSES with the experts' sums dropped at the rate that is the likeliest on validation data."""
    sites = [site.name for site in sites_of(model, "dropout", 0)]

    def at(rate: float) -> Answer:
        def answer(batch: Batch) -> Tensor:
            with dropping(model, sites, rate):
                return averaged([plain_answer(model)] * PASSES)(batch)

        return answer

    labels = labels_of(validation)
    return min(map(at, RATES), key=lambda answer: float(F.nll_loss(everything(answer, validation), labels)))


@contextmanager
def dropping(model: nn.Module, names: Sequence[str], rate: float) -> Iterator[None]:
    """Dropout on what the named modules give, from a fixed seed."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda module, args, out: F.dropout(out, rate))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_rng_state(state)


# --- figures -----------------------------------------------------------------------------------------------------


def everything(answer: Answer, batches: Sequence[Batch]) -> Tensor:
    """Log-probabilities (n, C) of all batches."""
    return torch.cat([answer(batch) for batch in batches])


def labels_of(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch["label"] for batch in batches])


def note(found: BySeed, contenders: dict[str, Answer], data: Eras, before: str = "") -> None:
    """Measure every contender."""
    one = {"input": data.test[0]["input"][:1]}
    for name, answer in contenders.items():
        figures = judged(everything(answer, data.test), labels_of(data.test), everything(answer, data.other))
        time = measure(lambda answer=answer: answer(one), min_runs=5, min_seconds=0.1)
        found.note(before + name, figures | {"ms_a_sample": time.median_ms})


def judged(log_p: Tensor, labels: Tensor, other: Tensor) -> dict[str, float]:
    """Quality of log-probabilities (n, C) of texts with labels, and of others (m, C) that are of another kind."""
    sure, answer = log_p.max(-1)
    right = (answer == labels).double()
    surest = sure.argsort(descending=True)[: len(sure) // 2]
    return {
        "accuracy_percent": 100 * float(right.mean()),
        "calibration_error": calibration_error(log_p, labels),
        "nll": float(F.nll_loss(log_p.double(), labels)),
        "accuracy_of_the_surest_half_percent": 100 * float(right[surest].mean()),
        "area_against_other_text": ranking_area(sure, other.max(-1).values).value,
    }


def evidence(found: BySeed, effort: Effort, seed: int) -> Evidence:
    """Rows, and the rule of `experiment`."""
    others, keys = (*RIVALS, TEMPERATURE), ("calibration_error", "nll")
    gains = {key: {name: found.more(name, OURS, key) for name in others} for key in keys}
    errors = {name: found.mean(name, "calibration_error") for name in (OURS, POINT, TEMPERATURE)}
    return Evidence(
        setup=f"llama-tiny with {EXPERTS} experts a block, {TOP_K} a token, {4 * effort.training} windows of "
        f"{effort.length} tokens of State of the Union addresses of four times, {effort.steps} steps; "
        f"{4 * effort.validation} validation and {4 * effort.test} test windows of other documents, as many of "
        f"Moby-Dick; the experts of {f'the last {effort.blocks}' if effort.blocks else 'all'} blocks are uncertain, "
        f"rank {effort.rank or 'full'}; "
        f"{effort.seeds} seeds from {1000 * seed}, {torch.get_num_threads()} threads, CPU",
        rows=found.rows(),
        holds=judge(gains),
        figure=f"calibration error {errors[OURS]:.3f} (point estimate {errors[POINT]:.3f}, temperature "
        f"{errors[TEMPERATURE]:.3f}), nll {found.mean(OURS, 'nll'):.3f}, lower by "
        f"{', '.join(f'{said(g)} than {name}' for name, g in gains['nll'].items())}; "
        f"{found.mean(OURS, 'ms_a_sample'):.0f} ms a sample, without it {found.mean(POINT, 'ms_a_sample'):.0f}",
        limits="A mixture of three million weights a token made of a dense model, one task with four answers, "
        "over-fitted on purpose; the windows of a document are alike, which the errors over seeds do not know. The "
        "paper's models have billions of parameters, and its questions are of common sense.",
    )


def judge(gains: dict[str, dict[str, tuple[float, float]]]) -> bool:
    """The rule of `experiment`; gains are (what ours is lower by, standard error)."""
    better = all(clearly(gains[key][name]) for key in gains for name in RIVALS)
    return better and close(gains["nll"][TEMPERATURE], NEAR)

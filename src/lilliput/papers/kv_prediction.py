"""KV prediction: at the same cost of the first token, does a predicted cache beat a smaller model and a cut prompt?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.methods.decode._backends import TorchBackend
from lilliput.methods.decode._draft import Draft
from lilliput.methods.decode._kv_predictor import KvPredictor, base_parts, key_widths
from lilliput.methods.decode.kv_prediction import KvPrediction, adamw, first_token_flops
from lilliput.methods.distill.logits import batches_of
from lilliput.metrics.latency import Comparison, wait_until_quiet
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import clearly, said
from lilliput.papers._low_rank import interleave, middle, speedup
from lilliput.papers._paired import advantage, last_losses
from lilliput.serving import native_sampling
from lilliput.training import train
from lilliput.workload import Workload

paper = Paper(
    title="KV Prediction for Improved Time to First Token",
    authors="Maxwell Horton, Qingqing Cao, Chenfan Sun, Yanzi Jin, Sachin Mehta, Mohammad Rastegari, Moin Nabi",
    year=2024,
    arxiv="2410.08391",
    claim="When a small model reads the prompt and predicts the large model's cache, the first token comes "
    "earlier, and at the same number of operations before it the text is better than that of the small model alone "
    "and of the large one on a pruned prompt.",
    methods=("decode.kv_prediction",),
)

WHOLE = "the whole model"
OURS, UNTRAINED = "KV prediction", "KV prediction, least squares alone"
SMALL, CUT, DROPPED = "the small model alone", "the prompt's last tokens", "the prompt's tokens at random"
RIVALS = (SMALL, CUT, DROPPED)
LARGE = "smollm2-135m"
LR = 1e-3  # of all that learn
ONE = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int  # of training, 4 windows each
    seeds: int
    keeps: tuple[float, ...] = (1 / 3, 2 / 3)  # shares of the blocks that the small model has
    prompts: tuple[tuple[int, int], ...] = ((192, 64), (48, 16))  # tokens that are read, and scored behind them
    rounds: int = 15


@dataclass
class Found:
    """Of one contender: losses of each seed (windows, tokens), operations and milliseconds up to the first token."""

    flops: int
    losses: list[Tensor] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)

    def by_window(self) -> Tensor:
        """(windows,): loss of the continuation in nats per token, the mean over its tokens and over seeds."""
        return torch.stack([losses.double().mean(1) for losses in self.losses]).mean(0)

    def row(self, name: str) -> Row:
        """Means; the spread of the loss is its standard error over windows, of the time half its quartile range."""
        values: dict[str, float] = {"first_token_mflops": self.flops / 1e6}
        spread: dict[str, float] = {}
        if self.losses:
            values["nats_per_token"] = float(self.by_window().mean())
            spread["nats_per_token"] = float(self.by_window().std()) / len(self.by_window()) ** 0.5
        if self.ms:
            values["first_token_ms"], wide = middle(self.ms)
            spread["first_token_ms"] = wide / 2
        return Row(name, values, spread)


def at(name: str, prompt: int, keep: float | None = None) -> str:
    """The name of a contender whose first token costs what KV prediction costs with that share of the blocks."""
    return f"{name}, {prompt} tokens" + ("" if keep is None else f", {keep:.0%} of the blocks")


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny goes on with State of the Union prompts behind caches that small models of its own blocks predict.

    Holds when, for long and for short prompts and every share of the blocks, the loss of the continuation is below that
    of each of RIVALS at no lower cost of the first token (the small model's own is what it is) by more than two
    standard errors over windows, and the first token behind a long prompt comes earlier than the whole model's, on
    llama-tiny and with SmolLM2-135M's sizes (whole interval of the paired ratio). `full` trains longer, on three seeds
    and four shares.
    """
    effort = Effort(1000, 3, (1 / 6, 1 / 3, 1 / 2, 2 / 3), rounds=31) if full else Effort(60, 1)
    more: dict[str, Any] = {"windows": {"training": 2048, "test": 128}} if full else {}
    work = Workload.from_name("llama-tiny", **more)
    found: dict[str, Found] = {}
    runs: dict[str, Run] = {}
    for s in range(seed, seed + effort.seeds):
        runs = compare(found, work, effort, s)
    busy = wait_until_quiet()
    ratios = timed(found, runs, effort.rounds) | large_times(found, max(5, effort.rounds // 3))
    margins = {
        (rival, prompt, keep): advantage(
            found[at(OURS, prompt, keep)].by_window(), found[at(rival, prompt, keep)].by_window()
        )
        for prompt, _ in effort.prompts
        for keep in effort.keeps
        for rival in RIVALS
    }
    return Evidence(
        setup=f"llama-tiny, {effort.steps} steps of 4 x 256 tokens for the predictor and for the small model alone, "
        f"learning rate {LR}; test windows cut into prompts and the tokens that are scored behind them "
        f"({' and '.join(f'{prompt} + {scored}' for prompt, scored in effort.prompts)}), seeds {seed} to "
        f"{seed + effort.seeds - 1}; first tokens by the native decoder in {effort.rounds} turns, "
        f"{torch.get_num_threads()} threads, CPU; other work kept {busy:.1f} cores busy",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(margins, ratios),
        figure=summary(found, margins, ratios, effort),
        limits="Next-token loss on plain text, not TriviaQA and HumanEval; a model of 3 million parameters, which "
        "uses little of what stands more than some 60 tokens back: behind long prompts there is hardly anything to win "
        "over the last tokens. The training is 100,000 times shorter or more. The small models are copies of its own "
        "blocks alone. The prompt is pruned by place and at random, not by attention. The predictor of SmolLM2-135M is "
        "not trained: its time does not depend on that.",
    )


Margins = dict[tuple[str, int, float], tuple[float, float]]  # (rival, prompt, share) -> ours is better by, error


def summary(found: dict[str, Found], margins: Margins, ratios: dict[str, Comparison], effort: Effort) -> str:
    """By length of prompt what ours loses against the whole model and gains over the nearest rival; the times."""
    parts = []
    for prompt, _ in effort.prompts:
        whole = found[at(WHOLE, prompt)].by_window()
        lost = [advantage(whole, found[at(OURS, prompt, keep)].by_window()) for keep in effort.keeps]
        listed = ", ".join(map(said, lost))
        nearest = min((key for key in margins if key[1] == prompt), key=lambda key: margins[key][0])
        parts.append(
            f"{prompt} tokens: {listed} nats from the whole model, {said(margins[nearest])} over {nearest[0]} at "
            f"{nearest[2]:.0%} of the blocks"
        )
    times = ", ".join(f"{name} {ratio}" for name, ratio in ratios.items())
    shares = ", ".join(f"{keep:.0%}" for keep in effort.keeps)
    return f"{shares} of the blocks: {'; '.join(parts)}; first token: {times}"


def judge(margins: Margins, ratios: dict[str, Comparison]) -> bool:
    """The rule of `experiment`; margins are (mean, standard error) by which ours is better."""
    return all(map(clearly, margins.values())) and all(ratio.gain for ratio in ratios.values())


# --- contenders --------------------------------------------------------------------------------------------------


def compare(found: dict[str, Found], work: Workload, effort: Effort, seed: int) -> dict[str, Run]:
    """Note the losses of every contender with one seed; gives what is timed, behind the first length of prompt."""
    runs: dict[str, Run] = {}
    for keep in effort.keeps:
        method = KvPrediction(keep=keep, steps=effort.steps, lr=LR, runtime="lean", seed=seed)
        untrained = method.begin(work).eval()
        trained, _ = method.train_(copy.deepcopy(untrained), work)
        small = healed(method, work)
        for size in effort.prompts:
            at_cost_of(found, work, trained, untrained, small, (*size, keep, seed))
        runs |= timings(work, method, trained, small, effort.prompts[0][0], keep)
    return runs


def at_cost_of(
    found: dict[str, Found],
    work: Workload,
    trained: KvPredictor,
    untrained: KvPredictor,
    small: nn.Module,
    case: tuple[int, int, float, int],
) -> None:
    """Note the losses behind prompts of one length, of everything that costs what the predictor costs."""
    prompt, scored, keep, seed = case
    model = work.model
    windows = torch.cat([batch["input_ids"] for batch in work.test]).reshape(-1, prompt + scored)
    cost = first_token_flops(model, prompt, trained)
    kept = tokens_for(model, cost)
    pruned = first_token_flops(model, kept)
    if at(WHOLE, prompt) not in found:  # it is the same with every seed
        note(found, at(WHOLE, prompt), first_token_flops(model, prompt), tail(model, windows, scored))
    note(found, at(UNTRAINED, prompt, keep), cost, predicted(model, untrained, windows, prompt))
    note(found, at(OURS, prompt, keep), cost, predicted(model, trained, windows, prompt))
    note(found, at(SMALL, prompt, keep), first_token_flops(small, prompt), tail(small, windows, scored))
    note(found, at(CUT, prompt, keep), pruned, tail(model, windows[:, -kept - scored :], scored))
    note(found, at(DROPPED, prompt, keep), pruned, dropped(model, windows, kept, prompt, seed))


def timings(
    work: Workload, method: KvPrediction, predictor: KvPredictor, small: nn.Module, prompt: int, keep: float
) -> dict[str, Run]:
    """First tokens behind one prompt."""
    model, question = work.model, work.test[0]["input_ids"][:1, :prompt]
    kept = tokens_for(model, first_token_flops(model, prompt, predictor))
    return {
        at(WHOLE, prompt): partial(first_token, model, question),
        at(OURS, prompt, keep): partial(first_token, model, question, method, predictor=predictor),
        at(SMALL, prompt, keep): partial(first_token, small, question),
        at(CUT, prompt, keep): partial(first_token, model, question[:, -kept:]),
    }


def note(found: dict[str, Found], name: str, flops: int, losses: Tensor) -> None:
    """Losses of one contender and seed."""
    found.setdefault(name, Found(flops)).losses.append(losses)


def healed(method: KvPrediction, work: Workload) -> nn.Module:
    """The small model that the predictor begins with, trained for itself as long and as the predictor is."""
    small = method.auxiliary(work.model)
    train(small, batches_of(work), work.loss, steps=method.steps, lr=method.lr, optimizer=adamw, clip_norm=1.0,
          seed=method.seed)  # fmt: skip
    return small.eval()


def tokens_for(model: nn.Module, flops: int) -> int:
    """Tokens of a prompt at which the model's own first token costs as much, or just more."""
    kept = 1
    while first_token_flops(model, kept) < flops:
        kept += 1
    return kept


# --- losses ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def tail(model: Any, windows: Tensor, scored: int) -> Tensor:
    """(n, scored): losses of the last tokens of windows that the model reads itself."""
    return last_losses(model(input_ids=windows, use_cache=False).logits, windows, scored)


@torch.no_grad()
def predicted(model: Any, predictor: KvPredictor, windows: Tensor, prompt: int) -> Tensor:
    """(n, rest): the same behind a predicted cache; from the prompt's last token on it is the model's own."""
    found = []
    for ids in windows:
        engine = TorchBackend(model)
        engine.fill(predictor.predict(model, ids[: prompt - 1]))
        logits = engine.extend(ids[prompt - 1 : prompt], Draft.chain(ids[prompt:].tolist()))
        found.append(last_losses(logits[None], ids[None], len(ids) - prompt))
    return torch.cat(found)


@torch.inference_mode()
def dropped(model: Any, windows: Tensor, kept: int, prompt: int, seed: int) -> Tensor:
    """(n, rest): losses when of the prompt `kept` tokens are read, its last one and others at random, at their
    places."""
    places = torch.stack([some_places(windows.shape[1], prompt, kept, seed, i) for i in range(len(windows))])
    ids = windows.gather(1, places)
    every = torch.ones_like(ids)  # a mask that hides nothing: without one, gaps in the places would part the text
    logits = model(input_ids=ids, position_ids=places, attention_mask=every, use_cache=False).logits
    return last_losses(logits, ids, windows.shape[1] - prompt)


def some_places(length: int, prompt: int, kept: int, seed: int, row: int) -> Tensor:
    """`kept` places of a prompt in their order, its last one among them, and all behind it."""
    generator = torch.Generator().manual_seed(1000 * seed + row)
    some = torch.randperm(prompt - 1, generator=generator)[: kept - 1].sort().values
    return torch.cat([some, torch.arange(prompt - 1, length)])


# --- times -------------------------------------------------------------------------------------------------------


def first_token(model: Any, prompt: Tensor, decoder: Any = native_sampling, **parts: Any) -> Tensor:
    """Generate one token by the native decoder."""
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), custom_generate=decoder, **parts, **ONE)


def timed(found: dict[str, Found], runs: dict[str, Run], rounds: int) -> dict[str, Comparison]:
    """Note the milliseconds of all runs, taken in turn; how many times earlier our tokens come than the model's own."""
    times = interleave(runs, rounds)
    for name, ms in times.items():
        found[name].ms = ms
    whole = next(name for name in runs if WHOLE in name)
    return {name: speedup(times, name, whole) for name in runs if OURS in name}


def large_times(found: dict[str, Found], rounds: int, name: str = LARGE, keep: float = 1 / 2) -> dict[str, Comparison]:
    """The same with a large model and a predictor that was not trained; adds rows of times and operations alone."""
    work, method = Workload.from_name(name), KvPrediction(keep=keep, runtime="lean")
    model, question = work.model, work.test[0]["input_ids"][:1]
    prompt = question.shape[1]
    predictor = KvPredictor(method.auxiliary(model), key_widths(base_parts(model))).eval()
    whole, ours = f"{name}: {at(WHOLE, prompt)}", f"{name}: {at(OURS, prompt, keep)}"
    found[whole] = Found(first_token_flops(model, prompt))
    found[ours] = Found(first_token_flops(model, prompt, predictor))
    runs: dict[str, Run] = {
        whole: partial(first_token, model, question),
        ours: partial(first_token, model, question, method, predictor=predictor),
    }
    return timed(found, runs, rounds)

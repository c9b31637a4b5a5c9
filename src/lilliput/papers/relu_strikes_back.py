"""ReLU strikes back: do relufied language models keep their quality while most neurons need no weights?"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.edits import set_module
from lilliput.hooks import evaluating
from lilliput.methods.distill.logits import distillation_loss, teacher_logits
from lilliput.methods.layers._rectified import activation_name
from lilliput.methods.layers._sparsity import limited, random_of_equal_size, reused, sparsity_report
from lilliput.methods.layers.relufy import Relufy, inputs_of
from lilliput.methods.prune.magnitude import Growing, Magnitude
from lilliput.metrics.quality import Difference, paired_difference
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._sparse_times import INT4, SPARSE, feed_forward_times, token_times
from lilliput.training import Callback, State, train
from lilliput.workload import Batch, Workload
from lilliput.zoo.language import LENGTH

paper = Paper(
    title="ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models",
    authors="Iman Mirzadeh, Keivan Alizadeh, Sachin Mehta, Carlo C Del Mundo, Oncel Tuzel, Golnoosh Samei, "
    "Mohammad Rastegari, Mehrdad Farajtabar",
    year=2023,
    arxiv="2310.04564",
    claim="ReLU in the place of SiLU or GELU costs a language model little quality after a short training and leaves "
    "most neurons of its feed-forward parts exactly silent, so that their weights need be neither read nor multiplied.",
    methods=("layers.relufy", "layers.sparse_ffn"),
)

ORIGINAL, RELU, SHIFTED, NORMS = "SiLU, the original", "ReLU", "shifted ReLU", "ReLU, also behind the norms"
THRESHOLDED, PRUNED = "SiLU, small gates set to zero", "SiLU, weights pruned by magnitude"
RIVALS = (THRESHOLDED, PRUNED)
ASKED = 0.9  # share of silent neurons that the shift is set for, before training
LEAST_ZEROS = 0.8  # "most": what is left of it after training
TOLERATED = 0.03  # nats per token (3 % of perplexity) that count as little quality, the whole interval included
GAMMA = 8  # tokens that use the neurons of the 8 before them
WINDOWS = (1, 8, 32)
LR, BATCH = 1e-3, 8


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int
    seeds: int
    length: int = 128  # tokens of a window
    test_windows: int = 64
    check_every: int = 16  # steps between two looks at the validation text


@dataclass
class Found:
    """What was measured of one contender: per seed the test losses of all windows, and single figures."""

    losses: list[Tensor] = field(default_factory=list)  # nats per token of each window
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def row(self, name: str) -> Row:
        """Means over seeds; the spread is over seeds, of a single one the standard error over windows."""
        perplexities = [float(v.double().mean().exp()) for v in self.losses]
        single = perplexities[0] * float(self.losses[0].std()) / len(self.losses[0]) ** 0.5
        figures = {k: torch.tensor(v, dtype=torch.float64) for k, v in self.values.items()}
        figures["test_perplexity"] = torch.tensor(perplexities, dtype=torch.float64)
        spread = {k: float(v.std()) if len(v) > 1 else 0.0 for k, v in figures.items()}
        if len(perplexities) == 1:
            spread["test_perplexity"] = single
        return Row(name, {k: float(v.mean()) for k, v in figures.items()}, spread)


class Thresholded(nn.Module):
    """An activation whose small values are set to zero: what sparsity costs without a ReLU."""

    def __init__(self, activation: nn.Module, threshold: float):
        super().__init__()
        self.activation, self.threshold = activation, threshold

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(x)
        return y * (y.abs() > self.threshold)


class Recovery(Callback):
    """Validation perplexity along the training."""

    def __init__(self, work: Workload, every: int):
        self.work, self.every, self.seen = work, every, {}

    def on_step(self, state: State) -> None:
        if state.step % self.every == 0:
            self.seen[state.step] = self.work.score(state.model).value


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny with every contender, each distilled from the original on the same tokens.

    Holds when the shifted ReLU's neurons are silent for at least LEAST_ZEROS of the tokens, its test loss is not more
    than TOLERATED above the original's (upper end of the paired interval), it is not above either rival's that reads as
    many weights, and a feed-forward part of SmolLM2-135M's size with that share of silent neurons takes less time than
    the dense float32 one (whole interval of the paired ratio). `full` trains longer, on three seeds, and adds
    SmolLM2-135M itself.
    """
    effort = Effort(steps=400, seeds=3, check_every=100) if full else Effort(steps=48, seeds=1)
    found: dict[str, Found] = {}
    for s in range(seed, seed + effort.seeds):
        compare(found, tiny_workload(effort, s), effort, s)
    rows = [one.row(name) for name, one in found.items()]
    zeros = next(row for row in rows if row.name == SHIFTED).values["zeros"]
    times, faster = feed_forward_times(zeros, seed)
    cost = {name: loss_difference(found, SHIFTED, name) for name in (ORIGINAL, *RIVALS)}
    rows += times + (smollm_rows(seed) if full else [])
    tokens = effort.steps * BATCH * effort.length
    micros = {row.name: row.values["ffn_us"] for row in times}
    return Evidence(
        setup=f"llama-tiny on State of the Union addresses, {tokens} tokens of distillation a contender, "
        f"{effort.test_windows} test windows of {effort.length} tokens, {effort.seeds} seeds from {seed}; feed-forward "
        f"times: one token, 576 x 1536, {torch.get_num_threads()} threads, CPU",
        rows=rows,
        holds=judge(zeros, cost, faster.low),
        figure=f"{zeros:.0%} of the neurons silent at {cost[ORIGINAL].mean:+.3f} nats per token "
        f"[{cost[ORIGINAL].low:+.3f}, {cost[ORIGINAL].high:+.3f}]; best rival {best_rival(cost)}; feed-forward part "
        f"{faster.ratio:.2f}x as fast as float32, {micros[INT4] / micros[SPARSE]:.2f}x as dense int4",
        limits="A model of 3 million parameters and less than half a million tokens instead of billions; recovery is "
        "by distillation, the paper trains on text. The gate is computed whole. The timed part has random weights. "
        "No training from scratch and no speculative decoding.",
    )


def judge(zeros: float, cost: dict[str, Difference], faster_low: float) -> bool:
    """The rule of `experiment`; `cost` is what the shifted ReLU loses against each, in nats."""
    beaten = all(cost[rival].mean <= 0 for rival in RIVALS)
    return zeros >= LEAST_ZEROS and cost[ORIGINAL].high <= TOLERATED and beaten and faster_low > 1


def best_rival(cost: dict[str, Difference]) -> str:
    """The rival with the lowest loss, and by how much the shifted ReLU's is above it."""
    name = max(RIVALS, key=lambda rival: cost[rival].mean)
    return f"({name}) {-cost[name].mean:+.3f} nats from it"


def loss_difference(found: dict[str, Found], ours: str, other: str) -> Difference:
    """Loss of `ours` minus that of `other`, paired by window and seed."""
    return paired_difference(torch.cat(found[other].losses), torch.cat(found[ours].losses))


def tiny_workload(effort: Effort, seed: int) -> Workload:
    """llama-tiny with training windows drawn by the seed."""
    count = 2048
    windows = {"training": count, "calibration": 32, "validation": 32, "test": effort.test_windows}
    work = Workload.from_name("llama-tiny", length=effort.length, windows=windows)
    ids = torch.cat([batch["input_ids"] for batch in work.training or ()])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    work.training = [{"input_ids": part} for part in ids[order].split(BATCH)]
    return work


# --- contenders --------------------------------------------------------------------------------------------------


def compare(found: dict[str, Found], work: Workload, effort: Effort, seed: int) -> None:
    """Every contender on one seed; the rivals get as many zeros, or read as many weights, as the shifted ReLU."""
    note(found, ORIGINAL, work.model, work)
    trained = {}
    for name, method in {RELU: Relufy(), SHIFTED: Relufy(sparsity=ASKED), NORMS: Relufy(stage=2)}.items():
        trained[name] = recover(found, name, method.apply(work.model, work), work, effort, seed)
    reuse(found[SHIFTED], trained[SHIFTED], work)
    zeros = found[SHIFTED].values["zeros"][-1]
    recover(found, THRESHOLDED, thresholded(work, zeros), work, effort, seed)
    recover(found, PRUNED, copy.deepcopy(work.model), work, effort, seed, pruned=1 - weights_read(zeros))


def weights_read(zeros: float) -> float:
    """Share of a gated feed-forward part's weights that a token needs: the gate, and up and down of who fired."""
    return (1 + 2 * (1 - zeros)) / 3


def recover(
    found: dict[str, Found], name: str, model: nn.Module, work: Workload, effort: Effort, seed: int, pruned: float = 0
) -> nn.Module:
    """Distil the original into a contender, note its figures, and return it."""
    goals = dict.fromkeys((n for mlp in mlps(model) for n in (*mlp.into, mlp.down)), pruned) if pruned else {}
    recovery, batches = Recovery(work, effort.check_every), list(work.training or ())
    start = work.score(model).value

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        return distillation_loss(work.forward(student, batch), teacher_logits(work, batch), 1.0)

    with evaluating(work.model):
        callbacks = [*([Growing(goals, effort.steps)] if goals else []), recovery]
        train(model, batches, loss, steps=effort.steps, lr=LR, clip_norm=1.0, seed=seed,
              callbacks=callbacks)  # fmt: skip
    if goals:
        model = Magnitude(sparsity=pruned).apply(model, layers=list(goals))
    note(found, name, model.eval(), work)
    found[name].add(validation_perplexity_untrained=start)
    for step, value in recovery.seen.items():
        found[name].add(**{f"validation_perplexity_{step * batches[0]['input_ids'].numel()}_tokens": value})
    if pruned:
        found[name].add(share_of_weights_read=1 - pruned)
    return model


def note(found: dict[str, Found], name: str, model: nn.Module, work: Workload) -> None:
    """Test losses and sparsity of a contender."""
    one = found.setdefault(name, Found())
    one.losses.append(work.values(model, "test"))
    layers = sparsity_report(model, work, WINDOWS)
    zeros = sum(layer.zeros for layer in layers) / len(layers)
    one.add(zeros=zeros, least_zeros_of_a_layer=min(layer.zeros for layer in layers))
    if name != PRUNED:
        one.add(share_of_weights_read=weights_read(zeros))
    for w in WINDOWS[1:]:
        one.add(**{f"silent_through_{w}_tokens": sum(layer.silent[w] for layer in layers) / len(layers)})


def reuse(one: Found, model: nn.Module, work: Workload) -> None:
    """Validation perplexity when GAMMA tokens use the neurons of the GAMMA before them, or as many at random."""
    for name, allow in (("reused", reused(GAMMA)), ("random", random_of_equal_size(GAMMA))):
        with limited(model, allow):
            one.add(**{f"validation_perplexity_{name}_neurons": work.score(model).value})


def mlps(model: nn.Module) -> list:
    """The feed-forward parts of a model."""
    return [block.mlp for block in anatomy(model).blocks if block.mlp]


def thresholded(work: Workload, zeros: float) -> nn.Module:
    """The original with the smallest gates of each block set to zero, the share `zeros` on the calibration text."""
    model = copy.deepcopy(work.model)
    names = {mlp.name: activation_name(model, mlp) or "" for mlp in mlps(model)}
    samples = inputs_of(model, work, names)
    for part, name in names.items():
        activation = model.get_submodule(name)
        sizes = activation(samples[part]).abs()
        threshold = float(sizes.kthvalue(max(1, round(zeros * len(sizes)))).values)
        set_module(model, name, Thresholded(activation, threshold))
    return model


# --- SmolLM2-135M ------------------------------------------------------------------------------------------------


def smollm_rows(seed: int, steps: int = 150, name: str = "smollm2-135m") -> list[Row]:
    """SmolLM2-135M relufied for a few steps: the gap that is left, its zeros, and milliseconds of a token."""
    windows = {"training": steps * 4, "calibration": 8, "validation": 8, "test": 24}
    work = Workload.from_name(name, length=LENGTH, windows=windows)
    found: dict[str, Found] = {}
    note(found, f"{name}, original", work.model, work)
    effort = Effort(steps=steps, seeds=1, length=LENGTH, check_every=max(1, steps // 3))
    ours = f"{name}, shifted ReLU"
    model = recover(found, ours, Relufy(sparsity=ASKED).apply(work.model, work), work, effort, seed)
    return [one.row(key) for key, one in found.items()] + token_times(work, model)

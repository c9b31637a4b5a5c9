"""The trainings that `train.py` compares: three small tasks, and on each every method of the package that is to make a
training cheaper or better at its cost.

Left out are methods whose aim is another one: several networks at once, learning while answering, tries at a question,
few labels, inner states of a teacher of another width. What is made before the first step (a small model, a look at
all samples, stored answers, importances) is made inside of `begin`, so that it counts.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lilliput.hooks import evaluating
from lilliput.methods.distill._views import ViewedDataset, Views
from lilliput.methods.distill.dataset_reinforcement import DatasetReinforcement, ReinforcedDataset
from lilliput.methods.distill.label_refinery import refined_loss
from lilliput.methods.distill.logits import SoftLoss, distillation_loss
from lilliput.methods.distill.taid import Taid
from lilliput.methods.factorize._freezing import SequentialFreezing
from lilliput.methods.factorize.tucker import Tucker
from lilliput.methods.initialize._smaller import Smaller
from lilliput.methods.initialize.hypercloning import HyperCloning
from lilliput.methods.initialize.weight_selection import WeightSelection
from lilliput.methods.initialize.weight_subcloning import WeightSubcloning
from lilliput.methods.layers.gqkva import Gqkva
from lilliput.methods.layers.layer_wise_scaling import LayerWiseScaling
from lilliput.methods.layers.patch_whitening import PatchWhitening
from lilliput.methods.layers.separable_attention import SeparableAttention
from lilliput.methods.tokens.skipvit import SkipViT
from lilliput.methods.train.epas import Epas
from lilliput.methods.train.gradient_centralization import GradientCentralization
from lilliput.methods.train.meta_step import MetaStep, halves
from lilliput.methods.train.sam import Sam
from lilliput.methods.train.swiftlearn import SwiftLearn
from lilliput.methods.train.variable_batch import VariableBatch, resized
from lilliput.papers._equal_seconds import accuracy_percent, training_set
from lilliput.papers._healed import Effort as Windows
from lilliput.papers._healed import language_work
from lilliput.training import Callback, History, State, cosine
from lilliput.workload import Workload
from lilliput.zoo import images, nets

PLAIN = "plain"
PICTURES, TEST_PICTURES = 8000, 4000
WINDOWS = Windows(0, 1, length=64, training_windows=8192, test_windows=128)
SELECTION = WeightSelection(width=0.5, heads=1.0, ffn=0.5, depth=1.0)  # of llama-tiny: 96 wide, 6 blocks
SUBCLONING = WeightSubcloning(width=0.5, heads=1.0, ffn=0.5, depth=1.0)
FIRST_SHARE = 0.3  # of the time for a model that another one begins with or learns from
TEMPERATURE, HARD = 2.0, 0.5  # of distillation, as fits have them
TEACHER = "resnet-small"  # of pictures; of text it is llama-tiny
STORED = 3000  # pictures whose answers are stored
Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Task:
    """What is learned, by which network, and how that is scored."""

    name: str
    unit: str
    higher_is_better: bool
    batch: int
    samples: Callable[[int], tuple[Batch, Workload | None]]  # seed -> all training samples, what else there is
    net: Callable[[], nn.Module]  # untrained, drawn by torch's random numbers
    loss: Loss
    score: Callable[[nn.Module, str, Workload | None], float]  # model, validation or test


@dataclass(frozen=True)
class Setting:
    """One training that is to be made."""

    task: Task
    samples: Batch
    work: Workload | None
    seed: int
    rate: float
    seconds: float

    def net(self, more: int = 0) -> nn.Module:
        """The task's network with first weights by the seed."""
        torch.manual_seed(self.seed + more)
        return self.task.net()

    @property
    def text(self) -> Workload:
        assert self.work is not None
        return self.work


@dataclass
class Training:
    """A training under way."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    loss: Loss
    rate: float
    step: Callable[[Training, Batch], Tensor]
    served: Callable[[], nn.Module] | None = None
    callbacks: Sequence[Callback] = ()
    samples: int = 0  # learned from, those of a first model included
    rise: Callable[[float], float] = field(default_factory=cosine)

    def __post_init__(self):
        self.model.train()
        self.state = State(self.model, self.optimizer, History(), 1)
        for callback in self.callbacks:
            callback.on_start(self.state)

    @property
    def steps(self) -> int:
        return self.state.step

    def advance(self, done: float) -> None:
        """One step, the rate by the share of the training that is done."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.rise(done)
        batch = next(self.batches)
        self.state.history.losses.append(float(self.step(self, batch)))
        self.samples += len(batch[0])
        self.state.done = done
        for callback in self.callbacks:
            callback.on_step(self.state)

    def run(self, seconds: float) -> Training:
        """A whole training."""
        start = perf_counter()
        while (done := (perf_counter() - start) / seconds) < 1:
            self.advance(done)
        return self

    def result(self) -> nn.Module:
        """The model that serves."""
        return self.served() if self.served else self.model


# --- steps and batches -----------------------------------------------------------------------------------------------


def gradient_of(t: Training, batch: Batch) -> Tensor:
    """The loss of a batch; its gradient, of norm 1 at most, is in the parameters."""
    t.optimizer.zero_grad()
    loss = t.loss(t.model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
    return loss.detach()


def ordinary(t: Training, batch: Batch) -> Tensor:
    loss = gradient_of(t, batch)
    t.optimizer.step()
    return loss


def sharp(t: Training, batch: Batch) -> Tensor:
    """Two passes: the second where the first says that it is worst."""
    return t.optimizer.step(lambda: gradient_of(t, batch))  # type: ignore[return-value, arg-type]


def ahead(t: Training, batch: Batch) -> Tensor:
    """The second half of the batch is asked where a step on the first leads."""
    first, second = halves(batch)
    loss = gradient_of(t, first)
    optimizer: Any = t.optimizer
    with optimizer.ahead():
        t.loss(t.model, second).backward()
    optimizer.step()
    return loss


def shuffled(s: Setting) -> Iterator[Batch]:
    """Epoch after epoch, each in another order."""
    generator = torch.Generator().manual_seed(s.seed)
    while True:
        for picks in torch.randperm(len(s.samples[0]), generator=generator).split(s.task.batch):
            yield tuple(part[picks] for part in s.samples)


def viewed(s: Setting, data: ViewedDataset, also: str = "label") -> Iterator[Batch]:
    """Another view of each picture in every epoch, with what stands beside it."""
    generator = torch.Generator().manual_seed(s.seed)
    for epoch in itertools.count():
        data.set_epoch(epoch)
        for picks in torch.randperm(len(data), generator=generator).split(s.task.batch):
            batch = data.batch(picks)
            yield batch["input"], batch[also]


def learning(
    s: Setting, model: nn.Module, loss: Loss | None = None, batches: Iterator[Batch] | None = None, **more: Any
) -> Training:
    """AdamW on all samples, unless something else is given."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=s.rate, weight_decay=0.05)
    given = {"step": ordinary, "optimizer": optimizer} | more
    return Training(model, batches=batches or shuffled(s), loss=loss or s.task.loss, rate=s.rate, **given)


def plain(s: Setting) -> Training:
    return learning(s, s.net())


# --- from nothing ----------------------------------------------------------------------------------------------------


def swiftlearn(s: Setting) -> Training:
    model, (pictures, labels, *_) = s.net(), s.samples

    def answers() -> Tensor:
        with evaluating(model), torch.no_grad():
            return torch.cat([model(part) for part in pictures.split(256)])

    sampler = SwiftLearn(keep=0.3, warmup=2, refresh=4, seed=s.seed).sampler(labels, answers)

    def chosen() -> Iterator[Batch]:
        while True:
            for picks in torch.tensor(list(sampler)).split(s.task.batch):
                yield tuple(part[picks] for part in s.samples)

    return learning(s, model, batches=chosen())


def variable_batch(s: Setting) -> Training:
    sizes = VariableBatch(seed=s.seed).batches(TensorDataset(*s.samples), (28, 28), s.task.batch)

    def varied() -> Iterator[Batch]:
        while True:
            for items in sizes:
                picks = torch.tensor([item.index for item in items])
                yield resized(tuple(part[picks] for part in s.samples), items[0].size)

    return learning(s, s.net(), batches=varied())


def with_optimizer(s: Setting, wrap: Callable[[torch.optim.Optimizer, nn.Module], Any], step: Any) -> Training:
    """The plain training with something in front of its optimizer."""
    made = plain(s)
    return learning(s, made.model, optimizer=wrap(made.optimizer, made.model), step=step)


def centralized(s: Setting) -> Training:
    made = plain(s)
    GradientCentralization().attach(made.optimizer)
    return made


def changed(method: Callable[[Setting], nn.Module], s: Setting) -> Training:
    """The plain training of another network."""
    return learning(s, method(s))


def factored(s: Setting, frozen: bool) -> Training:
    model = Tucker().apply(s.net())
    return learning(s, model, callbacks=[SequentialFreezing(period=20)] if frozen else [])


def refinery(s: Setting) -> Training:
    """A first generation on labels, a second one on its answers to the same crops."""
    crops = ViewedDataset(TensorDataset(*s.samples[:2]), Views(padding=2), s.seed)
    first = learning(s, s.net(), batches=viewed(s, crops)).run(FIRST_SHARE * s.seconds)

    def refined(model: nn.Module, batch: Batch) -> Tensor:
        return refined_loss(model, first.model, {"input": batch[0]})

    return learning(s, s.net(1), refined, viewed(s, crops), samples=first.samples)


def progressive_sharing(s: Setting) -> Training:
    model = s.net()
    sharing = Epas().callback(model)
    return learning(s, model, callbacks=[sharing], served=lambda: sharing.served(model))


def grown(s: Setting) -> Training:
    config = copy.deepcopy(half_config())
    config.update(NARROW)
    torch.manual_seed(s.seed)
    small = type(s.text.model)(config)
    first = learning(s, small).run(FIRST_SHARE * s.seconds)
    return learning(s, HyperCloning(seed=s.seed).apply(first.model), samples=first.samples)


NARROW = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 128}


def layer_wise(s: Setting) -> nn.Module:
    sizes, flat = (96, 6, 32, 3), LayerWiseScaling(2.0, 2.0, 8 / 3, 8 / 3, round_to=8)
    scaled = LayerWiseScaling(alpha_first=1.0, alpha_last=2.0, round_to=8).within(flat.weights(*sizes), *sizes)
    torch.manual_seed(s.seed)
    return scaled.untrained(half_config())


# --- from a larger model that is trained already ---------------------------------------------------------------------


def cut_out(method: Smaller, s: Setting) -> nn.Module:
    return method.apply(s.text.model, s.text)


def taught(s: Setting, model: nn.Module, soft: SoftLoss | None = None) -> Training:
    """The larger model answers each batch too."""
    teacher = s.work.model if s.work else nets.load(TEACHER)
    soft_loss: SoftLoss = soft or partial(distillation_loss, temperature=TEMPERATURE)

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), evaluating(teacher):
            answers = logits(teacher, batch)
        return (1 - HARD) * soft_loss(logits(student, batch), answers) + HARD * s.task.loss(student, batch)

    return learning(s, model, loss)


def by_logits(s: Setting) -> Training:
    return taught(s, s.net())


def cut_out_and_taught(s: Setting) -> Training:
    return taught(s, cut_out(SUBCLONING, s))


def moving_target(s: Setting, tried: int = 6) -> Training:
    """TAID, whose target moves by the steps of the whole training: a few are timed first."""
    start, trial = perf_counter(), by_logits(s)
    trial.advance(0.0)
    begin = perf_counter()
    for _ in range(tried):
        trial.advance(0.0)
    step_s = (perf_counter() - begin) / tried
    steps = max(1, int((s.seconds - (perf_counter() - start)) / step_s))
    return taught(s, s.net(), Taid(steps=steps, alpha=min(4 / steps, 1.0)).soft_loss())


def reinforced(s: Setting) -> Training:
    """The larger model's answers to two views of some of the pictures, stored before."""
    folder = tempfile.TemporaryDirectory()
    data = TensorDataset(*(part[:STORED] for part in s.samples[:2]))
    method = DatasetReinforcement(samples=2, padding=2, seed=s.seed)
    file = method.reinforce(data, nets.load(TEACHER), Path(folder.name) / "answers.safetensors")

    def batches() -> Iterator[Batch]:
        with folder:
            yield from viewed(s, ReinforcedDataset(data, file), "taught")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return distillation_loss(model(batch[0]), batch[1], 1.0)

    return learning(s, s.net(), loss, batches())


def logits(model: nn.Module, batch: Batch) -> Tensor:
    out = model(batch[0])
    return getattr(out, "logits", out)


# --- tasks -----------------------------------------------------------------------------------------------------------


@cache
def half_config() -> Any:
    """Of a Llama half as wide as llama-tiny."""
    return SELECTION.apply(nets.load("llama-tiny")).config


def half_llama() -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(half_config())


@cache
def addresses(seed: int) -> tuple[Batch, Workload]:
    work = language_work("llama-tiny", WINDOWS, seed)
    return (torch.cat([batch["input_ids"] for batch in work.training or ()]),), work


@cache
def pictures(seed: int) -> tuple[Batch, None]:
    return training_set(seed, PICTURES).tensors, None


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    found = logits(model, batch)[:, :-1]
    return F.cross_entropy(found.float().flatten(0, 1), batch[0][:, 1:].flatten())


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def nats(model: nn.Module, split: str, work: Workload | None) -> float:
    assert work is not None
    with evaluating(model):
        return float(work.values(model, split).mean())


def percent_right(model: nn.Module, split: str, work: Workload | None) -> float:
    return accuracy_percent(model, images.fashion_mnist()[split].first(TEST_PICTURES))


TEXT = Task("text", "nats per token", False, 8, addresses, half_llama, next_token_loss, nats)
CNN = Task(
    "convolutional net", "% right", True, 64, pictures, partial(nets.resnet, 16, 8, stem_stride=2), class_loss,
    percent_right,
)  # fmt: skip
VIT = Task(
    "vision transformer", "% right", True, 64, pictures, partial(nets.vit, dim=32, layers=6, heads=4), class_loss,
    percent_right,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One method on one task."""

    task: Task
    method: str
    begin: Callable[[Setting], Training]
    given: str = "nothing"


LARGER = "a larger trained model"
CASES = [
    Case(TEXT, PLAIN, plain),
    Case(TEXT, "initialize.hypercloning", grown),
    Case(TEXT, "layers.layer_wise_scaling", partial(changed, layer_wise)),
    Case(TEXT, "layers.gqkva", partial(changed, lambda s: Gqkva(init="first").apply(s.net()))),
    Case(TEXT, "train.epas", progressive_sharing),
    Case(TEXT, "initialize.weight_subcloning", partial(changed, partial(cut_out, SUBCLONING)), LARGER),
    Case(TEXT, "initialize.weight_selection", partial(changed, partial(cut_out, SELECTION)), LARGER),
    Case(TEXT, "distill.logits", by_logits, LARGER),
    Case(TEXT, "distill.taid", moving_target, LARGER),
    Case(TEXT, "weight_subcloning and logits", cut_out_and_taught, LARGER),
    Case(CNN, PLAIN, plain),
    Case(CNN, "train.swiftlearn", swiftlearn),
    Case(CNN, "train.variable_batch", variable_batch),
    Case(CNN, "train.sam", partial(with_optimizer, wrap=Sam().wrap, step=sharp)),
    Case(CNN, "train.meta_step", partial(with_optimizer, wrap=MetaStep().wrap, step=ahead)),
    Case(CNN, "train.gradient_centralization", centralized),
    Case(CNN, "layers.patch_whitening",
         partial(changed, lambda s: PatchWhitening().into_(s.net(), s.samples[0][:2000]))),
    Case(CNN, "factorize.tucker", partial(factored, frozen=False)),
    Case(CNN, "factorize.tucker, factors in turn", partial(factored, frozen=True)),
    Case(CNN, "distill.label_refinery", refinery),
    Case(CNN, "distill.logits", by_logits, LARGER),
    Case(CNN, "distill.dataset_reinforcement", reinforced, LARGER),
    Case(VIT, PLAIN, plain),
    Case(VIT, "layers.gqkva", partial(changed, lambda s: Gqkva(init="first").apply(s.net()))),
    Case(VIT, "tokens.skipvit", partial(changed, lambda s: SkipViT().apply(s.net()))),
    Case(VIT, "layers.separable_attention",
         partial(changed, lambda s: SeparableAttention(start="fresh", seed=s.seed).apply(s.net()))),
]  # fmt: skip

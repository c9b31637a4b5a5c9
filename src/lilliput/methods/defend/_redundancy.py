"""Modular redundancy: modules beside a model that each know how harmless inputs look from one place, and doubt others.

    latent module:  a copy of the model, trained further with
                    CE + gamma (|f - C_y|^2 - mean_i |f - C_i|^2 + sum_i (|C_i| - 1)^2)
                    for its features f of length 1 at one layer and class centres C; then a normal distribution of f per
                    class, r principal directions and one variance for the rest
    input module:   a dictionary of pieces of pictures per class; the error of sparse codes
    all together:   -log prod_m Phi(-z_m),  z_m the module's value in deviations from harmless ones of its class

The victim's answer says which class's distribution is asked. Reconstructed from descriptions of DeepFense and CuRTAIL:
weights of the loss, the mean over other centres, the variance of the rest, averages over places of a picture as
features, values in deviations of their class, and normal tails as the modules' probabilities (1 - p_m) of a noisy or.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import anatomy, convolutions
from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import knob
from lilliput.methods.defend._dictionary import learned_atoms, pieces, sparsely
from lilliput.methods.defend._guarded import (
    FEWEST,
    Detector,
    GuardedModel,
    Seen,
    answered,
    gathered,
    linear_head,
    pictures_of,
)
from lilliput.training import train
from lilliput.workload import Batch, Workload

PUSH = 0.02  # of the deviation of inputs: how far later modules' training pictures go against the one before
LEAST = 1e-4  # share of a class's variance that every direction keeps
OF_CLASS = 4  # training examples of a class below which it has no distribution
PIECE, ATOMS, COUNT = 7, 48, 4  # of input modules: side, size of a dictionary, atoms of a code


class _Enough(Exception):
    """The layer asked for has run; the rest of the model need not."""


@contextmanager
def _reading(model: nn.Module, site: str, head: str, found: list[Tensor], stop: bool) -> Iterator[None]:
    """Collects a site's features (B, d): a layer's output, the head's input; both averaged over places or tokens."""

    def read(features: Any) -> None:
        features = features[0] if isinstance(features, tuple) else features
        found.append(_flat(features))
        if stop:
            raise _Enough

    layer = model.get_submodule(site)
    handle = (
        layer.register_forward_pre_hook(lambda _, args: read(args[0]))
        if site == head
        else layer.register_forward_hook(lambda _, args, out: read(out))
    )
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()


def _flat(features: Tensor) -> Tensor:
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features


def features_at(model: nn.Module, site: str, head: str, x: Tensor) -> Tensor:
    """(B, d) of length 1 at a site; the model runs no further than that."""
    found: list[Tensor] = []
    with _reading(model, site, head, found, stop=True):
        answered(model, x)
    return F.normalize(found[0], dim=-1)


def sites(model: nn.Module, guard: str) -> list[str]:
    """Where modules may look, in the order of the model: outputs of its blocks or, without blocks, of its convolutions,
    and the input of its linear head, which has the head's name."""
    names = [block.name for block in anatomy(model).blocks] or _stages(model) or convolutions(model)
    return [*names, linear_head(model, guard)]


def _stages(model: nn.Module) -> list[str]:
    """Members of the longest list of layers that all hold convolutions."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList) and n]
    whole = [(n, m) for n, m in lists if all(convolutions(c) for c in m.children())]
    name, longest = max(whole, key=lambda pair: len(list(pair[1].children())), default=("", None))
    return [] if longest is None else [f"{name}.{key}" for key, _ in longest.named_children()]


# --- what modules learn from -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Harmless pictures: labelled ones (n, ...) that modules learn, others (m, ...) that set thresholds."""

    inputs: Tensor
    labels: Tensor
    others: Tensor
    classes: int

    def batches(self, size: int, seed: int) -> list[Batch]:
        """The labelled ones in a seeded order."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        return [{"input": self.inputs[part], "label": self.labels[part]} for part in order.split(size)]


def examples_of(workload: Workload, model: nn.Module, most: int, guard: str) -> Examples:
    """At most `most` training examples and all calibration inputs. Raises UserError when they are too few or of one
    class."""
    others = pictures_of(workload, guard)
    batches = _first(workload.training or (), most)
    inputs, labels = gathered(batches, "input"), gathered(batches, "label").long()
    if len(labels) < FEWEST or len(labels) != len(inputs):
        raise UserError(f"{guard} needs {FEWEST} or more labelled training examples, {len(labels)} were given")
    with torch.no_grad(), evaluating(model):
        classes = answered(model, others[:1]).shape[-1]
    counts = labels.bincount(minlength=classes)
    if int((counts > 0).sum()) < 2:
        raise UserError(f"{guard}: all {len(labels)} training examples are of class {int(labels[0])}; give two or more")
    if int(counts.min()) < OF_CLASS:
        raise UserError(
            f"{guard}: {int(counts.min())} training examples of class {int(counts.argmin())}; give {OF_CLASS} or more"
        )
    return Examples(inputs[:most], labels[:most], others, classes)


def _first(batches: Any, most: int) -> list[Batch]:
    """Batches until there are `most` examples."""
    found, count = [], 0
    for batch in batches:
        found.append(batch)
        count += len(batch.get("input", ()))
        if count >= most:
            break
    return found


# --- modules ---------------------------------------------------------------------------------------------------


class ClassDensity(nn.Module):
    """Per class a normal distribution of features (N, d): r principal directions, one variance for all the others."""

    mean: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor

    def __init__(self, features: Tensor, labels: Tensor, classes: int, rank: int):
        super().__init__()
        parts = [self._of(features[labels == c], rank) for c in range(classes)]
        for name, values in zip(("mean", "directions", "variances", "rest"), zip(*parts)):
            self.register_buffer(name, torch.stack(values))

    @staticmethod
    def _of(own: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean = own.mean(0)
        covariance = (own - mean).T @ (own - mean) / max(1, len(own) - 1)
        energies, vectors = torch.linalg.eigh(covariance)
        energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
        least = LEAST * energies.sum() / len(energies) + 1e-12
        kept = min(rank, len(energies))
        rest = energies[kept:].mean() if kept < len(energies) else energies.new_zeros(())
        return mean, vectors[:, :kept], energies[:kept].clamp_min(least), rest.clamp_min(least)

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        """(B,) -log density of features (B, d) in the distributions of classes (B,), less a constant."""
        apart = features - self.mean[classes]
        along = (apart.unsqueeze(1) @ self.directions[classes]).squeeze(1)
        variances, rest = self.variances[classes], self.rest[classes]
        value = (along.square() / variances + variances.log()).sum(-1)
        free = features.shape[1] - along.shape[1]
        if free:
            outside = (apart.square().sum(-1) - along.square().sum(-1)).clamp_min(0)
            value = value + outside / rest + free * rest.log()
        return value / 2


class ClassScale(nn.Module):
    """Values in deviations from the mean of their class, as values (N,) of labelled examples (N,) have them."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, values: Tensor, labels: Tensor, classes: int):
        super().__init__()
        own = [values[labels == c] for c in range(classes)]
        self.register_buffer("mean", torch.stack([v.mean() for v in own]))
        self.register_buffer("deviation", torch.stack([v.std() for v in own]).clamp_min(1e-6))

    def forward(self, values: Tensor, classes: Tensor) -> Tensor:
        return (values - self.mean[classes]) / self.deviation[classes]


class LatentModule(nn.Module):
    """How unlike its class an input is in the features of one layer of a copy of the model, trained to show that."""

    def __init__(self, net: nn.Module, site: str, head: str, examples: Examples, rank: int):
        super().__init__()
        self.net, self.site, self.head = net.eval().requires_grad_(False), site, head
        with torch.no_grad():
            features = torch.cat([self.features(part) for part in examples.inputs.split(128)])
        self.density = ClassDensity(features, examples.labels, examples.classes, rank)
        self.scale = ClassScale(self.density(features, examples.labels), examples.labels, examples.classes)

    def train(self, mode: bool = True) -> LatentModule:
        """It has learned all that it will: it stays in evaluation mode."""
        return super().train(False)

    def features(self, x: Tensor) -> Tensor:
        """(B, d)."""
        return features_at(self.net, self.site, self.head, x)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        return self.scale(self.density(self.features(x), classes), classes)


class InputModule(nn.Module):
    """How badly a few atoms of its class rebuild a picture's pieces: the logarithm of the mean squared error."""

    atoms: Tensor

    def __init__(self, examples: Examples, seed: int):
        super().__init__()
        found = [self._learned(examples.inputs[examples.labels == c], seed) for c in range(examples.classes)]
        smallest = min(len(atoms) for atoms in found)
        self.register_buffer("atoms", torch.stack([atoms[:smallest] for atoms in found]))
        with torch.no_grad():
            parts = zip(examples.inputs.split(128), examples.labels.split(128))
            values = torch.cat([self._error(x, labels) for x, labels in parts])
        self.scale = ClassScale(values, examples.labels, examples.classes)

    @staticmethod
    def _learned(own: Tensor, seed: int, most: int = 2000) -> Tensor:
        parts = pieces(own, PIECE).flatten(0, 1)
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
        return learned_atoms(parts[order[:most]].unsqueeze(0), ATOMS, COUNT, seed=seed)[0]

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        return self.scale(self._error(x, classes), classes)

    def _error(self, x: Tensor, classes: Tensor) -> Tensor:
        parts = pieces(x, PIECE).transpose(0, 1)  # (B, places, d)
        error = parts - sparsely(parts, self.atoms[classes], COUNT)
        return error.square().mean((1, 2)).clamp_min(1e-12).log()


# --- training a copy -------------------------------------------------------------------------------------------


class _Spread(nn.Module):
    """A copy of a model with class centres for its features at a site."""

    def __init__(self, model: nn.Module, site: str, head: str, examples: Examples):
        super().__init__()
        self.net, self.site, self.head = copy.deepcopy(model).requires_grad_(True), site, head
        with torch.no_grad(), evaluating(model):
            parts = [features_at(model, site, head, part) for part in examples.inputs.split(128)]
        means = [torch.cat(parts)[examples.labels == c].mean(0) for c in range(examples.classes)]
        self.centres = nn.Parameter(F.normalize(torch.stack(means), dim=-1))

    def loss(self, x: Tensor, labels: Tensor, gamma: float) -> Tensor:
        found: list[Tensor] = []
        with _reading(self.net, self.site, self.head, found, stop=False):
            logits = answered(self.net, x)
        distances = torch.cdist(F.normalize(found[0], dim=-1), self.centres).square()
        own = distances.gather(1, labels.view(-1, 1)).squeeze(1)
        others = (distances.sum(1) - own) / (distances.shape[1] - 1)
        length = (self.centres.norm(dim=1) - 1).square().sum()
        return F.cross_entropy(logits, labels) + gamma * ((own - others).mean() + length)


def latent_modules(
    model: nn.Module, chosen: Sequence[str], head: str, examples: Examples, settings: Redundancy
) -> list[LatentModule]:
    """A module at each site, each trained on pictures that were pushed against the one before."""
    found: list[LatentModule] = []
    for number, site in enumerate(chosen):
        copied = _Spread(model, site, head, examples)
        before = found[-1] if found else None

        def loss(net: nn.Module, batch: Batch, before: LatentModule | None = before) -> Tensor:
            assert isinstance(net, _Spread)
            x = batch["input"] if before is None else pushed(before, batch["input"], batch["label"])
            return net.loss(x, batch["label"], settings.gamma)

        train(copied, examples.batches(settings.batch, number), loss, steps=settings.steps, lr=settings.lr,
              clip_norm=1.0, seed=number)  # fmt: skip
        found.append(LatentModule(copied.net, site, head, examples, settings.rank))
    return found


def trainable(model: nn.Module, workload: Workload, guard: str) -> nn.Module:
    """What copies are trained from: the model, or the workload's own where the model's weights are packed. Raises
    UserError when both are."""
    for one in (model, workload.model):
        if not any(b.dtype in (torch.int8, torch.uint8, torch.int16) for b in one.buffers()):
            return one
    raise UserError(f"{guard} trains copies, and the weights of the model and of {workload.name!r} are packed")


def pushed(module: LatentModule, x: Tensor, classes: Tensor) -> Tensor:
    """Inputs moved a little in the direction that a module doubts most, by the sign of the gradient."""
    with torch.enable_grad():
        moved = x.detach().clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(module(moved, classes).sum(), moved)
    return x + PUSH * x.std() * slope.sign()


class Redundant(GuardedModel):
    """A model and the modules beside it; its answers are the model's."""

    mean: Tensor
    deviation: Tensor
    bound: Tensor

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], others: Tensor, false_alarms: float):
        super().__init__(model)
        self.watchers, self.false_alarms = nn.ModuleList(modules), false_alarms
        values = torch.cat([self.values(part)[1] for part in others.split(128)], 1)
        self.register_buffer("mean", values.mean(1, keepdim=True))
        self.register_buffer("deviation", values.std(1, keepdim=True).clamp_min(1e-6))
        self.register_buffer("bound", self._together(values).quantile(1 - false_alarms).clamp_min(1e-12))

    @torch.no_grad()
    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes), and what each module says (modules, B)."""
        return self._values(x)

    def _values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with evaluating(self.model):
            logits = answered(self.model, x)
        classes = logits.argmax(-1)
        return logits, torch.stack([module(x, classes) for module in self.watchers])

    def _together(self, values: Tensor) -> Tensor:
        """(modules, B) -> (B,) -log prod Phi(-z)."""
        return -torch.special.log_ndtr((self.mean - values) / self.deviation).sum(0)

    def suspicion(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores with gradients for the input, for attackers who know the guard; above 1 is flagged."""
        logits, values = self._values(x)
        return logits, self._together(values) / self.bound

    @torch.no_grad()
    def inspect(self, input: Tensor) -> Seen:
        logits, score = self.suspicion(input)
        return Seen(logits, score, score > 1)


@dataclass(frozen=True)
class Redundancy(Detector):
    """What guards by modular redundancy are set by."""

    latent: int = knob(2, low=0, high=16, help="modules that look at features of trained copies of the model")
    inputs: int = knob(1, low=0, high=4, help="modules that look at the picture itself")
    false_alarms: float = knob(0.05, low=1e-4, high=0.5, log=True, help="share of harmless inputs that are flagged")
    rank: int = knob(8, low=1, high=4096, help="principal directions of a class's features")
    gamma: float = knob(0.1, low=0.0, high=100.0, help="weight of the distances to the centres of classes")
    steps: int = knob(120, low=0, high=10_000_000, help="training steps of each copy")
    lr: float = knob(1e-3, low=1e-6, high=1.0, log=True, help="learning rate of those steps")
    batch: int = knob(64, low=1, high=65_536, help="examples in a training step")
    examples: int = knob(4000, low=FEWEST, high=10_000_000, help="training examples that modules learn from")

    def chosen_sites(self, model: nn.Module, places: Sequence[str], examples: Examples) -> list[str]:
        """Which of the sites of a model, the head the last, the latent modules look at."""
        raise NotImplementedError

    def wrap(self, model: nn.Module, workload: Workload) -> Redundant:
        if self.latent + self.inputs == 0:
            raise UserError(f"{self.name()} has neither latent nor input modules; give one of them at least")
        examples = examples_of(workload, model, self.examples, self.name())
        source = trainable(model, workload, self.name())
        places = sites(source, self.name())
        chosen = self.chosen_sites(source, places, examples) if self.latent else []
        modules: list[nn.Module] = [*latent_modules(source, chosen, places[-1], examples, self)]
        modules += [InputModule(examples, seed) for seed in range(self.inputs)]
        return Redundant(model, modules, examples.others, self.false_alarms)

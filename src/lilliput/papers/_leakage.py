"""What split inference sends, by several ways to hide something, and what an adversary who sees it learns.

An adversary knows how the numbers are made and trains afresh on them; the numbers that make noise are drawn anew for
every batch that it sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.training import train

WIDTHS = ((), (128,))  # hidden layers of the adversaries; the best of them on validation data counts
BATCH, LR = 128, 2e-3


@dataclass(frozen=True)
class Part:
    """Features (n, d) of a split model's input, what the task asks, what shall stay private, and the pixels (n, p)."""

    features: Tensor
    task: Tensor
    private: Mapping[str, Tensor]
    pixels: Tensor


@dataclass(frozen=True)
class Sender:
    """`sent` makes of features (n, d) the numbers (n, k) that leave the device, `logits` the task's answer of them.

    `counted` says how many numbers (n, k) are on average where that is not k.
    """

    sent: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    counted: Callable[[Tensor], float] = lambda sent: float(sent.shape[1])

    @torch.no_grad()
    def numbers(self, part: Part) -> float:
        """Numbers that are sent for a sample."""
        return self.counted(self.sent(part.features))

    @torch.no_grad()
    def accuracy_percent(self, part: Part) -> float:
        """Task accuracy."""
        right = self.logits(self.sent(part.features)).argmax(-1) == part.task
        return 100 * float(right.double().mean())


# --- ways to hide ------------------------------------------------------------------------------------------------


def noisy(logits: Callable[[Tensor], Tensor], seen: Tensor, deviations: float, seed: int) -> Sender:
    """Gaussian noise of so many standard deviations of each feature."""
    generator, scale = torch.Generator().manual_seed(seed), deviations * seen.std(0)
    return Sender(lambda z: z + scale * torch.randn(z.shape, generator=generator), logits)


def some_features(logits: Callable[[Tensor], Tensor], seen: Tensor, count: int, seed: int) -> Sender:
    """Features drawn at random; the server puts the mean in the place of the others."""
    kept = torch.randperm(seen.shape[1], generator=torch.Generator().manual_seed(seed))[:count]
    mean = seen.mean(0)

    def filled(sent: Tensor) -> Tensor:
        return mean.repeat(len(sent), 1).index_copy(1, kept, sent)

    return Sender(lambda z: z[:, kept], lambda sent: logits(filled(sent)))


def principal(logits: Callable[[Tensor], Tensor], mean: Tensor, axes: Tensor) -> Sender:
    """Principal components along axes (d, k); the server goes back to features."""
    return Sender(lambda z: (z - mean) @ axes, lambda sent: logits(mean + sent @ axes.T))


def principal_axes(seen: Tensor) -> Tensor:
    """(d, d) directions of falling variance."""
    centred = (seen - seen.mean(0)).double()
    return torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).float()


def trained_against(
    layer: nn.Module, rest: nn.Module, seen: Part, attribute: str, count: int, weight: float, steps: int, seed: int
) -> Sender:
    """A linear encoder of `count` numbers, learned with its decoder to keep the task and to defeat an adversary for one
    attribute, who learns at the same time: minimise task loss - weight * adversary's loss."""
    torch.manual_seed(seed)
    mean, spread = seen.features.mean(0), seen.features.std()
    encoder = nn.Linear(seen.features.shape[1], count)
    decoder = nn.Linear(count, layer.weight.shape[0])  # type: ignore[union-attr]
    adversary = nn.Sequential(nn.Linear(count, 64), nn.ReLU(), nn.Linear(64, 2))
    ours = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LR)
    theirs = torch.optim.Adam(adversary.parameters(), lr=LR)
    draws = torch.Generator().manual_seed(seed)

    def sent(z: Tensor) -> Tensor:
        return encoder((z - mean) / spread)

    for _ in range(steps):
        pick = torch.randint(len(seen.task), (BATCH,), generator=draws)
        z, task, secret = seen.features[pick], seen.task[pick], seen.private[attribute][pick]
        guess = F.cross_entropy(adversary(sent(z).detach()), secret)
        _updated(theirs, guess)
        code = sent(z)
        hidden = F.cross_entropy(adversary(code), secret).clamp_max(1.0)  # a guess worse than chance is worth nothing
        _updated(ours, F.cross_entropy(rest(decoder(code)), task) - weight * hidden)
    return Sender(sent, lambda code: rest(decoder(code)))


def _updated(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def first_good(senders: Iterable[Sender], part: Part, goal_percent: float) -> Sender:
    """The first whose accuracy reaches the goal, else the last: give them from the one that hides most."""
    sender = None
    for sender in senders:
        if sender.accuracy_percent(part) >= goal_percent:
            break
    assert sender is not None
    return sender


# --- attacks -----------------------------------------------------------------------------------------------------


def inferred_percent(
    sender: Sender, seen: Part, validation: Part, test: Part, attribute: str, steps: int, seed: int
) -> float:
    """How often the best of several adversaries names a private attribute of test samples."""
    adversaries = [learned(sender, seen, attribute, hidden, steps, seed) for hidden in WIDTHS]
    best = max(adversaries, key=lambda one: guessed_percent(one, sender, validation, attribute))
    return guessed_percent(best, sender, test, attribute)


def learned(
    sender: Sender, seen: Part, attribute: str, hidden: tuple[int, ...], steps: int, seed: int
) -> Callable[[Tensor], Tensor]:
    """An adversary trained on what is sent: numbers (n, k) -> logits of the attribute's values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        sample = sender.sent(seen.features)
    mean, scale = sample.mean(0), sample.std(0).clamp_min(1e-6)
    labels = seen.private[attribute]
    sizes = (sample.shape[1], *hidden, int(labels.max()) + 1)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.ReLU(), nn.Linear(a, b))][1:]
    net = nn.Sequential(*layers)

    def loss(model: nn.Module, pick: Tensor) -> Tensor:
        with torch.no_grad():
            numbers = (sender.sent(seen.features[pick]) - mean) / scale
        return F.cross_entropy(model(numbers), labels[pick])

    train(net, torch.arange(len(labels)).split(BATCH), loss, steps=steps, lr=LR, clip_norm=1.0, seed=seed)
    return lambda sent: net((sent - mean) / scale)


@torch.no_grad()
def guessed_percent(adversary: Callable[[Tensor], Tensor], sender: Sender, part: Part, attribute: str) -> float:
    """Share of right guesses, in percent."""
    right = adversary(sender.sent(part.features)).argmax(-1) == part.private[attribute]
    return 100 * float(right.double().mean())


@torch.no_grad()
def explained_percent(sender: Sender, seen: Part, test: Part, ridge: float = 1e-2) -> float:
    """Share of the test pictures' variance that a linear reconstruction from what is sent explains."""
    sample, other = sender.sent(seen.features), sender.sent(test.features)
    mean, scale, grey = sample.mean(0), sample.std(0).clamp_min(1e-6), seen.pixels.mean(0)
    x, y = (sample - mean) / scale, seen.pixels - grey
    gram = (x.T @ x / len(x)).double()
    gram.diagonal().add_(ridge)
    weights = torch.linalg.solve(gram, (x.T @ y / len(x)).double()).float()
    error = (test.pixels - grey - (other - mean) / scale @ weights).square().sum()
    return 100 * max(0.0, 1 - float(error / (test.pixels - test.pixels.mean(0)).square().sum()))

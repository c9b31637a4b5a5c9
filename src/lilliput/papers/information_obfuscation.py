"""Information obfuscation: does sending only what the server's layer reads hide attributes that nobody listed?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.methods.defend._split import split
from lilliput.methods.defend._wire import Code, Remote, serving
from lilliput.methods.defend.information_obfuscation import FIXED, SAMPLE, InformationObfuscation, Obfuscated
from lilliput.metrics.latency import measure
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._by_seed import BySeed
from lilliput.papers._healed import clearly, said
from lilliput.papers._leakage import (
    Part,
    Sender,
    explained_percent,
    first_good,
    guessed_percent,
    inferred_percent,
    learned,
    noisy,
    principal,
    principal_axes,
    some_features,
    trained_against,
)
from lilliput.papers._small_nets import picked
from lilliput.training import train
from lilliput.workload import Workload
from lilliput.zoo import images
from lilliput.zoo.images import Pictures

paper = Paper(
    title="Unsupervised Information Obfuscation for Split Inference of Neural Networks",
    authors="Mohammad Samragh, Hossein Hosseini, Aleksei Triastcyn, Kambiz Azarian, Joseph Soriaga, Farinaz Koushanfar",
    year=2021,
    arxiv="2104.11413",
    claim="Sending only the part of the features that the server's first layer reads, without its weakest "
    "coefficients, hides attributes that nobody listed better than obfuscators do that were trained against listed "
    "ones, at nearly the same accuracy and for less communication.",
    methods=("defend.information_obfuscation",),
)

RAW, EXACT, OURS = "all features", "signal alone, budget 0", "obfuscated"
EACH, NOISE, RANDOM = "obfuscated, chosen for every input", "Gaussian noise", "random features"
EQUAL, PCA, TRAINED = "PCA, as many numbers", "PCA", "encoder trained against the mark"
RIVALS = (NOISE, RANDOM, PCA, TRAINED)
DIGIT, MARK = "digit", "mark"  # nobody listed the first; the second is what one rival is trained against
LAYER = "fc1"
TOLERATED = 1.0  # points of task accuracy
BUDGETS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02, 0.01, 0.0)
NOISES = tuple(2.0 ** (i / 2) for i in range(8, -13, -1))  # in standard deviations of a feature
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1568)
WEIGHTS = (3.0, 1.0, 0.3)  # of the adversary's loss
WIRE = {"": 32, " in 8 bits": 8}


@dataclass(frozen=True)
class Effort:
    """How much the experiment does."""

    seeds: int
    pictures: int  # to train the model on, and as many others for the adversary
    steps: int
    attack_steps: int
    test_pictures: int = 1000


DEFAULT = Effort(seeds=3, pictures=4000, steps=250, attack_steps=250)
FULL = Effort(seeds=8, pictures=4000, steps=1000, attack_steps=2000)


class Net(nn.Module):
    """Two convolutions on the device, two linear layers on the server: (B, 1, 28, 28) -> (B, 2)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.fc1, self.fc2 = nn.Linear(32 * 49, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


@dataclass(frozen=True)
class Marked:
    """Pictures of digits with a bright corner in a random half of them."""

    pictures: Pictures
    mark: Tensor

    @property
    def task(self) -> Tensor:
        """Whether a digit is 5 or more."""
        return (self.pictures.labels >= 5).long()


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Digits: the server is to say whether one is 5 or more, an adversary who sees what is sent wants the digit itself.

    Budgets are the largest that lose at most half of TOLERATED points on validation pictures; the rivals hide as much
    as they can at our accuracy there, and the trained one has as many numbers. Holds when ours loses at most TOLERATED
    points of test accuracy on average, and the best adversary names the digit less often than from each of RIVALS, by
    more than two standard errors over seeds.
    """
    effort = FULL if full else DEFAULT
    found = BySeed()
    for s in range(effort.seeds):
        compare(found, effort, 1000 * seed + s)
    return evidence(found, sockets(effort, 1000 * seed), effort, seed)


def compare(found: BySeed, effort: Effort, seed: int) -> None:
    """Every contender of one seed, attacked."""
    parts = marked_parts(effort, seed)
    net, work = victim(parts, effort, seed)
    seen, validation, test = (part_of(net, parts[name]) for name in ("adversary", "validation", "test"))
    known = part_of(net, parts["training"])
    guarded = obfuscated(net, work, validation)
    for name, sender in contenders(net, work, guarded, known, validation, effort, seed).items():
        figures = {"task_accuracy_percent": sender.accuracy_percent(test), "numbers_sent": sender.numbers(test)}
        for attribute in (DIGIT, MARK):
            figures[f"{attribute}_inferred_percent"] = inferred_percent(
                sender, seen, validation, test, attribute, effort.attack_steps, seed
            )
        figures["pixels_explained_percent"] = explained_percent(sender, seen, test)
        if name == OURS:
            figures["digit_inferred_naively_percent"] = naive_percent(guarded, sender, seen, test, effort, seed)
        found.note(name, figures)


# --- the model and its data --------------------------------------------------------------------------------------


def marked_parts(effort: Effort, seed: int) -> dict[str, Marked]:
    """Pictures of the model's training, of the adversary's, for choices and for the figures; none is in two of them."""
    splits = images.digits()
    order = torch.randperm(len(splits["training"]), generator=torch.Generator().manual_seed(seed))
    cut = {"training": order[: effort.pictures], "adversary": order[effort.pictures : 2 * effort.pictures]}
    drawn = {name: picked(splits["training"], index) for name, index in cut.items()}
    drawn |= {"validation": joined(splits["validation"], splits["calibration"])}
    drawn |= {"test": splits["test"].first(effort.test_pictures)}
    return {name: marked(pictures, seed + i) for i, (name, pictures) in enumerate(drawn.items())}


def joined(a: Pictures, b: Pictures) -> Pictures:
    """All pictures of two sets."""
    return replace(a, pixels=torch.cat([a.pixels, b.pixels]), labels=torch.cat([a.labels, b.labels]))


def marked(pictures: Pictures, seed: int) -> Marked:
    """A white square of 4 x 4 in a corner of about half of the pictures."""
    mark = torch.randint(2, (len(pictures),), generator=torch.Generator().manual_seed(seed))
    pixels = pictures.pixels.clone()
    pixels[mark == 1, :4, :4] = 255
    return Marked(replace(pictures, pixels=pixels), mark)


def victim(parts: dict[str, Marked], effort: Effort, seed: int) -> tuple[Net, Workload]:
    """A network trained for the task alone, and its workload."""
    torch.manual_seed(seed)
    net = Net()
    splits = {name: task_batches(part) for name, part in parts.items()}
    train(net, splits["training"], lambda model, batch: F.cross_entropy(model(batch["input"]), batch["label"]),
          steps=effort.steps, lr=2e-3, clip_norm=1.0, seed=seed)  # fmt: skip
    work = Workload.classifier(net.eval(), splits["training"][:8], splits["validation"], splits["test"], name="digits")
    return net, work


def task_batches(part: Marked) -> list[dict[str, Tensor]]:
    """Batches whose labels are the task's."""
    pairs = zip(part.pictures.inputs().split(64), part.task.split(64))
    return [{"input": x, "label": y} for x, y in pairs]


@torch.no_grad()
def part_of(net: Net, part: Marked) -> Part:
    """What the device half makes of pictures."""
    device = split(net, LAYER).device
    features = torch.cat([device(x) for x in part.pictures.inputs().split(500)])
    private = {DIGIT: part.pictures.labels, MARK: part.mark}
    return Part(features, part.task, private, part.pictures.pixels.flatten(1).float() / 255)


# --- contenders --------------------------------------------------------------------------------------------------


def contenders(
    net: Net, work: Workload, guarded: Obfuscated, known: Part, validation: Part, effort: Effort, seed: int
) -> dict[str, Sender]:
    """The original, ours, and rivals that reach our accuracy on validation pictures (but for EQUAL)."""
    whole, ours, halves = original(net), sender_of(guarded), split(net, LAYER)
    count = int(ours.numbers(known))
    mean, axes = known.features.mean(0), principal_axes(known.features)
    features, counts = known.features, [n for n in COUNTS if n <= known.features.shape[1]]

    def learned_encoder(weight: float) -> Sender:
        return trained_against(halves.layer, halves.rest, known, MARK, count, weight, effort.steps, seed)

    rivals: dict[str, Iterable[Sender]] = {
        NOISE: (noisy(whole.logits, features, d, seed) for d in NOISES),
        RANDOM: (some_features(whole.logits, features, n, seed) for n in counts),
        PCA: (principal(whole.logits, mean, axes[:, :n]) for n in counts),
        TRAINED: (learned_encoder(weight) for weight in WEIGHTS),
    }
    goal = ours.accuracy_percent(validation)
    found = {RAW: whole, EXACT: sender_of(InformationObfuscation(LAYER, 0.0).wrap(net, work)), OURS: ours}
    found[EACH] = masked_sender_of(obfuscated(net, work, validation, SAMPLE))
    found[EQUAL] = principal(whole.logits, mean, axes[:, :count])
    return found | {name: first_good(senders, validation, goal) for name, senders in rivals.items()}


def original(net: Net) -> Sender:
    """All features, for the server half as it is."""
    halves = split(net, LAYER)
    return Sender(lambda z: z, lambda z: halves.rest(halves.layer(z)))


def obfuscated(net: Net, work: Workload, validation: Part, mode: str = FIXED, bits: int = 32) -> Obfuscated:
    """The guard at the largest budget that loses at most half of TOLERATED on validation pictures."""
    least = original(net).accuracy_percent(validation) - TOLERATED / 2
    guarded = InformationObfuscation(LAYER, BUDGETS[0], mode, bits).wrap(net, work)
    for budget in BUDGETS[1:]:
        if sender_of(guarded).accuracy_percent(validation) >= least:
            break
        guarded = InformationObfuscation(LAYER, budget, mode, bits).wrap(net, work)
    return guarded


def sender_of(guarded: Obfuscated) -> Sender:
    """What the guard sends, for the attacks."""
    return Sender(lambda z: guarded.encoder(z).values, guarded.server)


def masked_sender_of(guarded: Obfuscated) -> Sender:
    """The same with the mask as numbers behind the coefficients: the adversary sees both."""

    def sent(z: Tensor) -> Tensor:
        code = guarded.encoder(z)
        assert code.mask is not None
        return torch.cat([code.values, code.mask.float()], 1)

    def counted(both: Tensor) -> float:
        return float(both.chunk(2, 1)[1].sum(1).mean())

    return Sender(sent, lambda both: guarded.server(both.chunk(2, 1)[0].contiguous()), counted)


def naive_percent(guarded: Obfuscated, sender: Sender, seen: Part, test: Part, effort: Effort, seed: int) -> float:
    """The digit as guessed by who learned from all features, and sees those nearest to zero that have our code."""
    whole = Sender(lambda z: z, sender.logits)
    adversary = learned(whole, seen, DIGIT, (128,), effort.attack_steps, seed)
    read = guarded.encoder.read.weight  # (k, d), orthonormal rows
    return guessed_percent(lambda sent: adversary(sent @ read), sender, test, DIGIT)


# --- bytes and milliseconds --------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Sends features as they are."""

    def forward(self, z: Tensor) -> Code:
        return Code(z)


def sockets(effort: Effort, seed: int, seconds: float = 0.5) -> dict[str, dict[str, float]]:
    """Bytes and milliseconds of one picture over a real socket to another process, whole features and ours."""
    parts = marked_parts(effort, seed)
    net, work = victim(parts, effort, seed)
    halves, validation = split(net, LAYER), part_of(net, parts["validation"])
    guarded = {f"{OURS}{text}, by socket": obfuscated(net, work, validation, bits=bits) for text, bits in WIRE.items()}
    x = parts["test"].pictures.first(1).inputs()
    with torch.no_grad():
        found = {"in one process": {"ms": measure(lambda: net(x), min_seconds=seconds).median_ms}}
        with serving(nn.Sequential(halves.layer, halves.rest)) as address:
            found[f"{RAW}, by socket"] = asked(Remote(halves.device, Plain(), address), x, seconds)
        for name, one in guarded.items():
            with one.serving() as remote:
                found[name] = asked(remote, x, seconds)
    return found


def asked(remote: Remote, x: Tensor, seconds: float) -> dict[str, float]:
    """Figures of one request."""
    time = measure(lambda: remote(x), min_seconds=seconds).median_ms
    traffic = remote.traffic
    remote.close()
    return {
        "ms": time,
        "device_ms": traffic.device_ms / traffic.calls,
        "sent_bytes": traffic.sent_bytes / traffic.calls,
        "received_bytes": traffic.received_bytes / traffic.calls,
    }


# --- the verdict -------------------------------------------------------------------------------------------------


def evidence(found: BySeed, times: dict[str, dict[str, float]], effort: Effort, seed: int) -> Evidence:
    """Rows, and the rule of `experiment`."""
    key, task = f"{DIGIT}_inferred_percent", "task_accuracy_percent"
    gains = {name: found.more(name, OURS, key) for name in RIVALS}
    lost = found.mean(RAW, task) - found.mean(OURS, task)
    sent = {name: one["sent_bytes"] for name, one in times.items() if "sent_bytes" in one}
    return Evidence(
        setup=f"10,000 digits of MNIST, half with a white corner; two convolutions on the device, two linear layers "
        f"(1568-64-2) on the server, {effort.pictures} pictures and {effort.steps} steps; adversaries with and "
        f"without a hidden layer on {effort.pictures} other pictures, {effort.attack_steps} steps; "
        f"{effort.test_pictures} test pictures, {effort.seeds} seeds from {1000 * seed}; "
        f"{torch.get_num_threads()} threads, CPU, loopback socket",
        rows=found.rows() + [Row(name, values) for name, values in times.items()],
        holds=judge(lost, gains),
        figure=f"digit named for {found.mean(OURS, key):.0f} % (all features {found.mean(RAW, key):.0f} %, by chance, "
        f"given the answer, 20 %) at {lost:.1f} points of accuracy; points less than "
        f"{', '.join(f'{name} {said(g, 1)}' for name, g in gains.items())}; "
        f"{' and '.join(f'{b:.0f} bytes ({name})' for name, b in sent.items())}",
        limits="One small network, one task and digits as what shall stay private; the code holds what the task needs "
        "and all that goes with it, without any bound. The loopback has no radio. The trained rival is linear.",
    )


def judge(lost_points: float, gains: dict[str, tuple[float, float]]) -> bool:
    """The rule of `experiment`; gains are (points by which adversaries do better with a rival, standard error)."""
    return lost_points <= TOLERATED and all(clearly(gain) for gain in gains.values())

"""Lookup-only inference: do k-means codebooks of weights and inputs keep a network's accuracy?"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.hooks import evaluating
from lilliput.methods.quantize._lut_net import LUTNet, compose
from lilliput.methods.quantize.lookup_tables import (
    Book,
    TableLinear,
    kmeans,
    nearest,
    sampled_inputs,
    uniform,
    with_zero,
)
from lilliput.metrics.latency import compare
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._pictures import Table
from lilliput.workload import Classifier, Workload
from lilliput.zoo import images
from lilliput.zoo.images import Pictures

paper = Paper(
    title="RAPIDNN: In-Memory Deep Neural Network Acceleration Framework",
    authors="Mohsen Imani, Mohammad Samragh, Yeseong Kim, Saransh Gupta, Farinaz Koushanfar, Tajana Rosing",
    year=2018,
    arxiv="1806.05794",
    claim="A network whose weights and inputs are indices into small k-means codebooks, with activations as tables and "
    "every layer's output encoded again, runs by lookups alone and loses less than 0.3 points of accuracy once it was "
    "retrained under its codebooks; looking up in memory saves most of the energy.",
    methods=("quantize.lookup_tables",),
)

NETS = ("mlp", "cnn")
FLOAT, LONGER, WEIGHTS_ONLY = "float32", "float32, trained on as long", "k-means weights, float inputs"
TOLERANCE = 0.3  # points of accuracy that may be lost, the paper's figure
RETRAIN_RATE = 3e-4
SAMPLES = 16_384  # inputs of a layer that are clustered
BIG, SMALL = 32, 16  # entries of the two halves of the rule
Books = tuple[Tensor, Tensor]  # of a layer's weights and of its inputs
# Picojoule, 45 nm: Horowitz, "Computing's energy problem", ISSCC 2014 (32-bit float operations; a 32-bit read of 8 KiB)
MULTIPLY_PJ, ADD_PJ, READ_PJ = 3.7, 0.9, 5.0


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment."""

    training: int
    steps: int
    retrain_steps: int
    rounds: int
    test: int
    seeds: int
    entries: tuple[int, ...]


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """An MLP and a small CNN, composed at several numbers of entries, as they are and retrained.

    Holds when (1) at 32 entries, retrained, the mean loss of accuracy over networks against float32 trained on for as
    many steps is below 0.3 points even with the standard error over seeds added, and (2) at 16 entries k-means is above
    uniform grids of the same index bits, retrained alike, by more than twice the joint standard error.
    """
    scale = (
        Scale(55_000, 3000, 600, 3, 10_000, 5, (8, 16, 32, 64))
        if full
        else Scale(20_000, 500, 80, 2, 10_000, 3, (8, 16, 32, 64))
    )
    table = Table()
    for s in range(seed, seed + scale.seeds):
        for net in NETS:
            one_network(table, net, scale, s, full)
    time_lookups(table, seed)
    rows = table.rows()
    (loss, loss_error), (gain, gain_error), holds = judge(rows, scale.seeds)
    return Evidence(
        setup=f"784-256-128-10 MLP on Fashion-MNIST and a two-convolution CNN on MNIST digits, up to {scale.training} "
        f"training pictures, {scale.rounds} rounds of {scale.retrain_steps} retraining steps, activation tables of 64 "
        f"entries, up to {scale.test} test pictures, seeds {list(range(seed, seed + scale.seeds))}, CPU",
        rows=rows,
        holds=holds,
        figure=f"{BIG} entries lose {loss:+.2f} ± {loss_error:.2f} points; {SMALL} by k-means are {gain:+.2f} ± "
        f"{gain_error:.2f} points above uniform grids of the same bits",
        limits="Small networks; the circuit (crossbars, associative memory, area, speed) is not simulated, energies "
        "are modelled from constants for 45 nm and leave encoding out. Retraining by straight-through gradients is "
        "reconstructed. Lookups are timed as torch gathers against BLAS on this CPU, where they lose.",
    )


def one_network(table: Table, net: str, scale: Scale, seed: int, full: bool = False) -> None:
    """All contenders on one trained network; retraining at every number of entries, or at those of the rule."""
    torch.manual_seed(seed)
    work = workload(net, scale)
    model = trained(work, scale.steps, seed)
    work.model = model
    table.add(FLOAT, f"{net}_accuracy_percent", work.score(model, "test").value)
    table.add(FLOAT, f"{net}_weight_bytes", sum(p.nbytes for p in model.parameters()))
    longer = retrained(model, work, 0, None, scale, seed)
    table.add(LONGER, f"{net}_accuracy_percent", work.score(longer, "test").value)
    for entries in scale.entries:
        for name, book in (("k-means", kmeans), ("uniform", uniform)):
            sources = [model]
            if full or entries in (BIG, SMALL):
                sources.append(retrained(model, work, entries, book, scale, seed))
            for source in sources:
                lut = compose(source, work, entries, entries, book=book, samples=SAMPLES)
                label = contender(name, entries, source is not model)
                table.add(label, f"{net}_accuracy_percent", decoded_accuracy(lut, work))
                if name == "k-means":
                    describe(table, label, net, lut, work)
        table.add(f"{WEIGHTS_ONLY}, {entries} entries", f"{net}_accuracy_percent", weights_only(model, work, entries))


def contender(kind: str, entries: int, again: bool) -> str:
    """Name of a row."""
    return f"{kind}, {entries} entries{', retrained' if again else ''}"


# --- networks and data -----------------------------------------------------------------------------------------


def workload(net: str, scale: Scale) -> Classifier:
    """An untrained network with pictures to train on, to cluster on and to test on."""
    parts = images.fashion_mnist() if net == "mlp" else images.digits()
    sizes = {"calibration": 512, "validation": 64, "test": scale.test, "training": scale.training}
    splits = {name: list(parts[name].first(size).batches(500)) for name, size in sizes.items() if name != "training"}
    model = mlp() if net == "mlp" else cnn()
    work = Workload.classifier(model, splits["calibration"], splits["validation"], splits["test"], name=net)
    work.training = parts["training"].first(scale.training).batches(1)
    return work


def mlp() -> nn.Sequential:
    """784-256-128-10 with ReLU."""
    sizes = (784, 256, 128)
    hidden = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def cnn() -> nn.Sequential:
    """Two 5x5 convolutions of 8 and 16 channels with pooling, and a linear head, for 28x28."""
    convolutions = [
        m for i, o in ((1, 8), (8, 16)) for m in (nn.Conv2d(i, o, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(784, 10))


def draws(pictures: Pictures, steps: int, seed: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Seeded random batches, inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(pictures), (size,), generator=generator)
        yield pictures.prepare(pictures.pixels[pick]), pictures.labels[pick]


def learn_(model: nn.Module, work: Workload, steps: int, rate: float, seed: int) -> None:
    """Adam with a falling rate on the training pictures."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for x, label in draws(work.training.pictures, steps, seed):  # type: ignore[union-attr]
        optimizer.zero_grad()
        F.cross_entropy(model(x), label).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def trained(work: Workload, steps: int, seed: int) -> nn.Sequential:
    """The float network, trained."""
    model = copy.deepcopy(work.model)
    learn_(model, work, steps, 3e-3, seed)
    assert isinstance(model, nn.Sequential)
    return model


# --- retraining under the codebooks ----------------------------------------------------------------------------


class Nearest(nn.Module):
    """Rounds to the entries of a book; the gradient passes straight through."""

    def __init__(self, book: Tensor):
        super().__init__()
        self.book = book

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.book[nearest(x.detach(), self.book)] - x).detach()


def retrained(
    model: nn.Sequential, work: Workload, entries: int, book: Book | None, scale: Scale, seed: int
) -> nn.Sequential:
    """A copy that learned with weights and inputs rounded, codebooks made anew before each round (reconstructed).

    Without a `book` it learns in float32, from the same pictures.
    """
    model = copy.deepcopy(model)
    for i in range(scale.rounds):
        books = {} if book is None else books_of(model, work, partial(_alike, book, entries))
        with rounding(model, books):
            learn_(model, work, scale.retrain_steps, RETRAIN_RATE, 1000 * (seed + 1) + i)
    return model


def _alike(book: Book, entries: int, _: str, layer: nn.Module, seen: Tensor) -> Books:
    return book(layer.get_parameter("weight"), entries), book(seen, entries)


def books_of(model: nn.Sequential, work: Workload, make: Callable[[str, nn.Module, Tensor], Books]) -> dict[str, Books]:
    """Name -> codebooks of weights and inputs of each layer; `make` gets its name, itself and sampled inputs."""
    layers = {n: m for n, m in model.named_children() if isinstance(m, nn.Linear | nn.Conv2d)}
    seen = sampled_inputs(model, work, list(layers), work.calibration, SAMPLES)
    return {name: make(name, layer, seen[name]) for name, layer in layers.items()}


@contextmanager
def rounding(model: nn.Sequential, books: Mapping[str, Books]) -> Iterator[None]:
    """The network with weights and inputs rounded to books; the float weights it learned stay behind."""
    handles = []
    for name, (weight_book, input_book) in books.items():
        layer, inputs = model.get_submodule(name), Nearest(with_zero(input_book))
        parametrize.register_parametrization(layer, "weight", Nearest(weight_book))
        handles.append(layer.register_forward_pre_hook(lambda _, args, inputs=inputs: (inputs(args[0]),)))
    yield
    for handle, name in zip(handles, books):
        layer = model.get_submodule(name)
        handle.remove()
        latent = layer.parametrizations.weight.original.detach().clone()  # type: ignore[union-attr]
        parametrize.remove_parametrizations(layer, "weight")
        layer.weight.data.copy_(latent)  # type: ignore[union-attr]


# --- measuring -------------------------------------------------------------------------------------------------


class Decoded(nn.Module):
    """A LUTNet whose sums are computed from decoded indices."""

    def __init__(self, lut: LUTNet):
        super().__init__()
        self.lut = lut

    def forward(self, input: Tensor) -> Tensor:
        return self.lut(input, lookup=False)


def decoded_accuracy(lut: LUTNet, work: Workload) -> float:
    """Accuracy on the test split; the sums are those of the lookups up to float rounding."""
    return work.score(Decoded(lut), "test").value


def describe(table: Table, label: str, net: str, lut: LUTNet, work: Workload, pictures: int = 20) -> None:
    """Bytes, and the share of answers that pure lookups share with decoding, on some test pictures."""
    table.add(label, f"{net}_index_bytes", lut.index_bytes)
    table.add(label, f"{net}_table_bytes", lut.table_bytes)
    x = work.test[0]["input"][:pictures]
    same = lut(x).argmax(-1) == lut(x, lookup=False).argmax(-1)
    table.add(label, f"{net}_same_answers_by_lookup_percent", 100 * float(same.float().mean()))


def weights_only(model: nn.Sequential, work: Workload, entries: int) -> float:
    """Accuracy with clustered weights and float inputs."""
    clustered = copy.deepcopy(model)
    with torch.no_grad(), evaluating(clustered):
        for module in clustered:
            if isinstance(module, nn.Linear | nn.Conv2d):
                book = kmeans(module.weight, entries)
                module.weight.copy_(book[nearest(module.weight, book)])
    return work.score(clustered, "test").value


def time_lookups(table: Table, seed: int, entries: int = BIG) -> None:
    """One picture through a 784 x 256 layer, by gathers and by BLAS, and the modelled energy of a multiply-add."""
    torch.manual_seed(seed)
    linear, x = nn.Linear(784, 256), torch.randn(1, 784)
    layer = TableLinear(784, 256, entries, entries)
    layer.set_(linear.weight, kmeans(linear.weight, entries), kmeans(torch.randn(5000), entries), linear.bias)
    a, codes = nearest(x, layer.input_book), layer.indices()
    with torch.inference_mode():
        found = compare(lambda: layer._add_up(a, codes), lambda: F.linear(x, linear.weight), rounds=15)
    label = contender("k-means", entries, True)
    for name, ms in zip((label, FLOAT), found.medians_ms):
        table.add(name, f"layer_784x256_us_{torch.get_num_threads()}_threads", 1e3 * ms)
    index_bits = 2 * layer.bits
    table.add(FLOAT, "modelled_pj_per_multiply_add", MULTIPLY_PJ + ADD_PJ + READ_PJ)
    table.add(label, "modelled_pj_per_multiply_add", READ_PJ + ADD_PJ + READ_PJ * index_bits / 32)


def judge(rows: list[Row], seeds: int) -> tuple[tuple[float, float], tuple[float, float], bool]:
    """Loss at 32 entries and gain of k-means at 16, each with its standard error, and whether both halves hold."""
    found = {row.name: row for row in rows}
    loss = _difference(found[LONGER], found[contender("k-means", BIG, True)], seeds)
    gain = _difference(found[contender("k-means", SMALL, True)], found[contender("uniform", SMALL, True)], seeds)
    return loss, gain, bool(loss[0] + loss[1] < TOLERANCE and gain[0] > 2 * gain[1])


def _difference(a: Row, b: Row, seeds: int) -> tuple[float, float]:
    """Mean difference of accuracies over networks, and its standard error."""
    keys = [f"{net}_accuracy_percent" for net in NETS]
    spread = sum(row.spread.get(key, 0.0) ** 2 for row in (a, b) for key in keys) ** 0.5 / len(keys)
    return statistics.fmean(a.values[k] - b.values[k] for k in keys), spread / seeds**0.5

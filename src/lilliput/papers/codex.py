"""Codes of a few bits between layers: do they keep accuracy, and how much more do they let a chip do?"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.edits import set_module
from lilliput.methods.circuits._fpga import Fpga
from lilliput.methods.circuits.streaming import Design, Streaming
from lilliput.methods.quantize.lookup_tables import Book, kmeans, table_layer, uniform, with_zero
from lilliput.paper import Evidence, Paper
from lilliput.papers._circuits import hardware, lacking
from lilliput.papers._healed import clearly, close, said
from lilliput.papers._pictures import Table
from lilliput.papers.rapidnn import RETRAIN_RATE, Books, books_of, learn_, rounding
from lilliput.workload import Workload
from lilliput.zoo import images
from lilliput.zoo.images import Pictures

paper = Paper(
    title="CodeX: Bit-Flexible Encoding for Streaming-based FPGA Acceleration of DNNs",
    authors="Mohammad Samragh, Mojan Javaheripi, Farinaz Koushanfar",
    year=2019,
    arxiv="1901.05582",
    claim="Weights and activations stored as codes of a few bits, entries of k-means codebooks, lose little accuracy "
    "after fine-tuning and let a whole network stream from the memory of an FPGA: 4.65 times the throughput of one "
    "that encodes weights alone.",
    methods=("circuits.streaming", "quantize.lookup_tables"),
)

FLOAT, CODES, UNIFORM, WEIGHTS = "float32", "4-bit codes (CodeX)", "4-bit uniform", "4-bit weights alone"
ENTRIES, WIDE = 16, 256  # of the codebooks, and of the evenly spaced 8-bit activations behind encoded weights
TOLERATED_POINTS = 1.0  # of accuracy against float32, two standard errors included
GAIN = 2.0  # times the frames from a chip of the same size, less than half of the paper's 4.65
RATE = 3e-3  # of learning; fixed before any result
CHIP, CYCLES = "ice40-up5k", 60_000  # where memory is scarce, and the cycles of the slowest stage


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment."""

    steps: int
    retrain_steps: int
    rounds: int
    test: int
    seeds: int
    frames: int  # simulated; C++ runs all test pictures


def network() -> nn.Sequential:
    """Conv-4 for 28 x 28: two padded convolutions of 8 and 16 channels, each pooled, and two linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Three ways to encode one network, each fine-tuned under its codes, scored as its integers; three circuits.

    Holds when (1) 4-bit codes are not TOLERATED_POINTS below float32 trained as long, two standard errors over seeds
    included, (2) for the same chip and cycles their circuit needs at most 1 / GAIN of the share that the scarcest
    resource takes with encoded weights alone, counted after synthesis, and (3) no score of a simulated frame or of the
    C++ differs from PyTorch's integers.
    """
    scale = Scale(3000, 500, 3, 10_000, 5, 1000) if full else Scale(500, 100, 2, 1000, 3, 20)
    missing = lacking()
    if missing:
        raise missing
    table, designs = Table(), {}
    for s in range(seed, seed + scale.seeds):
        found = one_network(table, scale, s)
        designs = designs or found
    circuits(table, designs, scale)
    return evidence(table, scale, seed)


def workload(model: nn.Module, scale: Scale) -> Workload:
    """Fashion-MNIST with pixels from 0 to 1, so that a byte of the circuit is a pixel."""
    splits = images.fashion_mnist()
    sizes = {"calibration": 512, "validation": 256, "test": scale.test, "training": 55_000}
    parts = {
        name: Pictures(splits[name].pixels[:size], splits[name].labels[:size], _shades) for name, size in sizes.items()
    }
    work = Workload.classifier(model, *(parts[name].batches(256) for name in ("calibration", "validation", "test")))
    work.training = parts["training"].batches(64)
    return work


def _shades(pixels: Tensor) -> Tensor:
    return pixels.float().unsqueeze(1) / 255


def one_network(table: Table, scale: Scale, seed: int) -> dict[str, Design]:
    """Train in float32, fine-tune in every form, and note the accuracy of the integers."""
    torch.manual_seed(seed)
    model = network()
    work = workload(model, scale)
    learn_(model, work, scale.steps, RATE, seed)
    work.model = model
    longer = fine_tuned(model, work, None, scale, seed)
    table.add(FLOAT, "accuracy_percent", work.score(longer, "test").value)
    x, labels = (torch.cat([batch[key] for batch in work.test]) for key in ("input", "label"))
    designs = {}
    for name in (CODES, UNIFORM, WEIGHTS):
        coded = encoded(fine_tuned(model, work, name, scale, seed), work, name)
        design = Streaming(cycles=CYCLES).emit(coded, work)
        answers = design.net(design.net.read(x)).argmax(1)
        table.add(name, "accuracy_percent", 100 * float((answers == labels).float().mean()))
        with torch.inference_mode():
            table.add(
                name, "same_answers_as_float_sums_percent", 100 * float((answers == coded(x).argmax(1)).float().mean())
            )
        designs[name] = design
    return designs


def books(name: str, layer_name: str, layer: nn.Module, seen: Tensor) -> Books:
    """Codebooks of weights and inputs of one layer; the first layer, "0", sees the 256 shades of its pixels."""
    book: Book = uniform if name == UNIFORM else kmeans
    weights = book(layer.get_parameter("weight"), ENTRIES)
    if layer_name == "0":
        return weights, torch.arange(WIDE) / (WIDE - 1)
    if name == WEIGHTS:
        return weights, torch.linspace(0, float(seen.max()), WIDE)
    return weights, book(seen, ENTRIES)


def fine_tuned(model: nn.Sequential, work: Workload, name: str | None, scale: Scale, seed: int) -> nn.Sequential:
    """A copy that learned with its weights and inputs rounded, codebooks made anew before each round (reconstructed).

    Without a name it learns in float32, from the same pictures.
    """
    model = copy.deepcopy(model)
    for i in range(scale.rounds):
        made = {} if name is None else books_of(model, work, lambda *found: books(name, *found))
        with rounding(model, made):
            learn_(model, work, scale.retrain_steps, RETRAIN_RATE, 1000 * (seed + 1) + i)
    return model


def encoded(model: nn.Sequential, work: Workload, name: str) -> nn.Sequential:
    """The network with its layers as tables of codes."""
    made = books_of(model, work, lambda *found: books(name, *found))
    for layer_name, (weights, inputs) in made.items():
        set_module(model, layer_name, table_layer(model.get_submodule(layer_name), weights, with_zero(inputs)))
    return model.eval()


def circuits(table: Table, designs: dict[str, Design], scale: Scale) -> None:
    """Cycles, cells and errors of the first network in every form."""
    frames = images.fashion_mnist()["test"].pixels[: scale.test].unsqueeze(1)
    for name, design in designs.items():
        for quantity, value in hardware(design, frames[: scale.frames], Fpga.load(CHIP), multipliers=False).items():
            table.add(name, quantity, value)
        table.add(name, "wrong_scores_of_cpp", float((design.run_cpp(frames)[0] != design.net(frames)).sum()))


def evidence(table: Table, scale: Scale, seed: int) -> Evidence:
    """Rows and verdict of what was trained and measured."""
    rows = {row.name: row for row in table.rows()}

    def ahead(other: str) -> tuple[float, float]:
        gains = [a - b for a, b in zip(table.all(CODES, "accuracy_percent"), table.all(other, "accuracy_percent"))]
        return statistics.fmean(gains), statistics.stdev(gains) / len(gains) ** 0.5

    codes, weights = rows[CODES].values, rows[WEIGHTS].values
    gain = weights["chip_share"] * weights["cycles_per_frame"] / (codes["chip_share"] * codes["cycles_per_frame"])
    wrong = sum(row.values.get(k, 0.0) for row in rows.values() for k in ("wrong_scores", "wrong_scores_of_cpp"))
    fine = close(ahead(FLOAT), TOLERATED_POINTS)
    better = "clearly above" if clearly(ahead(UNIFORM)) else "not clearly above"
    return Evidence(
        setup=f"Conv-4 (8 and 16 channels, 16 hidden) on Fashion-MNIST, {scale.steps} steps of 64 pictures, "
        f"{scale.rounds} rounds of {scale.retrain_steps} under codes, {scale.test} test pictures, seeds {seed} to "
        f"{seed + scale.seeds - 1}; circuits of seed {seed} for {CHIP} without its multipliers, Yosys, not placed",
        rows=list(rows.values()),
        holds=bool(fine and gain >= GAIN and wrong == 0),
        figure=f"4-bit codes are {said(ahead(FLOAT), 2)} points from float32, {better} 4-bit uniform "
        f"({said(ahead(UNIFORM), 2)}); a chip gives {gain:.2f} times the frames of encoded weights alone; "
        f"{wrong:.0f} wrong scores",
        limits="One small network; the paper's 4.65 times are for large ones on large chips. Frames a second are taken "
        "as inverse to the share of the scarcest resource at equal cycles and clock; nothing was placed, no clock "
        "proved. The search for bits is left out: all layers have 4. Fine-tuning under codes is reconstructed.",
    )

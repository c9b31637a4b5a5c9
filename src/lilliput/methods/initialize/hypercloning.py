"""HyperCloning: a wider model that computes what a trained narrow one does, as the start of its own training.

Paper: Scaling Smart: Accelerating Large Language Model Pre-training with Small Model Initialization (Samragh et al.,
2024, arXiv 2409.12903). Every activation becomes n copies of itself one behind the other; a linear layer from n_in to
n_out copies is

    symmetric:  W' = [[W, W, ..], [W, W, ..], ..] / n_in        diagonal:  W' = diag(W, W, ..)
    noise:      + N and - N on two neighbouring blocks of a row, which cancels on two equal copies

The number of heads grows, their size does not, so the softmax and rotary positions stay as they were; a single
key-value head stays single. Norms and embeddings are repeated. An output layer that is the embedding (tied) cannot be
divided by n: the norm before it is (reconstructed). Without noise the copies of a symmetric model get equal gradients
and stay copies for ever. Begin training with a fresh optimizer and a warm-up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import BLOCK_COUNT, EXACT_OUTPUT, FLOAT_WEIGHTS, OUTPUT_SHAPE, Facts, knob
from lilliput.methods.initialize._resize import (
    FFN,
    HEADS,
    KV,
    WIDTH,
    Place,
    Resizing,
    Sizes,
    parent_sizes,
    random_input,
    resized,
)
from lilliput.workload import Workload

TOLERATED = {2: 0.1, 4: 1e-3, 8: 1e-3}  # by bytes of a weight: relative change of the output that rounding explains


@dataclass(frozen=True)
class HyperCloning(Resizing):
    """Grow a trained transformer into a wider one with the same function, to train that from there."""

    width: int = knob(2, low=1, high=64, help="how many times as wide, with as many times the heads")
    ffn: int = knob(2, low=1, high=64, help="how many times as many feed-forward neurons")
    variant: str = knob("symmetric", choices=("symmetric", "diagonal"), help="copies read all copies, or their own")
    noisy: bool = knob(True, choices=(False, True), help="noise that cancels, so that copies do not stay copies")
    snr_db: float = knob(10.0, low=-40, high=120, help="of noise: how far it lies below the weights, in decibels")
    seed: int = knob(0, low=0, help="of noise")

    paper: ClassVar[str] = "hypercloning"
    facts: ClassVar[Facts] = Facts(
        stage="initialize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT, EXACT_OUTPUT},
        effect="larger, with the same function",
    )

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        settings = next(iter(layers.values()))
        before = parent_sizes(model, self.name())
        copies = settings.copies(before)
        after = dataclasses.replace(
            before,
            width=before.width * settings.width,
            heads=before.heads * settings.width,
            kv_heads=before.kv_heads * copies[KV],
            ffn=before.ffn * settings.ffn,
        )
        generator = torch.Generator().manual_seed(settings.seed)

        def make(tensor: Tensor, place: Place) -> Tensor:
            return settings.grown(tensor, place, before, copies, generator)

        child = resized(model, self.name(), before, after, range(before.blocks), make, 1 / settings.width)
        check_same_function(model, child, self.name())
        return child

    def copies(self, before: Sizes) -> dict[str, int]:
        """How many copies there will be of what a dimension runs over."""
        single = before.kv_heads == 1 < before.heads
        return {WIDTH: self.width, HEADS: self.width, KV: 1 if single else self.width, FFN: self.ffn}

    def grown(
        self, tensor: Tensor, place: Place, before: Sizes, copies: Mapping[str, int], generator: torch.Generator
    ) -> Tensor:
        """One tensor of the new model."""
        reads = next((i for i, axis in enumerate(place.axes) if axis.reads and axis.kinds), None)
        if reads is None:
            return self.repeated(tensor, place, before, copies)
        if tensor.ndim != 2:
            raise UserError(f"{self.name()} grows linear layers, but {place.source!r} is {list(tensor.shape)}")
        weight, outputs = (tensor.T, place.axes[1]) if reads == 0 else (tensor, place.axes[0])
        n_in = copies[place.axes[reads].kinds[0]]
        lengths = list(map(before.total, outputs.kinds)) or [len(weight)]
        counts = [copies[kind] for kind in outputs.kinds] or [1]
        rows = torch.cat([self.linear(w, n, n_in, generator) for w, n in zip(weight.split(lengths), counts)])
        return rows.T if reads == 0 else rows

    def repeated(self, tensor: Tensor, place: Place, before: Sizes, copies: Mapping[str, int]) -> Tensor:
        """A bias, a norm, an embedding: its entries once for each copy."""
        for dim, axis in enumerate(place.axes):
            if axis.kinds:
                parts = tensor.split([before.total(kind) for kind in axis.kinds], dim)
                tensor = torch.cat([p for part, kind in zip(parts, axis.kinds) for p in [part] * copies[kind]], dim)
        return tensor

    def linear(self, weight: Tensor, n_out: int, n_in: int, generator: torch.Generator) -> Tensor:
        """(out, in) -> (n_out out, n_in in), which maps n_in copies of x to n_out copies of W x."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        grown = blocks(weight, n_out, n_in, self.variant == "diagonal")
        if self.noisy:
            size = float(weight.square().mean().sqrt()) / n_in * 10 ** (-self.snr_db / 20)
            pairs = n_in // 2
            noise = size * torch.randn(n_out, pairs, *weight.shape, generator=generator)
            grown[:, 0 : 2 * pairs : 2] += noise
            grown[:, 1 : 2 * pairs : 2] -= noise
        return grown.transpose(1, 2).flatten(2).flatten(0, 1)


def blocks(weight: Tensor, n_out: int, n_in: int, diagonal: bool) -> Tensor:
    """(out, in) -> (n_out, n_in, out, in): what each copy of the output reads from each copy of the input.

    Where the numbers of copies differ, the diagonal is as many times narrower as their largest common divisor says.
    """
    groups = math.gcd(n_out, n_in) if diagonal else 1
    rows, columns = torch.arange(n_out)[:, None], torch.arange(n_in)
    shares = ((rows - columns) % groups == 0) * (groups / n_in)
    return shares[:, :, None, None] * weight


def check_same_function(before: Any, after: Any, method: str) -> None:
    """Raises UserError when two models answer a random input differently, by more than rounding explains.

    A model without an output layer gives copies of what the other one gives.
    """
    answers = []
    for model in (before, after):
        with torch.no_grad(), evaluating(model):
            answers.append(next(iter(model(random_input(before), return_dict=True).values())).float())
    answers[0] = torch.cat([answers[0]] * (answers[1].shape[-1] // answers[0].shape[-1]), -1)
    error = float((answers[0] - answers[1]).abs().max() / answers[0].abs().max().clamp_min(1e-30))
    if not error <= TOLERATED[next(before.parameters()).itemsize]:
        raise UserError(
            f"{method}: the grown {type(before).__name__} answers differently (by {error:.2g} of its largest output): "
            "something in it depends on its width in a way that is not known here"
        )

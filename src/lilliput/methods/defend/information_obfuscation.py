"""Split inference that sends only what the server's first layer reads: W z = U S V'z, small coefficients left out.

    code = (V'z)_kept     server:  U S_kept code + b, then the rest of the model
    leave out the i of least s_i^2 (v_i'z)^2 while their sum <= budget * |W z|^2

Paper: Samragh, Hosseini, Triastcyn, Azarian, Soriaga and Koushanfar, Unsupervised Information Obfuscation for Split
Inference of Neural Networks, 2021 (arXiv 2104.11413). What W maps to zero never leaves the device, and with budget 0
the answer stays the same. `fixed` chooses once from averages over the calibration data; `sample` for every input, and
then sends which were chosen. Reconstructed: for a convolution W is the kernel over unfolded patches, and a coefficient
is a channel of the code. There is no bound on what can be inferred: what the task needs is sent.

    guarded = InformationObfuscation(layer="fc1").wrap(model, workload)
    with guarded.serving() as remote:           # the server half in another process, over a socket
        logits = remote(x)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.framing import TIMEOUT_S
from lilliput.hooks import evaluating
from lilliput.method import OUTPUT_SHAPE, UNLABELLED, Facts, Guard, knob
from lilliput.methods.defend._split import Halves, cuts, split
from lilliput.methods.defend._wire import Code, Remote, serving
from lilliput.workload import Workload

FIXED, SAMPLE = "fixed", "sample"
TYPES = {32: torch.float32, 16: torch.float16, 8: torch.int8}


class Basis(NamedTuple):
    """W (m, n) = U S V' without its zeros: `read` = V' (r, n), `write` = U S (m, r), `power` = s^2 (r,)."""

    read: Tensor
    write: Tensor
    power: Tensor

    def only(self, kept: Tensor) -> Basis:
        """With some of the r coefficients, by mask."""
        return Basis(self.read[kept], self.write[:, kept], self.power[kept])


def signal_basis(weight: Tensor) -> Basis:
    """The singular vectors of a weight (m, ...) that are more than rounding errors."""
    w = weight.detach().flatten(1)
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    real = s > s[0] * max(w.shape) * torch.finfo(w.dtype).eps
    if not real.any():
        raise UserError("the server's first layer has only zeros as weights; split the model elsewhere")
    kept = (vh[real], u[:, real] * s[real], s[real].square())
    return Basis(*(t.to(w.dtype) for t in kept))


def worth_sending(energy: Tensor, budget: float) -> Tensor:
    """(..., r) energies -> mask: without the smallest whose sum is within `budget` of all; one always stays."""
    ordered, places = energy.double().sort(-1)
    left_out = ordered.cumsum(-1) <= budget * ordered.sum(-1, keepdim=True)
    left_out[..., -1] = False
    return torch.zeros_like(left_out).scatter(-1, places, ~left_out)


class Encoder(nn.Module):
    """Features z -> code (B, r, ...): `read` gives coefficients, `worth_sending` chooses, 8 bits are steps of `scale`.

    `power` (r,) makes energies of squared coefficients; `budget` below 0 sends all of them without a mask.
    """

    power: Tensor
    scale: Tensor

    def __init__(self, read: nn.Linear | nn.Conv2d, power: Tensor, scale: Tensor, bits: int, budget: float):
        super().__init__()
        self.read, self.bits, self.budget = read, bits, budget
        self.register_buffer("power", power)
        self.register_buffer("scale", scale)

    def coefficients(self, z: Tensor) -> Tensor:
        """(B, r, ...), what is not a coefficient's number behind it."""
        code = self.read(z)
        return code.movedim(-1, 1) if isinstance(self.read, nn.Linear) else code

    def energies(self, code: Tensor) -> Tensor:
        """(B, r): how much of |W z|^2 each coefficient is, over all places."""
        return code.flatten(2).square().sum(-1) * self.power if code.ndim > 2 else code.square() * self.power

    def forward(self, z: Tensor) -> Code:
        code = self.coefficients(z)
        mask = worth_sending(self.energies(code), self.budget) if self.budget >= 0 else None
        if mask is not None:
            code = code * _along(mask, code)
        if self.bits == 8:
            code = (code / _along(self.scale, code)).round().clamp(-127, 127)
        return Code(code.to(TYPES[self.bits]), mask)


class ServerHalf(nn.Module):
    """Code (B, r, ...) -> the model's answer: `write` is the first layer in the basis of the code, `rest` follows."""

    def __init__(self, write: nn.Linear | nn.Conv2d, rest: nn.Module, scale: Tensor, bits: int):
        super().__init__()
        self.write, self.rest, self.bits = write, rest, bits
        self.register_buffer("scale", scale)

    def forward(self, code: Tensor) -> Tensor:
        if code.dtype is not TYPES[self.bits] or code.ndim < 2 or code.shape[1] != len(self.scale):
            raise UserError(
                f"a code of the type {code.dtype} and the shape {tuple(code.shape)} is not of this split, which has "
                f"{len(self.scale)} coefficients of {self.bits} bits"
            )
        values = code.to(self.write.weight.dtype)
        if self.bits == 8:
            values = values * _along(self.scale, values)
        return self.rest(self.write(values.movedim(1, -1) if isinstance(self.write, nn.Linear) else values))


class Obfuscated(nn.Module):
    """The split model in one process; what crosses is the same to the bit as over a socket."""

    def __init__(self, device: nn.Module, encoder: Encoder, server: ServerHalf):
        super().__init__()
        self.device, self.encoder, self.server = device, encoder, server

    def encode(self, *args: Any, **kwargs: Any) -> Code:
        """What leaves the device."""
        return self.encoder(self.device(*args, **kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.server(self.encode(*args, **kwargs).values)

    @contextmanager
    def serving(self, timeout_s: float = TIMEOUT_S) -> Iterator[Remote]:
        """The server half in another process, and the device half that asks it over a socket."""
        with serving(self.server, timeout_s) as address:
            remote = Remote(self.device, self.encoder, address, timeout_s).eval()
            try:
                yield remote
            finally:
                remote.close()


@dataclass(frozen=True)
class InformationObfuscation(Guard):
    """Split a model between a device and a server, and send the server no more than its first layer makes use of."""

    layer: str = knob("", help="first layer of the server, linear or convolution; empty: the last possible one")
    budget: float = knob(0.05, low=0.0, high=0.999, help="share of that layer's output energy that may be lost")
    mode: str = knob(FIXED, choices=(FIXED, SAMPLE), help="choose what is sent once, or for every input")
    bits: int = knob(32, choices=tuple(TYPES), help="of a number that is sent")
    paper: ClassVar[str] = "information_obfuscation"
    facts: ClassVar[Facts] = Facts(
        stage="serve", keeps={OUTPUT_SHAPE}, data=UNLABELLED, effect="fewer features leave the device"
    )

    def targets(self, model: nn.Module) -> list[str]:
        """Layers before which the model can be split. Raises UserError when torch.fx cannot trace it."""
        return cuts(model)

    def wrap(self, model: nn.Module, workload: Workload) -> Obfuscated:
        """The split model; averages and ranges are taken of the calibration inputs."""
        possible = self.targets(model)
        if not possible:
            raise UserError(f"{type(model).__name__} has no linear or convolution layer that alone reads what crosses")
        halves = split(model, self.layer or possible[-1])
        basis = signal_basis(halves.layer.weight)
        whole = Encoder(_reader(halves.layer, basis), basis.power, torch.ones_like(basis.power), 32, -1.0)
        energy, peak = _seen(halves.device, whole, workload)
        if self.mode == FIXED:
            kept = worth_sending(energy, self.budget)
            basis, peak = basis.only(kept), peak[kept]
        return self._assembled(halves, basis, (peak / 127).clamp_min(1e-12))

    def _assembled(self, halves: Halves, basis: Basis, scale: Tensor) -> Obfuscated:
        budget = self.budget if self.mode == SAMPLE else -1.0
        encoder = Encoder(_reader(halves.layer, basis), basis.power, scale, self.bits, budget)
        server = ServerHalf(_writer(halves.layer, basis), halves.rest, scale, self.bits)
        return Obfuscated(halves.device, encoder, server).eval()


def _along(factors: Tensor, code: Tensor) -> Tensor:
    """Factors (r,) or (B, r) shaped so that they multiply a code (B, r, ...)."""
    return factors.reshape(-1, factors.shape[-1], *(1,) * (code.ndim - 2))


@torch.no_grad()
def _seen(device: nn.Module, encoder: Encoder, workload: Workload) -> tuple[Tensor, Tensor]:
    """Mean energy and largest size of every coefficient (r,) over the calibration data."""
    energies, peaks = [], []
    with evaluating(device):
        for batch in workload.calibration:
            code = encoder.coefficients(workload.forward(device, batch))
            energies.append(encoder.energies(code))
            peaks.append(code.movedim(1, 0).flatten(1).abs().amax(1))
    energy = torch.cat(energies).double().mean(0)
    if not torch.isfinite(energy).all():
        raise UserError("the features are not finite on the calibration data; check the model and the data")
    return energy, torch.stack(peaks).amax(0)


def _reader(layer: nn.Linear | nn.Conv2d, basis: Basis) -> nn.Linear | nn.Conv2d:
    """The layer that gives coefficients, of the kind and the geometry of `layer`."""
    rank = len(basis.power)
    if isinstance(layer, nn.Linear):
        made: Any = nn.Linear(layer.in_features, rank, bias=False)
    else:
        geometry: Any = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        made = nn.Conv2d(layer.in_channels, rank, *geometry, bias=False)
    made.weight = nn.Parameter(basis.read.reshape(rank, *layer.weight.shape[1:]), requires_grad=False)
    return made


def _writer(layer: nn.Linear | nn.Conv2d, basis: Basis) -> nn.Linear | nn.Conv2d:
    """The layer that makes the first layer's output of coefficients; it adds the bias."""
    rank, outputs = len(basis.power), len(layer.weight)
    sizes: Any = (rank, outputs) if isinstance(layer, nn.Linear) else (rank, outputs, 1)
    made: Any = type(layer)(*sizes, bias=layer.bias is not None)
    made.weight = nn.Parameter(basis.write.reshape(made.weight.shape).clone(), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return made

"""Answers pictures that carry a trojan's trigger as if they did not: what harmless data cannot explain is rebuilt.

Paper: CLEANN: Accelerated Trojan Shield for Embedded Neural Networks (Javaheripi et al., 2020, arXiv 2009.02326)

    a = OMP(c / deviation),  c the cosine transform of a piece of the picture, D learned from harmless ones
    e = |c / deviation - D a|;   flagged where (e - mean) / deviation > bound;   a flagged piece becomes D a

and the same for the features that the linear head reads: where these are flagged, the whole picture is rebuilt and
asked again. No label and no triggered picture is used: the calibration data is split in two, one half for the atoms,
one for mean, deviation and bound. `bound="chebyshev"` is the paper's kind of bound, an inequality that holds for any
distribution (Cantelli's) and flags far less than it may; "percentile" counts. The guard's forward pass answers the
cleaned picture. Reconstructed: a dictionary for each place of a picture, frequencies scaled by their deviation there,
codes no larger than harmless ones, one bound for the most striking piece, atoms learned by the method of optimal
directions, and that odd features have the whole picture rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.hooks import evaluating
from lilliput.method import UNLABELLED, Facts, knob
from lilliput.methods.audit._pictures import cosines
from lilliput.methods.defend._dictionary import assembled, learned_atoms, pieces, rebuilt, sparse_codes
from lilliput.methods.defend._guarded import (
    Detector,
    GuardedModel,
    Seen,
    answered,
    changing_input,
    linear_head,
    one_sided_limit,
    pictures_of,
)
from lilliput.workload import Workload

BOUNDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "percentile": lambda values, share: values.quantile(1 - share),
    "chebyshev": one_sided_limit,
}
FLOOR = 0.05  # least deviation of a frequency or of a place, as a share of the mean of all


class Analyser(nn.Module):
    """How far vectors (G, N, d) of G kinds are from what few atoms explain, and what these atoms make of them."""

    center: Tensor
    scale: Tensor
    atoms: Tensor
    reach: Tensor
    mean: Tensor
    deviation: Tensor
    bound: Tensor

    def __init__(self, harmless: Tensor, settings: Cleann):
        """Learn from harmless vectors (G, N, d)."""
        super().__init__()
        atoms, count = settings.atoms, settings.sparsity
        self.count = count
        self.register_buffer("center", harmless.mean(1, keepdim=True))
        spread = harmless.std(1, keepdim=True)
        self.register_buffer("scale", spread + FLOOR * spread.mean().clamp_min(1e-6))
        first, second = harmless[:, ::2], harmless[:, 1::2]
        self.register_buffer("atoms", learned_atoms(self._scaled(first), atoms, count))
        weights = sparse_codes(self._scaled(first), self.atoms, count)[1]
        self.register_buffer("reach", weights.abs().amax((1, 2), keepdim=True))
        error = self._explained(second)[1]
        self.register_buffer("mean", error.mean(1, keepdim=True))
        deviation = error.std(1, keepdim=True)
        self.register_buffer("deviation", deviation + FLOOR * deviation.mean().clamp_min(1e-6))
        striking = ((error - self.mean) / self.deviation).amax(0)
        bound = BOUNDS[settings.bound](striking, settings.false_alarms / 2)  # there are two analysers
        self.register_buffer("bound", bound.clamp_min(1e-6))

    def _scaled(self, x: Tensor) -> Tensor:
        return (x - self.center) / self.scale

    def _explained(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scaled = self._scaled(x)
        index, weights = sparse_codes(scaled, self.atoms, self.count)
        simple = rebuilt(index, weights.clamp(-self.reach, self.reach), self.atoms)
        return simple * self.scale + self.center, (scaled - simple).norm(dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x rebuilt from atoms (G, N, d), and doubts (G, N), above 1 where it is out of bounds."""
        simple, error = self._explained(x)
        return simple, (error - self.mean) / self.deviation / self.bound


class CleannModel(GuardedModel):
    """A model whose inputs and features are cleaned of what harmless data does not explain."""

    waves: Tensor

    def __init__(self, model: nn.Module, head: str, settings: Cleann, harmless: Tensor):
        super().__init__(model)
        self.head, self.size = head, settings.patch
        self.register_buffer("waves", cosines(settings.patch).to(harmless))
        self.input_analyser = Analyser(self._transformed(harmless), settings)
        self.feature_analyser = Analyser(self._features(harmless).unsqueeze(0), settings)

    def _transformed(self, x: Tensor) -> Tensor:
        """The cosine transform of all pieces, (places, B, C size^2)."""
        parts = pieces(x, self.size).unflatten(-1, (x.shape[1], self.size, self.size))
        return (self.waves @ parts @ self.waves.T).flatten(2)

    def _restored(self, parts: Tensor, shape: torch.Size) -> Tensor:
        waves = parts.unflatten(-1, (shape[1], self.size, self.size))
        return assembled((self.waves.T @ waves @ self.waves).flatten(2), shape, self.size)

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        """What the head reads, (B, d)."""
        seen: list[Tensor] = []
        with evaluating(self.model), changing_input(self.model, self.head, lambda f: seen.append(f) or f):
            for part in x.split(128):
                answered(self.model, part)
        return torch.cat(seen).flatten(1)

    def clean(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures with flagged pieces rebuilt, and the doubt (B,) about the most striking piece of each; pictures
        without a flagged piece are as they were to the bit."""
        parts = self._transformed(input)
        simple, doubt = self.input_analyser(parts)
        flagged = doubt > 1
        cleaned = self._restored(torch.where(flagged.unsqueeze(-1), simple, parts), input.shape)
        mask = self._restored_mask(flagged, input)
        return torch.where(mask, cleaned, input), doubt.amax(0)

    def _restored_mask(self, flagged: Tensor, x: Tensor) -> Tensor:
        """(B, C, H, W) where flagged (places, B) pieces lie."""
        marks = flagged.to(x.dtype).unsqueeze(-1).expand(-1, -1, x.shape[1] * self.size**2)
        return assembled(marks, x.shape, self.size) > 0

    def rebuild(self, input: Tensor) -> Tensor:
        """Pictures of which every piece is rebuilt from atoms."""
        return self._restored(self.input_analyser(self._transformed(input))[0], input.shape)

    def inspect(self, input: Tensor) -> Seen:
        cleaned, doubt = self.clean(input)
        logits, far = self._answered(cleaned, replace=False)
        odd = far > 1
        if odd.any():
            logits = logits.clone()
            logits[odd] = self._answered(self.rebuild(input[odd]), replace=True)[0]
        score = torch.maximum(doubt, far)
        return Seen(logits, score, score > 1)

    def _answered(self, x: Tensor, replace: bool) -> tuple[Tensor, Tensor]:
        """Logits, and the doubt (B,) about the features, which become their sparse codes where it is above 1."""
        doubts: list[Tensor] = []

        def change(features: Tensor) -> Tensor:
            flat = features.flatten(1)
            simple, far = self.feature_analyser(flat.unsqueeze(0))
            doubts.append(far[0])
            return torch.where((far[0] > 1).unsqueeze(-1), simple[0], flat).view_as(features) if replace else features

        with evaluating(self.model), changing_input(self.model, self.head, change):
            return answered(self.model, x), doubts[0]


@dataclass(frozen=True)
class Cleann(Detector):
    """Clean pictures and features of what sparse codes of harmless data do not explain, and answer what is left."""

    patch: int = knob(4, low=2, high=64, help="side of a piece in pixels")
    atoms: int = knob(96, low=2, high=4096, help="atoms of each dictionary, at most half the calibration examples")
    sparsity: int = knob(4, low=1, high=64, help="atoms that may explain a piece")
    false_alarms: float = knob(0.05, low=1e-4, high=0.5, log=True, help="share of harmless inputs that may be flagged")
    bound: str = knob("percentile", choices=tuple(BOUNDS), help="how the limit for that share is found")

    facts: ClassVar[Facts] = Facts(stage="serve", data=UNLABELLED, effect="answers triggered inputs as harmless ones")
    paper: ClassVar[str] = "cleann"

    def wrap(self, model: nn.Module, workload: Workload) -> CleannModel:
        head = linear_head(model, self.name())
        return CleannModel(model, head, self, pictures_of(workload, self.name()))

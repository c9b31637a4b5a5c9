"""Two thin linear layers in the place of one, chosen to keep the weights or, better, the layer's outputs.

Paper: SVD-LLM, arXiv 2403.07378, and before it ASVD, arXiv 2312.05821, for keeping the outputs.
Formula: y = u (v x), with u v = U_r U_r^T w and U the left singular vectors of w L, L L^T = E[x x^T].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lilliput.edits import set_module
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.factorize._decompose import truncate, truncate_whitened
from lilliput.methods.factorize._factors import is_plain_linear, linear_factors, own_names
from lilliput.methods.factorize._ranks import snap_to_multiple, svd_rank
from lilliput.moments import input_moments
from lilliput.workload import Workload, need_workload


@dataclass(frozen=True)
class LowRank(Method):
    """Replace linear layers by `Sequential(Linear(K, r), Linear(r, N))`; rank 0.5 keeps half of the weights.

    `rank` is a share of the break-even rank N K / (N + K), at which the factors hold as many weights as the layer: any
    value below 1 makes the layer smaller, and it is the kept share of its weights and multiplications.
    """

    rank: float = knob(0.5, low=0.02, high=1.0, per_layer=True, help="kept share of the layer's weights")
    whiten: str = knob("activation", choices=("activation", "none"), help="keep the outputs on calibration data, or w")
    snap: int = knob(1, choices=(1, 4, 8, 16, 32), help="round ranks to this multiple: the vector width of the device")
    damping: float = knob(1e-4, low=0.0, high=1.0, help="share of the mean squared input added to every direction")

    facts: ClassVar[Facts] = Facts(
        stage="factorize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="smaller; faster where the layer is wide",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        for name in own_names(model):
            if name and is_plain_linear(model.get_submodule(name)):
                yield name

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, LowRank]) -> nn.Module:
        whitened = [name for name, settings in layers.items() if settings.whiten == "activation"]
        moments = {}
        if whitened:
            why = "to see each layer's inputs (or set whiten='none')"
            found = input_moments(model, need_workload(workload, self.name(), why), whitened)
            moments = {name: seen.gram[0] for name, seen in found.items() if seen.n}
        for name, settings in layers.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            set_module(model, name, settings.factor(layer, moments.pop(name, None)))
        return model

    def factor(self, layer: nn.Linear, second_moment=None) -> nn.Sequential:
        """One layer as two; without a second moment (an input never seen) the plain SVD."""
        w = layer.weight.detach()
        rank = snap_to_multiple(svd_rank(w.shape[0], w.shape[1], self.rank), self.snap, min(w.shape))
        if second_moment is None:
            return linear_factors(layer, *truncate(w, rank))
        return linear_factors(layer, *truncate_whitened(w, rank, second_moment, self.damping))

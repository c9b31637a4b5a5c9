"""Tree-structured Parzen estimators: sample where good trials are denser than bad ones (Optuna's TPESampler).

Papers: Bergstra et al., Algorithms for hyper-parameter optimization (NIPS 2011); Watanabe (arXiv 2304.11127).
The next point maximises l(x) / g(x), the densities of the good and of the other trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optuna.samplers import TPESampler

from lilliput.method import Facts, Settings, knob


@dataclass(frozen=True)
class Tpe(Settings):
    """Parzen estimators; they cost more per trial than the others, so they suit trials that are built for real."""

    startup: int = knob(20, low=1, high=1000, help="random trials before the first estimate")
    candidates: int = knob(24, low=1, high=1000, help="points of which the best ratio is taken")

    facts: ClassVar[Facts] = Facts(stage="serve", effect="search")

    def build(self, seed: int | None = None, objectives: int = 1) -> TPESampler:
        """The Optuna sampler; knobs are modelled jointly when there is one objective, apart when there are several."""
        return TPESampler(
            n_startup_trials=self.startup,
            n_ei_candidates=self.candidates,
            multivariate=objectives == 1,
            constant_liar=True,
            seed=seed,
        )

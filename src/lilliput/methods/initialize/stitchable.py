"""One net of many speeds: two trained models of a family, and linear layers that lead from the small to the large one.

    route (i, j): blocks 0 .. i - 1 of the small model, stitch_i, blocks j .. of the large one, its norm and head
    stitch_i = argmin_M |X_i M - Y_j|^2        X_i enters block i of the small, Y_j block j of the large model

    net = Stitchable(steps=500).join(small, large, workload)
    net.choose(net.routes[2])                                   # from the slowest to the fastest
    net.extract(net.routes[2])                                  # a model of its own, to generate with
    again = Stitchable(steps=0).join(small, large, workload)    # for again.load_state_dict(net.state_dict())

Paper: Stitchable Neural Networks (Pan, Cai and Zhuang, CVPR 2023, arXiv 2302.06586): from the fast to the slow anchor,
a route drawn for each step of training, stitches shared by neighbouring routes. The two anchors are routes as well. The
workload's model is the teacher (the paper has labels and a teacher of its own).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lilliput.anatomy import Anatomy
from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Settings, knob
from lilliput.methods.distill.logits import batches_of, check_student, distillation_loss, teacher_logits
from lilliput.methods.initialize._sewing import check_family, fitted_stitches, sewn
from lilliput.training import train
from lilliput.workload import Batch, Workload


class Route(NamedTuple):
    """How many blocks of the small model run, and with which block the large one goes on; the anchors themselves are
    (all of the small, none of the large) and (0, 0)."""

    first: int
    then: int | None


@dataclass(frozen=True)
class Stitchable(Settings):
    """Join a small and a large trained model into one net whose speed is chosen when it runs."""

    every: int = knob(1, low=1, high=256, help="stitches stand behind every so many blocks of the small model")
    reach: int = knob(0, low=0, high=64, help="a stitch also leads to so many blocks before and behind its own")
    temperature: float = knob(2.0, low=0.1, high=20.0, log=True, help="softens the answers that are learned from")
    lr: float = knob(5e-4, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    steps: int = knob(200, low=0, high=1_000_000, help="updates, each of one route; 0 leaves stitches as fitted")
    seconds: float = knob(0.0, low=0.0, help="stop after this long, whatever the steps; 0 sets no limit")
    seed: int = knob(0, low=0, help="order of the data and of the routes")

    paper: ClassVar[str] = "stitchable"
    facts: ClassVar[Facts] = Facts(
        stage="initialize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE},
        data=UNLABELLED,
        effect="many speeds of one net, as large as both models",
    )

    def join(self, small: nn.Module, large: nn.Module, workload: Workload) -> StitchedNet:
        """A net of copies of both models, stitched on the calibration data and trained on the workload's model.

        Raises UserError for models that are not of one family, and for a workload that asks another question.
        """
        found, _ = check_family(small, large, self.name())
        check_student(workload, large)
        depths = [len(model.get_submodule(found.block_list)) for model in (small, large)]  # pyright: ignore
        routes = self.between(*depths)
        pairs = list({route.first: (route.first, paired(route.first, *depths)) for route in routes}.values())
        stitches = fitted_stitches(small, large, found, pairs, workload)
        named = {str(i): stitch for (i, _), stitch in zip(pairs, stitches)}
        net = StitchedNet(copy.deepcopy(small), copy.deepcopy(large), found, nn.ModuleDict(named), routes).eval()
        if self.steps:
            self._train_(net, workload)
        return net

    def between(self, small: int, large: int) -> list[Route]:
        """The routes from models of so many blocks that run both. Raises UserError where there are none."""
        starts = range(self.every, small, self.every)
        routes = [Route(i, j) for i in starts for j in range(paired(i, small, large) - self.reach,
                  paired(i, small, large) + self.reach + 1) if 1 <= j < large]  # fmt: skip
        if not routes:
            raise UserError(f"every is {self.every}, but the models have {small} and {large} blocks; give a smaller "
                            "number and models of two blocks at least")  # fmt: skip
        return routes

    def _train_(self, net: StitchedNet, work: Workload) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            net.choose(net.routes[int(torch.randint(len(net.routes), (1,), generator=generator))])
            return distillation_loss(work.forward(net, batch), teacher_logits(work, batch), self.temperature)

        with evaluating(work.model):
            train(net, batches_of(work), loss, steps=self.steps, seconds=self.seconds or None, lr=self.lr,
                  clip_norm=1.0, seed=self.seed)  # fmt: skip
        net.choose(net.routes[0])


def paired(i: int, small: int, large: int) -> int:
    """The block of the large model that stands where block i of the small one does."""
    return min(large - 1, max(1, round(i * large / small)))


class StitchedNet(nn.Module):
    """Both anchors and the stitches; it runs the route that was chosen last, at first the slowest.

    Blocks have the numbers of that route: `small` and `large` use a cache by themselves only while it is their own.
    """

    def __init__(
        self, small: nn.Module, large: nn.Module, found: Anatomy, stitches: nn.ModuleDict, between: Sequence[Route]
    ):
        super().__init__()
        self.small, self.large, self.stitches, self.found = small, large, stitches, found
        anchors = [Route(0, 0), Route(len(small.get_submodule(found.block_list)), None)]  # pyright: ignore
        self.routes = sorted([*anchors, *between], key=self.weights, reverse=True)
        self.route = self.routes[0]

    def choose(self, route: Route) -> None:
        """Run this route from now on, its blocks numbered for caches. Raises UserError for one that does not exist."""
        if route not in self.routes:
            raise UserError(f"there is no route {tuple(route)}; there are {[tuple(r) for r in self.routes]}")
        self.route = Route(*route)
        for i, block in enumerate(self.chosen().get_submodule(self.found.block_list).children()):
            for module in block.modules():
                if type(getattr(module, "layer_idx", None)) is int:
                    module.layer_idx = i  # pyright: ignore

    def weights(self, route: Route) -> int:
        """Weights of the blocks and the stitch that a route runs: what its speed follows from."""
        anchors = (self.small, self.large)
        ours, theirs = (list(model.get_submodule(self.found.block_list).children()) for model in anchors)
        runs = [*ours[: route.first], *(theirs[route.then :] if route.then is not None else ())]
        runs += [self.stitches[str(route.first)]] if str(route.first) in self.stitches else []
        return sum(p.numel() for module in runs for p in module.parameters())

    def chosen(self) -> nn.Module:
        """The net of the chosen route; it shares its modules with this one."""
        first, then = self.route
        if then is None:
            return self.small
        if first == 0:
            return self.large
        return sewn(self.small, self.large, self.found, (first, then), self.stitches[str(first)])

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.chosen()(*inputs, **named)

    def extract(self, route: Route) -> nn.Module:
        """A copy of the net of one route that stands alone; the route that runs here stays."""
        running = self.route
        self.choose(route)
        model = copy.deepcopy(self.chosen()).eval()
        self.choose(running)
        return model

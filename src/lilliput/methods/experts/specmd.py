"""Experts on disk: a cache of limited bytes, experts of later layers fetched ahead, and a choice of who leaves.

Paper: Hoang, Jaiswal, Samragh and Cho, SpecMD: A Comprehensive Study on Speculative Expert Prefetching, 2026 (arXiv
2602.03921). While a layer runs, the routers of the layers behind it are asked about what it reads, and the experts that
they name are fetched; the expert whose layer comes round last leaves (Least-Stale). Reconstructed, as its code is not
public: the order in which experts are stale, how many are fetched, and that guesses are made from what a router reads.

    trace = ExpertTrace.record(model, ids, prompt=32)
    SpecMD(policy="lru").replay(trace, capacity_bytes)       # counts, and times modelled for a Hardware
    write_experts(model, path)
    with SpecMD().attached_(model, path, capacity_bytes) as pager:   # the experts leave memory
        model.generate(ids)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.method import BLOCK_COUNT, OUTPUT_SHAPE, Facts, Settings, knob
from lilliput.methods.experts._mixture import Expert, FusedExpert, add_expert_
from lilliput.methods.experts._pager import Guess, Pager
from lilliput.methods.experts._policies import BELADY, POLICIES
from lilliput.methods.experts._replay import Hardware, Report, replay
from lilliput.methods.experts._routing import equal_routers_of, mixtures_of
from lilliput.methods.experts._trace import (
    HISTORY,
    NOTHING,
    ORACLE,
    ROUTERS,
    ExpertTrace,
    foresight,
    likeliest,
)
from lilliput.paged_store import PagedStore, write_store

__all__ = ["ExpertTrace", "Hardware", "PagedExperts", "Report", "SpecMD", "write_experts"]

NAME = "experts.specmd"
FUSED = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}  # what transformers says


@dataclass(frozen=True)
class SpecMD(Settings):
    """Run a mixture of experts with its experts on disk, of which a cache of limited bytes holds some."""

    policy: str = knob("least_stale", choices=(*POLICIES, BELADY), help="who leaves; belady in replays alone")
    predictor: str = knob(
        ROUTERS,
        choices=(ROUTERS, HISTORY, ORACLE, NOTHING),
        help="what names experts to fetch ahead: later routers, the pass before, the future (in replays), nothing",
    )
    ahead: int = knob(1, low=0, high=64, help="layers that are fetched for, behind the one that runs")
    width: int = knob(0, low=0, high=4096, help="experts that are fetched for a layer and token; 0: as many as it uses")
    paper: ClassVar[str] = "specmd"
    facts: ClassVar[Facts] = Facts(
        stage="serve", keeps={OUTPUT_SHAPE, BLOCK_COUNT}, effect="experts outside memory, same answers"
    )

    def replay(
        self, trace: ExpertTrace, capacity_bytes: int, expert_bytes: int, hardware: Hardware | None = None
    ) -> Report:
        """What a cache of so many bytes would have done with a trace; times are modelled for `hardware`."""
        return replay(trace, slots_in(capacity_bytes, expert_bytes), self.policy, self.predictor, self.ahead,
                      self.width or trace.top_k, expert_bytes, hardware)  # fmt: skip

    @contextmanager
    def attached_(self, model: nn.Module, path: str | Path, capacity_bytes: int) -> Iterator[Pager]:
        """The model with its experts on disk; those in memory are dropped, for good.

        `path` is what `write_experts` wrote. The pager counts; after the block the model cannot run any more.
        """
        parts, routers = mixtures_of(model, NAME), equal_routers_of(model, NAME)
        if self.policy == BELADY or self.predictor == ORACLE:
            raise UserError(f"{BELADY} and {ORACLE} know what comes; they are for replays of a trace")
        policy = POLICIES[self.policy](len(parts), routers[0].num_experts)
        with PagedStore(path, capacity_bytes, policy) as store:
            _check_store(store, model)
            pager = Pager(store, policy, threads=True)
            for layer, part in enumerate(parts):
                paged = PagedExperts(pager, layer, shell_of(model.get_submodule(part.experts)), routers, self)
                set_module(model, part.experts, paged)
            try:
                yield pager
            finally:
                pager.close()


class PagedExperts(nn.Module):
    """The experts of one layer, read when they are chosen: x (N, d), chosen (N, k), weights (N, k) -> (N, d)."""

    def __init__(self, pager: Pager, layer: int, shell: nn.Module, routers: Sequence[Any], settings: SpecMD):
        super().__init__()
        self.layer, self.settings = layer, settings
        self.outside = (pager, shell, tuple(routers))  # in a tuple: they are no parts of this module

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        pager, shell, _ = self.outside
        store: Any = pager.store
        total = torch.zeros_like(hidden_states)

        def use(experts: Sequence[int], places: Tensor) -> None:
            for number, place in zip(experts, places.tolist()):
                expert = partial(functional_call, shell, {name: t[place] for name, t in store.tensors.items()})
                add_expert_(total, hidden_states, top_k_index, top_k_weights, number, expert)

        needed, tokens = top_k_index.unique().tolist(), len(hidden_states)
        pager.visit(self.layer, needed, self._guesses(hidden_states), tokens, use)
        return total

    def _guesses(self, x: Tensor) -> list[Guess]:
        """Experts of the next layers, the nearest layer first."""
        pager, _, routers = self.outside
        later = routers[self.layer + 1 : self.layer + 1 + self.settings.ahead]
        if not later or self.settings.predictor == NOTHING:
            return []
        layers = range(self.layer + 1, self.layer + 1 + len(later))
        if self.settings.predictor == HISTORY:
            return [(layer, expert) for layer in layers for expert in pager.before.get(layer, ())]
        count = (self.settings.width or routers[0].top_k) * len(x)
        return [(layer, e) for layer, scores in zip(layers, foresight(later, x)) for e in likeliest(scores)[:count]]


# --- the experts of a model --------------------------------------------------------------------------------------


def write_experts(model: nn.Module, path: str | Path) -> Path:
    """Write every expert of a model as a record of a paged store, layer by layer. Raises UserError for packed ones."""
    parts = mixtures_of(model, NAME)
    return write_store(path, (record for part in parts for record in records_of(model, part.experts)))


def records_of(model: nn.Module, experts: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of each expert of one layer."""
    module: Any = model.get_submodule(experts)
    shell = shell_of(module)
    for number in range(_count(module)):
        if isinstance(shell, FusedExpert):
            yield {name: getattr(module, name)[number].detach() for name in ("gate_up_proj", "down_proj")}
        else:
            yield {name: tensor.detach() for name, tensor in module[number].named_parameters()}


def shell_of(experts: Any) -> nn.Module:
    """An expert without weights. Raises UserError for experts of another kind than ours or transformers' usual one."""
    if isinstance(experts, nn.ModuleList) and isinstance(experts[0], Expert):
        if any(True for _ in experts.buffers()):
            raise UserError("the experts are packed; page float experts, or quantize the other layers alone")
        return copy.deepcopy(experts[0]).to("meta")
    if not all(getattr(experts, name, None) is value for name, value in FUSED.items()):
        raise UserError(f"{NAME} does not know how the experts of a {type(experts).__name__} are stored")
    _, width, neurons = experts.down_proj.shape  # pyright: ignore
    with torch.device("meta"):
        return FusedExpert(width, neurons, experts.act_fn)


def expert_bytes(model: nn.Module) -> int:
    """Bytes of one expert."""
    first = next(records_of(model, mixtures_of(model, NAME)[0].experts))
    return sum(tensor.nbytes for tensor in first.values())


def slots_in(capacity_bytes: int, size_bytes: int) -> int:
    """Experts that fit. Raises UserError when none does."""
    if capacity_bytes < size_bytes:
        raise UserError(f"capacity_bytes is {capacity_bytes}, one expert takes {size_bytes}; give at least that")
    return capacity_bytes // size_bytes


def _count(experts: Any) -> int:
    return len(experts) if isinstance(experts, nn.ModuleList) else experts.num_experts


def _check_store(store: PagedStore, model: nn.Module) -> None:
    """Raises UserError when the store is of another model."""
    expected = [next(records_of(model, part.experts)) for part in mixtures_of(model, NAME)]
    shapes = {f.name: (f.dtype, tuple(f.shape)) for f in store.layout.fields}
    wanted = [{name: (t.dtype, tuple(t.shape)) for name, t in record.items()} for record in expected]
    count = sum(_count(model.get_submodule(part.experts)) for part in mixtures_of(model, NAME))
    if len(store) != count or any(one != shapes for one in wanted):
        raise UserError(
            f"{store.path} holds {len(store)} records that are not the {count} experts of this model; write them with "
            "write_experts"
        )

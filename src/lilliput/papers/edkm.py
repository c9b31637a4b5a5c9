"""eDKM: how much memory do its three reductions save, and is differentiable k-means worth its training?"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.methods.quantize._dkm import DKMLinear, soft_weights
from lilliput.methods.quantize._grid import choose_grid, dequantize, round_to_grid
from lilliput.methods.quantize._kernel_linear import replace_
from lilliput.methods.quantize._saving import Keeper
from lilliput.methods.quantize.codebook import Codebook
from lilliput.methods.quantize.dkm import Dkm, clustered_, train_
from lilliput.methods.quantize.group import Group, fitting_group
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import clearly, said
from lilliput.papers._paired import advantage, bits_per_weight, drawn_test
from lilliput.papers._pictures import Table
from lilliput.workload import Workload

paper = Paper(
    title="eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models",
    authors="Minsik Cho, Keivan A. Vahid, Qichen Fu, Saurabh Adya, Carlo C Del Mundo, Mohammad Rastegari, "
    "Devang Naik, Peter Zatloukal",
    year=2023,
    arxiv="2309.00964",
    claim="Marshalling, uniquification and sharding cut what differentiable k-means keeps for the backward pass by two "
    "orders of magnitude, which makes 3-bit fine-tuned clustering of language models feasible, better than rounding.",
    methods=("quantize.dkm",),
)

OURS, QAT, KMEANS = "DKM", "rounding trained straight through", "k-means"
TUNED_KMEANS = "float fine-tuning, then k-means"
MODES = {"copy": "DKM", "marshal": "+ marshalling", "unique": "+ uniquification"}
SHARDED, TABLE = "+ sharding over 2 processes", "computed on distinct values (ours)"
GROUP, LR = 64, {4: 1e-4, 3: 1e-4, 2: 3e-4}  # the same for all; rates by bits were chosen on validation data
BLOCKS = ["model.layers.*"]  # what is packed: the embedding, which is the head, stays as it is
LEAST_SAVING = 10.0  # of memory, by which marshalling and uniquification must win
WIDE = (1536, 576)  # of an FFN layer of SmolLM2-135M


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Saved bytes of one step, then perplexity after equal fine-tuning, on llama-tiny.

    Holds when at 3 bits (1) marshalling and uniquification together cut the peak of the bytes that clustering saves by
    LEAST_SAVING and more, and (2) DKM's loss per token is below those of k-means after training and of rounding trained
    straight through by more than twice the standard error over windows.
    """
    bits, steps = ((4, 3, 2), 150) if full else ((3, 2), 32)
    work, table = drawn_test(Workload.from_name("llama-tiny"), 64, seed), Table()
    for b in bits if full else (3,):
        saved_by_model(table, work, b)
        saved_by_layer(table, b, seed)
    losses = compare(table, work, bits, steps, seed)
    return evidence(table, losses, bits, steps, seed)


# --- memory ----------------------------------------------------------------------------------------------------


def saved_by_model(table: Table, work: Workload, bits: int) -> None:
    """Peak bytes that the clusterings of all layers save in one step with a small batch."""
    batch = {"input_ids": work.calibration[0]["input_ids"][:1, :64]}
    for mode, name in MODES.items():
        model, keeper = _clustered(work.model, bits), Keeper(mode)
        for layer in model.modules():
            if isinstance(layer, DKMLinear):
                layer.keeper = keeper
        work.loss(model, batch).backward()
        table.add(name, f"saved_mb_{bits}_bits", keeper.peak_bytes / 1e6)
    table.add(TABLE, f"saved_mb_{bits}_bits", _saved_natively(_clustered(work.model, bits)) / 1e6)


def _clustered(model: nn.Module, bits: int) -> nn.Module:
    method = Dkm(bits=bits, group=GROUP)
    return clustered_(copy.deepcopy(model), method.resolve(model, BLOCKS)).train()


def _saved_natively(model: nn.Module) -> int:
    """Bytes that autograd keeps of all soft weights when nothing of ours changes how."""
    keeper, held = Keeper("marshal"), []
    for layer in model.modules():
        if isinstance(layer, DKMLinear):
            with keeper.saving():
                held.append(layer.soft_weight())
    return keeper.peak_bytes


def saved_by_layer(table: Table, bits: int, seed: int) -> None:
    """The same for one wide layer of Gaussian weights, also on two processes."""
    for mode, name in MODES.items():
        table.add(name, f"wide_layer_saved_mb_{bits}_bits", saved_by_weights(mode, bits, seed) / 1e6)
    table.add(SHARDED, f"wide_layer_saved_mb_{bits}_bits", max(saved_by_two_processes(bits, seed)) / 1e6)


def saved_by_two_processes(bits: int, seed: int) -> list[int]:
    """Peak bytes of two processes that share the indices between them."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        call = f"print(edkm.saved_by_process({{}}, {store!r}, {bits}, {seed}))"
        commands = [[sys.executable, "-c", f"from lilliput.papers import edkm; {call.format(rank)}"] for rank in (0, 1)]
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        return [int(child.communicate(timeout=120)[0]) for child in children]


def saved_by_weights(mode: str, bits: int, seed: int) -> int:
    """Peak bytes that one clustering of WIDE weights saves, forward and backward."""
    w = torch.randn(WIDE, generator=torch.Generator().manual_seed(seed)).unflatten(1, (-1, GROUP))
    u = (w / w.abs().amax(-1, keepdim=True)).bfloat16().float().flatten().requires_grad_()
    keeper = Keeper(mode)
    with keeper.saving(), keeper.clustering(u):
        mixed, _ = soft_weights(u, torch.linspace(-0.9, 0.9, 2**bits), tau=0.03 * (1.8 / 2**bits) ** 2, rounds=3)
    mixed.sum().backward()
    return keeper.peak_bytes


def saved_by_process(rank: int, store: str, bits: int, seed: int) -> int:
    """Peak bytes of one of two processes that meet in the file `store`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return saved_by_weights("shard", bits, seed)
    finally:
        dist.destroy_process_group()


# --- quality ---------------------------------------------------------------------------------------------------


class RoundedLinear(nn.Module):
    """A linear layer in training that rounds its weights to their groups' grids; gradients pass straight through."""

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__()
        self.linear, self.bits, self.group = linear, bits, fitting_group(GROUP, linear.in_features)

    def forward(self, x: Tensor) -> Tensor:
        w = self.linear.weight
        grid = choose_grid(w.detach(), self.bits, self.group)
        rounded = dequantize(round_to_grid(w.detach(), *grid, self.bits), *grid, self.bits)
        return F.linear(x, w + (rounded - w).detach(), self.linear.bias)


def rounding_trained(work: Workload, bits: int, steps: int, seed: int) -> nn.Module:
    """Training with rounded weights, then their packed form."""
    method = Group(bits=bits, group=GROUP, search=0)
    layers = dict.fromkeys(Dkm().resolve(work.model, BLOCKS), method)
    model = replace_(copy.deepcopy(work.model), layers, lambda name, linear, s: RoundedLinear(linear, s.bits))
    train_(model, work, steps, LR[bits], seed)
    return method.apply(replace_(model, layers, lambda name, layer, s: layer.linear), layers=list(layers))


def compare(table: Table, work: Workload, bits: tuple[int, ...], steps: int, seed: int) -> dict[str, Tensor]:
    """Losses per window of every contender after equal fine-tuning, packed as it is served."""
    tuned = copy.copy(work)
    tuned.model = train_(copy.deepcopy(work.model), work, steps, LR[3], seed)
    losses = {"float": work.values(work.model, "test"), "float fine-tuning": work.values(tuned.model, "test")}
    for name, values in losses.items():
        table.add(name, "perplexity", math.exp(float(values.mean())))
    for b in bits:
        kmeans = Codebook(bits=b, group=GROUP, weighting=False)
        trained = Dkm(bits=b, group=GROUP, steps=steps, lr=LR[b], seed=seed)
        makers: dict[str, Callable[[], nn.Module]] = {
            OURS: lambda m=trained: m.apply(work.model, work, BLOCKS),
            QAT: lambda b=b: rounding_trained(work, b, steps, seed),
            TUNED_KMEANS: lambda m=kmeans: m.apply(tuned.model, layers=BLOCKS),
            KMEANS: lambda m=kmeans: m.apply(work.model, layers=BLOCKS),
        }
        for name, make in makers.items():
            model = make()
            losses[f"{name} {b}"] = values = work.values(model, "test")
            table.add(name, f"perplexity_{b}_bits", math.exp(float(values.mean())))
            table.add(name, f"bits_per_weight_{b}_bits", bits_per_weight(model))
    return losses


def evidence(table: Table, losses: dict[str, Tensor], bits: tuple[int, ...], steps: int, seed: int) -> Evidence:
    rows = {row.name: row for row in table.rows()}
    plain, small = (rows[MODES[m]].values["saved_mb_3_bits"] for m in ("copy", "unique"))
    rivals = {name: advantage(losses[f"{OURS} 3"], losses[f"{name} 3"]) for name in (QAT, TUNED_KMEANS, KMEANS)}
    better = all(map(clearly, rivals.values()))
    name, gain = min(rivals.items(), key=lambda item: item[1][0])
    return Evidence(
        setup=f"llama-tiny, {', '.join(map(str, bits))} bits in its blocks, groups of {GROUP}, {steps} steps of "
        f"4 x 256 tokens at rates {LR}, seed {seed}; memory also of one layer of {WIDE[0]} x {WIDE[1]}; CPU",
        rows=list(rows.values()),
        holds=plain / small >= LEAST_SAVING and better,
        figure=f"saved at 3 bits: {plain:.0f} -> {small:.1f} MB ({plain / small:.0f} times less); loss "
        f"{said(gain)} nats per token against the best rival ({name})",
        limits="A small model and few steps. On one memory autograd shares equal tensors by itself, so that "
        "marshalling gains only against copies to another memory; those are counted, not made. Small layers have about "
        "as many values as weights. Scales per group and the temperature rule are ours; the trained rival has a zero "
        "per group and so 0.25 bits more.",
    )

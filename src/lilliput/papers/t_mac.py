"""Low-bit products by table lookup: faster than the strongest rival at the same bits, and in proportion to the bits?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.device import Device
from lilliput.hooks import watching
from lilliput.kernels import _native, isa
from lilliput.kernels import group_linear as integer
from lilliput.kernels import lookup_linear as lookup
from lilliput.methods.quantize._grid import choose_grid, dequantize, round_to_grid
from lilliput.methods.quantize._packed import pack_codes, unpack_codes
from lilliput.metrics.latency import Comparison, paired_ratio, wait_until_quiet
from lilliput.paper import Evidence, Paper, Row
from lilliput.workload import Workload

paper = Paper(
    title="T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge",
    authors="Jianyu Wei, Shijie Cao, Ting Cao, Lingxiao Ma, Lei Wang, Yanyong Zhang, Mao Yang",
    year=2024,
    arxiv="2407.00088",
    claim="Products of low-bit weights and activations by looking up sums of activations in tables, a bit plane at a "
    "time, are faster than unpacking the weights and multiplying, and their time falls linearly with the bits.",
    methods=("quantize.group",),
)

LOOKUP, INTEGER = "lookup", "integer product"
DEQUANTIZE, TORCH4, FLOAT = "dequantise, then multiply", "torch int4", "float32"
BITS, RIVAL_BITS, GROUP = (4, 3, 2, 1), (4, 3, 2), 64
LAYERS = {"q_proj": "576x576", "gate_proj": "1536x576", "down_proj": "576x1536"}
BIG = "beyond the last-level cache"
LEAST_SQUARED_CORRELATION, LEAST_LINEAR_SHARE = 0.9, 0.5
Run = Callable[[], Any]


@dataclass
class Matrix:
    """Real weights (N, K), `copies` of them one under the other, and a real input (1, K) of that layer."""

    name: str
    w: Tensor
    x: Tensor
    copies: int = 1


@dataclass
class Times:
    """Milliseconds of a product in each round, by contender and bits (0: float32), and relative errors in percent."""

    ms: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    error: dict[tuple[str, int], float] = field(default_factory=dict)

    def faster(self, rival: str, bits: int, ours: str = LOOKUP) -> Comparison:
        """How many times faster `ours` is than a rival at the same bits."""
        return paired_ratio(self.ms[rival, bits], self.ms[ours, bits])


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """One token through layers of SmolLM2-135M and through a matrix beyond the caches, on one thread.

    Holds when (1) at 4, 3 and 2 bits on every matrix the 95 % interval of the ratio between the strongest rival of the
    same bits (integer product, dequantising, torch's int4) and the lookup lies above 1, and (2) on every matrix the
    lookup's time over 1 to 4 bits has a squared correlation above 0.9 with a rising line, whose part that falls with
    the bits is more than half of the time at 4 bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        busy = wait_until_quiet()
        rounds = 41 if full else 15
        found = {m.name: measure(m, rounds, seed) for m in matrices(seed, full)}
    finally:
        torch.set_num_threads(before)
    rows, verdicts = table(found), judge(found)
    worst = min(ratio.low for ratio in verdicts.ratios.values())
    listed = "; ".join(f"{b} bits {verdicts.mean_ratio(b):.2f}x" for b in RIVAL_BITS)
    return Evidence(
        setup=f"group {GROUP}, 1 token, 1 thread, {isa()}, {rounds} interleaved rounds, seed {seed}; weights and "
        f"inputs of block 0 of SmolLM2-135M, repeated for the large matrix; kernels alone without torch's dispatch, "
        f"torch's own by its operators; other work kept {busy:.1f} cores busy",
        rows=rows,
        holds=verdicts.holds,
        figure=f"over the strongest rival of the same bits, in the mean over matrices: {listed}; lowest bound "
        f"{worst:.2f}x; the part that falls with the bits is {min(verdicts.shares.values()):.0%} or more",
        limits="One machine and one thread; at 1 bit there is no rival but dequantising, the integer product would "
        "take 2 bits. The time of a whole model is not measured. Dequantising is done by torch operators, and only on "
        "the matrices that fit the cache: a fused kernel that unpacks in registers is what the integer product is.",
    )


# --- matrices --------------------------------------------------------------------------------------------------


def matrices(seed: int, full: bool) -> list[Matrix]:
    """The layer shapes of a block, and its largest repeated until 2-bit codes are beyond the last-level cache."""
    work = Workload.from_name("smollm2-135m")
    block = work.model.get_submodule("model.layers.0")
    modules = {name: m for name, m in block.named_modules() if name.rpartition(".")[2] in LAYERS}
    inputs: dict[str, Tensor] = {}
    names = {f"model.layers.0.{name}": name for name in modules}
    batch = {k: v[:1] for k, v in work.calibration[0].items()}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        inputs[names[name]] = x

    with torch.inference_mode(), watching(work.model, names, see):
        work.forward(work.model, batch)
    found = []
    for name, module in modules.items():
        rows = inputs[name].flatten(0, -2).float()
        place = int(torch.randint(1, len(rows), (1,), generator=torch.Generator().manual_seed(seed)))
        weight = module.get_parameter("weight").detach().float()
        found.append(Matrix(LAYERS[name.rpartition(".")[2]], weight, rows[place : place + 1].clone()))
    largest = max(found, key=lambda m: m.w.numel())
    times = 2.0 if full else 1.25
    copies = int(times * max(Device.here().caches_bytes.values()) * 8 / (2 * largest.w.numel())) + 1
    return [*found, Matrix(BIG, largest.w, largest.x, copies)]


def contenders(matrix: Matrix) -> tuple[dict[tuple[str, int], Run], dict[tuple[str, int], Tensor]]:
    """(contender, bits) -> the product, and its float64 value with the weights that it has."""
    runs: dict[tuple[str, int], Run] = {}
    exact: dict[tuple[str, int], Tensor] = {}
    x, copies = matrix.x, matrix.copies
    for bits in BITS:
        scale, zero = choose_grid(matrix.w, bits, GROUP)
        q = round_to_grid(matrix.w, scale, zero, bits)
        value = x.double() @ dequantize(q, scale, zero, bits).double().T
        tiled = pack_codes(q, bits).repeat(copies, 1), scale.repeat(copies, 1), zero.repeat(copies, 1)
        runs[LOOKUP, bits] = native(lookup, _native.lookup_linear, tiled, x, bits)
        if bits in RIVAL_BITS:
            runs[INTEGER, bits] = native(integer, _native.group_linear, tiled, x, bits)
        if copies == 1:
            runs[DEQUANTIZE, bits] = lambda t=tiled, b=bits: dequantize_and_multiply(x, *t, b)
        if bits == 4:
            runs[TORCH4, bits] = torch_int4(q.repeat(copies, 1), tiled[1], tiled[2], x)
        exact |= {key: value for key in runs if key[1] == bits}
    w = matrix.w.repeat(copies, 1)
    runs[FLOAT, 0], exact[FLOAT, 0] = lambda: F.linear(x, w), x.double() @ matrix.w.double().T
    return runs, exact


def native(kernel: Any, run: Callable, tiled: Sequence[Tensor], x: Tensor, bits: int) -> Run:
    """The C++ product on its own layout; returns y."""
    rows, columns = tiled[1].shape[0], x.shape[1]
    codes, grid = kernel.pack(*tiled, columns, bits)
    y = torch.empty(1, rows)

    def product() -> Tensor:
        addresses = x.data_ptr(), codes.data_ptr(), grid.data_ptr(), y.data_ptr()
        run(*addresses, 1, rows, columns, GROUP, bits, torch.get_num_threads())
        return y

    return product


def dequantize_and_multiply(x: Tensor, stored: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Unpack all codes to float32 weights, then the float product."""
    return F.linear(x, dequantize(unpack_codes(stored, bits, x.shape[1]), scale, zero, bits))


def torch_int4(q: Tensor, scale: Tensor, zero: Tensor, x: Tensor) -> Run:
    """torch's packed 4-bit product in bfloat16."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int().contiguous(), 1)
    grid, half = torch.stack([scale.T, zero.T], -1).bfloat16().contiguous(), x.bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, packed, GROUP, grid)


# --- measuring -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(matrix: Matrix, rounds: int, seed: int) -> Times:
    """Every contender in turn, `rounds` times, in an order drawn anew for each round."""
    runs, exact = contenders(matrix)
    found = Times({key: [] for key in runs})
    calls: dict[tuple[str, int], int] = {}
    for key, run in runs.items():
        first = run()[:, : exact[key].shape[1]].double()
        found.error[key] = 100 * float((first - exact[key]).norm() / exact[key].norm())
        calls[key] = max(1, int(1.0 / max(1e-4, _ms(run, 1))))
    keys, generator = list(runs), np.random.default_rng(seed)
    for _ in range(rounds):
        for i in generator.permutation(len(keys)):
            runs[keys[i]]()
            found.ms[keys[i]].append(_ms(runs[keys[i]], calls[keys[i]]))
    return found


def _ms(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) * 1e3 / calls


def table(found: dict[str, Times]) -> list[Row]:
    """A row for each contender and number of bits: microseconds with half the interquartile range, and errors."""
    rows: dict[tuple[str, int], Row] = {}
    for name, times in found.items():
        for key, ms in times.ms.items():
            label = f"{key[0]}, {key[1]} bits" if key[1] else key[0]
            row = rows.setdefault(key, Row(label, {}, {}))
            low, middle, high = np.percentile(ms, [25, 50, 75]) * 1e3
            row.values[f"{name}_us"], row.spread[f"{name}_us"] = float(middle), float(high - low) / 2
            row.values[f"{name}_error_percent"] = times.error[key]
    return list(rows.values())


@dataclass(frozen=True)
class Verdicts:
    """Ratios of the strongest rival to the lookup by matrix and bits; how linear the lookup's time is by matrix."""

    ratios: dict[tuple[str, int], Comparison]
    correlations: dict[str, float]
    shares: dict[str, float]

    @property
    def holds(self) -> bool:
        linear = all(c > LEAST_SQUARED_CORRELATION for c in self.correlations.values())
        falls = all(s > LEAST_LINEAR_SHARE for s in self.shares.values())
        return linear and falls and all(ratio.gain for ratio in self.ratios.values())

    def mean_ratio(self, bits: int) -> float:
        """Geometric mean over matrices."""
        return float(np.exp(np.mean([np.log(r.ratio) for (_, b), r in self.ratios.items() if b == bits])))


def judge(found: dict[str, Times]) -> Verdicts:
    """The rule of `experiment` on measured times."""
    ratios, correlations, shares = {}, {}, {}
    for name, times in found.items():
        for bits in RIVAL_BITS:
            rivals = [c for c, b in times.ms if b == bits and c != LOOKUP]
            strongest = min(rivals, key=lambda c: np.median(times.ms[c, bits]))
            ratios[name, bits] = times.faster(strongest, bits)
        middle = [float(np.median(times.ms[LOOKUP, b])) for b in BITS]
        slope = np.polyfit(BITS, middle, 1)[0]
        correlations[name] = float(np.corrcoef(BITS, middle)[0, 1] ** 2) if slope > 0 else 0.0
        shares[name] = float(slope * BITS[0] / middle[0])
    return Verdicts(ratios, correlations, shares)

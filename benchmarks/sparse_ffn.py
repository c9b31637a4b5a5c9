"""Feed-forward parts that read only the neurons that fired, against dense ones, for each share of active neurons.

    python benchmarks/sparse_ffn.py        # writes results/sparse_ffn.csv, about two minutes

One token through a gated feed-forward part (gate, up, down), in the caches and beyond them. The sparse part computes
the gate whole and gathers the rows of up and down of the active neurons, which are drawn at random, so that neighbours
are rarely both read. Dense are our own kernels on three matrices in each format, and torch in float32. All are timed in
turn (ABAB) by their native calls, without operators or modules around them; a time is the median over rounds with the
interquartile range. `break_even_<format>` is the share of active neurons from which on the dense part of that format
is faster.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import numpy as np
import torch
import torch.nn.functional as F
from kernels import Run, in_turn
from tables import write_rows
from torch import Tensor

from lilliput import kernels
from lilliput._probe import torch_threads
from lilliput.device import Device
from lilliput.kernels import _native, group_linear
from lilliput.kernels import sparse_ffn as kernel
from lilliput.metrics.latency import wait_until_quiet

SHAPES = ((576, 1536), (4096, 11008))  # inputs and neurons: of SmolLM2-135M, of a 7-billion-parameter Llama
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
FORMATS = ("float32", "bfloat16", "int8", "int4")
PAIRS = (  # of rows and gate
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("int8", "int8"),
    ("int8", "int4"),
    ("int4", "int4"),
)
GROUP = 64


class Weights:
    """One matrix (n, d) in one format: as rows, and as the dense kernel of that format wants it."""

    def __init__(self, neurons: int, inputs: int, format: str):
        self.neurons, self.inputs, self.format = neurons, inputs, format
        if format in ("float32", "bfloat16"):
            values = torch.full((neurons, inputs), 0.01, dtype=getattr(torch, format))
            self.rows = kernel.Rows(values, None, inputs)
            return
        bits = 8 if format == "int8" else 4
        codes = torch.randint(-8, 8, (neurons, inputs))
        shape = (neurons, 1, 1) if bits == 8 else (neurons, inputs // GROUP, 2)
        self.rows = kernel.Rows(kernel.pack_rows(codes, bits), torch.full(shape, 0.01, dtype=torch.bfloat16), inputs)
        self.layout = (bits, inputs if bits == 8 else GROUP)
        sizes = group_linear.layout_sizes(neurons, inputs, self.layout[1], bits)
        self.codes = torch.randint(0, 256, (sizes[0],), dtype=torch.uint8)
        self.grid = torch.full((sizes[1],), 0.01, dtype=torch.bfloat16).view(torch.int16)

    def dense(self, x: Tensor, y: Tensor) -> Run:
        """y = W x of all neurons by our kernel of the format."""
        threads, (tokens, inputs) = torch.get_num_threads(), x.shape
        if self.format in ("float32", "bfloat16"):
            sizes = self.neurons, inputs, self.format == "bfloat16"
            values = self.rows.values.data_ptr()
            return lambda: _native.dense_linear(values, *sizes, x.data_ptr(), tokens, y.data_ptr(), threads)
        bits, group = self.layout
        weights, shape = (self.codes.data_ptr(), self.grid.data_ptr()), (self.neurons, inputs, group, bits, threads)
        return lambda: _native.group_linear(x.data_ptr(), *weights, y.data_ptr(), tokens, *shape)


def dense_part(gate: Weights, up: Weights, down: Weights) -> Run:
    """Three dense products; the product of the activations, which takes no time beside them, is left out."""
    x, h, y = torch.randn(1, gate.inputs), torch.zeros(1, gate.neurons), torch.zeros(1, down.neurons)
    runs = gate.dense(x, h), up.dense(x, h), down.dense(h, y)
    return lambda: [run() for run in runs]


def sparse_part(gate: Weights, up: Weights, down: Weights, share: float) -> Run:
    """The gate whole, then rows of a share of the neurons; the gate's result is replaced by one with that share."""
    inputs, neurons = gate.inputs, gate.neurons
    x, y, spare = torch.randn(1, inputs), torch.zeros(1, inputs), torch.zeros(1, neurons)
    active = torch.zeros(1, neurons)
    active[0, torch.randperm(neurons)[: round(share * neurons)]] = 1.0
    whole, sizes = gate.dense(x, spare), (inputs, neurons, inputs)
    part = kernel.native_part(sizes, 0.0, up.rows[:2], None, down.rows[:2], None)
    places, threads = (x.data_ptr(), active.data_ptr(), part, y.data_ptr(), 1), torch.get_num_threads()

    def run() -> Any:
        whole()
        _native.sparse_ffn(*places, threads)
        return x, y, active, up, down  # kept alive

    return run


def torch_part(inputs: int, neurons: int) -> Run:
    into, out = torch.full((neurons, inputs), 0.01), torch.full((inputs, neurons), 0.01)
    x = torch.randn(1, inputs)
    return lambda: F.linear(F.relu(F.linear(x, into)) * F.linear(x, into), out)


def measure(inputs: int, neurons: int, threads: int, device: Device) -> list[dict[str, Any]]:
    """Rows of one shape: a pair of formats and a share of active neurons each."""
    with torch_threads(threads), torch.inference_mode():
        made = {f: [Weights(neurons, inputs, f) for _ in range(3)] + [Weights(inputs, neurons, f)] for f in FORMATS}
        runs: dict[Any, Run] = {f: dense_part(gate, up, down) for f, (gate, up, _, down) in made.items()}
        runs["torch"] = torch_part(inputs, neurons)
        for rows, gate in PAIRS:
            _, up, down, _ = made[rows]
            runs |= {(rows, gate, share): sparse_part(made[gate][0], up, down, share) for share in SHARES}
        found = in_turn(runs)
    middle = {key: median(times) for key, times in found.items()}
    table = []
    for rows, gate in PAIRS:
        size = sum(w.rows.values.nbytes for w in (made[gate][0], *made[rows][1:3]))
        row: dict[str, Any] = {"inputs": inputs, "neurons": neurons, "threads": threads, "rows": rows, "gate": gate}
        row |= {"weight_bytes": size, "level": device.level(size)}
        crossings = [break_even([middle[rows, gate, share] for share in SHARES], middle[f]) for f in FORMATS]
        for share in SHARES:
            low, _, high = quantiles(found[rows, gate, share], n=4)
            times = {"active": share, "sparse_us": f"{middle[rows, gate, share]:.1f}", "iqr_us": f"{high - low:.1f}"}
            times |= {f"dense_{name}_us": f"{middle[name]:.1f}" for name in (*FORMATS, "torch")}
            table.append(row | times | {f"break_even_{f}": c for f, c in zip(FORMATS, crossings)})
    return table


def break_even(sparse_us: Sequence[float], dense_us: float) -> str:
    """The share of active neurons from which on the sparse part is slower, by linear interpolation."""
    slower = [i for i, us in enumerate(sparse_us) if us > dense_us]
    if not slower or slower[0] == 0:
        return "never faster" if slower else "always faster"
    i = slower[0]
    return f"{np.interp(dense_us, sparse_us[i - 1 : i + 1], SHARES[i - 1 : i + 1]):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/sparse_ffn.csv"))
    arguments = parser.parse_args()
    device, table = Device.here(), []
    busy = wait_until_quiet()
    for inputs, neurons in SHAPES:
        for threads in sorted({1, device.cores}):
            rows = measure(inputs, neurons, threads, device)
            for row in rows[SHARES.index(0.1) :: len(SHARES)]:
                print(*(f"{key}={value}" for key, value in row.items()), flush=True)
            table += rows
    write_rows(arguments.out, table, isa=kernels.isa(), torch=torch.__version__, busy_cores=f"{busy:.1f}")


if __name__ == "__main__":
    main()

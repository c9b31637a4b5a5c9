"""Each kernel against the limit of this machine and torch's own operators, in the caches and beyond them.

    python benchmarks/kernels.py        # writes results/kernels.csv, about a minute

All that is compared on a matrix is timed in turn (ABAB), each after a call that brings its weights back into the
caches; a time is the median over rounds with the interquartile range. `kernel` is our C++ alone, `ours` with the torch
operator around it. OpenMP's threads sleep when they wait (OMP_WAIT_POLICY), or they would take a core from what runs
next.
The limit is the bytes of the weights at the bandwidth of the cache level that holds them, or the operations at the
peak of torch's int8 product, whichever is slower; both were measured on this machine by `lilliput.device`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import torch
import torch.nn.functional as F
from tables import write_rows

from lilliput import kernels
from lilliput._probe import torch_threads
from lilliput.device import Device
from lilliput.kernels import _native
from lilliput.kernels import group_linear as kernel

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576))  # of SmolLM2-135M
FORMATS = ((8, None), (4, 32), (4, 64), (3, 64), (2, 64))  # bits, group (None: the whole row)
TOKENS = (1, 256)
BEYOND = 2  # times the last-level cache
COLUMNS_BEYOND = 2048
MOST_PRODUCTS = 3e8  # of a case, so that the table takes a minute
ROUNDS = 9
SAMPLE_SECONDS = 1e-3

Run = Callable[[], Any]


def contenders(rows: int, columns: int, bits: int, group: int, tokens: int) -> dict[str, Run]:
    """The same product by each executor that has the format; values do not matter for their times."""
    x = torch.randn(tokens, columns)
    half, w = x.bfloat16(), torch.ones(rows, columns)
    half_w = w.bfloat16()
    runs = ours(x, rows, bits, group)
    runs["torch_fp32"] = lambda: F.linear(x, w)
    runs["torch_bf16"] = lambda: F.linear(half, half_w)
    if bits == 8:
        codes, scale = torch.ones(rows, columns, dtype=torch.int8), torch.ones(rows, dtype=torch.bfloat16)
        runs["torch_packed"] = lambda: torch.ops.aten._weight_int8pack_mm(half, codes, scale)
    if bits == 4:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.ones(rows, columns, dtype=torch.int32), 1)
        grid = torch.ones(columns // group, rows, 2, dtype=torch.bfloat16)
        runs["torch_packed"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, packed, group, grid)
    return runs


def ours(x: torch.Tensor, rows: int, bits: int, group: int) -> dict[str, Run]:
    sizes = kernel.layout_sizes(rows, x.shape[1], group, bits)
    codes = torch.randint(0, 256, (sizes[0],), dtype=torch.uint8)
    grid = torch.full((sizes[1],), 1.0, dtype=torch.bfloat16).view(torch.int16)
    y, threads = torch.empty(len(x), rows), torch.get_num_threads()
    pointers = [tensor.data_ptr() for tensor in (x, codes, grid, y)]
    arguments = (*pointers, len(x), rows, x.shape[1], group, bits, threads)
    return {
        "kernel": lambda keep=y: _native.group_linear(*arguments),
        "ours": lambda: kernel.group_linear(x, codes, grid, rows, group, bits),
    }


def sample(run: Run, calls: int) -> float:
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e6


def in_turn(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Microseconds of a call, a value for each round."""
    calls = {}
    for name, run in runs.items():
        calls[name] = max(1, int(SAMPLE_SECONDS * 1e6 / sample(run, 3)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(sample(run, calls[name]))
    return found


def measure(device: Device, rows: int, columns: int, bits: int, group: int, tokens: int, threads: int) -> dict:
    """A row of the table."""
    with torch_threads(threads), torch.inference_mode():
        found = in_turn(contenders(rows, columns, bits, group, tokens))
    codes, grid = kernel.layout_sizes(rows, columns, group, bits)
    size = codes + 2 * grid
    limit_us = 1e3 * device.roofline_ms(size, 2 * rows * columns * tokens, "int8", threads)
    row: dict[str, Any] = {"kernel": "group_linear", "rows": rows, "columns": columns, "bits": bits, "group": group}
    row |= {"tokens": tokens, "threads": threads, "weight_bytes": size, "level": device.level(size)}
    for name in ("kernel", "ours", "torch_fp32", "torch_bf16", "torch_packed"):
        low, _, high = quantiles(found[name], n=4) if name in found else (0, 0, 0)
        row[f"{name}_us"] = f"{median(found[name]):.2f}" if name in found else ""
        row[f"{name}_iqr_us"] = f"{high - low:.2f}" if name in found else ""
    middle = median(found["kernel"])
    row |= {"gbps": f"{size / middle / 1e3:.1f}", "limit_us": f"{limit_us:.2f}", "share": f"{limit_us / middle:.2f}"}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=Path("results/kernels.csv"))
    arguments = parser.parse_args()
    device, table = Device.here(), []
    beyond_bytes = BEYOND * max(device.caches_bytes.values())
    for bits, group in FORMATS:
        beyond = (beyond_bytes * 8 // (bits * COLUMNS_BEYOND) // 16 * 16, COLUMNS_BEYOND)
        cases = [(*shape, tokens) for shape in SHAPES for tokens in arguments.tokens] + [(*beyond, 1)]
        for rows, columns, tokens in cases:
            if rows * columns * tokens > MOST_PRODUCTS:
                continue
            for threads in sorted({1, device.cores}):
                row = measure(device, rows, columns, bits, group or columns, tokens, threads)
                print(*(f"{key}={value}" for key, value in row.items()), flush=True)
                table.append(row)
    write_rows(arguments.out, table, isa=kernels.isa(), torch=torch.__version__)


if __name__ == "__main__":
    main()

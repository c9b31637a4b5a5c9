"""Products with weights from codebooks and from seeds, beside 4-bit group codes, in the caches and beyond them.

    python benchmarks/codebook.py        # writes results/codebook.csv, about a minute

All that is compared on a matrix is timed in turn (ABAB), each after a call that brings its weights back into the
caches; a time is the median over rounds with the interquartile range. Only our C++ is timed, without the torch operator
around it. `seed, table` finds the states of the register in a table instead of running it. The limit of a row is its
own weights' bytes at the bandwidth of the cache level that holds them, or its operations at the peak of the arithmetic.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import torch
from kernels import Run, in_turn
from tables import write_rows

from lilliput import kernels
from lilliput._probe import torch_threads
from lilliput.device import Device
from lilliput.kernels import _native, codebook_linear, group_linear, seed_linear

SHAPES = ((576, 576), (1536, 576), (576, 1536))  # of SmolLM2-135M
BEYOND = 2  # times the last-level cache, of the 4-bit codes
COLUMNS_BEYOND = 3072
TOKENS = (1, 4, 64)
GROUP = 64
BASE = "group, 4 bits"

Case = tuple[Run, int, str]  # the product, bytes of its weights, type of its arithmetic


def contenders(rows: int, columns: int, tokens: int, threads: int) -> dict[str, Case]:
    """The same product in every format; values do not matter for their times."""
    x, y = torch.randn(tokens, columns), torch.empty(tokens, rows)
    cases = {f"group, {bits} bits": group_case(x, y, bits, threads) for bits in (4, 3, 2)}
    cases |= {f"codebook, {bits} bits": codebook_case(x, y, bits, True, threads) for bits in (4, 3, 2)}
    cases["codebook, 4 bits, tables of rows"] = codebook_case(x, y, 4, False, threads)
    for bits in (4, 3):
        cases[f"seed, {bits} bits"] = seed_case(x, y, bits, False, threads)
        cases[f"seed, table, {bits} bits"] = seed_case(x, y, bits, True, threads)
    return cases


def group_case(x: torch.Tensor, y: torch.Tensor, bits: int, threads: int) -> Case:
    shape = y.shape[1], x.shape[1], GROUP, bits
    sizes = group_linear.layout_sizes(*shape)
    codes, grid = random_bytes(sizes[0]), torch.full((sizes[1],), 0x3F80, dtype=torch.int16)
    keep = (x, codes, grid, y)
    addresses = [tensor.data_ptr() for tensor in keep]
    run = lambda _=keep: _native.group_linear(*addresses, len(x), *shape, threads)  # noqa: E731
    return run, sizes[0] + 2 * sizes[1], "int8"


def codebook_case(x: torch.Tensor, y: torch.Tensor, bits: int, shared: bool, threads: int) -> Case:
    shape = y.shape[1], x.shape[1], GROUP, bits
    sizes = codebook_linear.layout_sizes(*shape, shared)
    codes, scale = random_bytes(sizes[0]), torch.full((sizes[1],), 0x3F80, dtype=torch.int16)
    keep = (x, codes, scale, random_bytes(sizes[2]), y)
    addresses = [tensor.data_ptr() for tensor in keep]
    run = lambda _=keep: _native.codebook_linear(*addresses, len(x), *shape, shared, threads)  # noqa: E731
    return run, sizes[0] + 2 * sizes[1] + sizes[2], "int8"


def seed_case(x: torch.Tensor, y: torch.Tensor, bits: int, table: bool, threads: int) -> Case:
    shape = y.shape[1], x.shape[1], bits
    codes = random_bytes(seed_linear.code_bytes(*shape))
    keep = (x, codes, y)
    addresses = [tensor.data_ptr() for tensor in keep]
    run = lambda _=keep: _native.seed_linear(*addresses, len(x), *shape, -16, threads, table)  # noqa: E731
    return run, codes.numel(), "fp32"


def random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


def measure(device: Device, rows: int, columns: int, tokens: int, threads: int) -> list[dict[str, Any]]:
    """Rows of the table: every contender on one matrix."""
    with torch_threads(threads), torch.inference_mode():
        cases = contenders(rows, columns, tokens, threads)
        found = in_turn({name: run for name, (run, _, _) in cases.items()})
    base, table = median(found[BASE]), []
    for name, (_, size, dtype) in cases.items():
        low, middle, high = quantiles(found[name], n=4)
        limit_us = 1e3 * device.roofline_ms(size, 2 * rows * columns * tokens, dtype, threads)
        row: dict[str, Any] = {"kernel": name, "rows": rows, "columns": columns, "tokens": tokens, "threads": threads}
        row |= {
            "weight_bytes": size,
            "bits_per_weight": f"{8 * size / rows / columns:.3f}",
            "level": device.level(size),
        }
        row |= {"us": f"{middle:.2f}", "iqr_us": f"{high - low:.2f}", "gbps": f"{size / middle / 1e3:.1f}"}
        row |= {"ns_per_weight": f"{1e3 * middle / rows / columns:.4f}", "limit_us": f"{limit_us:.2f}"}
        row |= {"share": f"{limit_us / middle:.2f}", "times_group_4_bits": f"{middle / base:.2f}"}
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/codebook.csv"))
    arguments = parser.parse_args()
    device, table = Device.here(), []
    rows_beyond = BEYOND * max(device.caches_bytes.values()) * 2 // COLUMNS_BEYOND // 16 * 16
    cases = [(*shape, tokens) for shape in SHAPES for tokens in TOKENS] + [(rows_beyond, COLUMNS_BEYOND, 1)]
    for case in cases:
        for threads in sorted({1, device.cores}):
            for row in measure(device, *case, threads):
                print(*(f"{key}={value}" for key, value in row.items()), flush=True)
                table.append(row)
    write_rows(arguments.out, table, isa=kernels.isa(), torch=torch.__version__)


if __name__ == "__main__":
    main()

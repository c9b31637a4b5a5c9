"""Products by table lookup against the limit of this machine and the integer product, per instruction set.

    python benchmarks/lookup.py        # writes results/lookup.csv, about two minutes

Both kernels run alone, without the torch operators around them, in turn (ABAB) and each after a call that brings its
weights back into the caches; a time is the median over rounds with the interquartile range. The integer product has no
1-bit format: there it is given 2 bits. The limit is the bytes of the lookup's weights at the bandwidth of the cache
level that holds them; what a table costs or a shuffle does not count in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from kernels import BEYOND, Run, in_turn
from tables import write_rows

from lilliput import kernels
from lilliput._probe import torch_threads
from lilliput.device import Device
from lilliput.kernels import _native
from lilliput.kernels import group_linear as integer
from lilliput.kernels import lookup_linear as lookup
from lilliput.metrics.latency import paired_ratio

SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576))  # of SmolLM2-135M
BITS, GROUP, TOKENS = (4, 3, 2, 1), 64, (1, 4)
COLUMNS_BEYOND = 2048


def product(kernel: Any, run: Any, rows: int, columns: int, bits: int, x: torch.Tensor) -> Run:
    """A kernel on weights of any values: they do not matter for its time."""
    sizes = kernel.layout_sizes(rows, columns, GROUP, bits)
    codes = torch.randint(0, 256, (sizes[0],), dtype=torch.uint8)
    grid = torch.full((sizes[1],), 1.0, dtype=torch.bfloat16).view(torch.int16)
    y, threads = torch.empty(len(x), rows), torch.get_num_threads()
    pointers = [tensor.data_ptr() for tensor in (x, codes, grid, y)]
    arguments = (*pointers, len(x), rows, columns, GROUP, bits, threads)
    return lambda keep=(codes, grid, y): run(*arguments)


def measure(device: Device, rows: int, columns: int, bits: int, tokens: int, threads: int) -> dict[str, Any]:
    """A row of the table."""
    x = torch.randn(tokens, columns)
    with torch_threads(threads):
        found = in_turn(
            {
                "lookup": product(lookup, _native.lookup_linear, rows, columns, bits, x),
                "integer": product(integer, _native.group_linear, rows, columns, max(bits, 2), x),
            }
        )
    codes, grid = lookup.layout_sizes(rows, columns, GROUP, bits)
    size = codes + 2 * grid
    limit_us = 1e6 * size / device.bandwidth(size, threads)
    row: dict[str, Any] = {"kernel": "lookup_linear", "isa": kernels.isa(), "rows": rows, "columns": columns}
    row |= {"bits": bits, "group": GROUP, "tokens": tokens, "threads": threads}
    row |= {"weight_bytes": size, "level": device.level(size)}
    for name, times in found.items():
        low, _, high = quantiles(times, n=4)
        row |= {f"{name}_us": f"{median(times):.2f}", f"{name}_iqr_us": f"{high - low:.2f}"}
    ratio, middle = paired_ratio(found["integer"], found["lookup"]), median(found["lookup"])
    row |= {"faster": f"{ratio.ratio:.2f}", "faster_low": f"{ratio.low:.2f}", "faster_high": f"{ratio.high:.2f}"}
    return row | {
        "gbps": f"{size / middle / 1e3:.1f}",
        "limit_us": f"{limit_us:.2f}",
        "share": f"{limit_us / middle:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="*", default=[name for name in kernels.available_isas() if name != "scalar"])
    parser.add_argument("--out", type=Path, default=Path("results/lookup.csv"))
    arguments = parser.parse_args()
    device, table = Device.here(), []
    beyond_bytes = BEYOND * max(device.caches_bytes.values())
    for name in arguments.isa:
        kernels.set_isa(name)
        for bits in BITS:
            beyond = (beyond_bytes * 8 // (bits * COLUMNS_BEYOND) // 64 * 64, COLUMNS_BEYOND, 1)
            cases = [(*shape, tokens) for shape in SHAPES for tokens in TOKENS if shape[0] < 9999 or tokens == 1]
            for rows, columns, tokens in [*cases, beyond]:
                for threads in sorted({1, device.cores}):
                    row = measure(device, rows, columns, bits, tokens, threads)
                    print(*(f"{key}={value}" for key, value in row.items()), flush=True)
                    table.append(row)
    write_rows(arguments.out, table, torch=torch.__version__)


if __name__ == "__main__":
    main()

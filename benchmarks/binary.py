"""Binary products and convolutions against float, int8 and int4 ones, on one thread, in the caches and beyond.

    python benchmarks/binary.py         # writes results/binary.csv, about two minutes

All contenders of a shape are timed in turn (ABAB); a time is the median over rounds with the interquartile range.
`binary` packs its float32 activations inside the time, M=2 and M=3 are residual signs, `real` keeps activations float32
(weights alone are bits). Peers round nothing inside their time: `torch_int_mm` gets int8 on both sides. OpenVINO's
binary convolution makes its signs inside the time, too. `naive_float` is a convolution in plain loops, what the paper's
58 times are against; nobody runs that.

The limit of a binary product is the bytes of its weights at the bandwidth of the cache level that holds them, or its
operations (two for each pair of signs) at the measured peak of xor, popcount and add in registers, whichever is slower.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import numpy as np
import torch
import torch.nn.functional as F
from kernels import Run, in_turn
from tables import write_rows

from lilliput._probe import torch_threads
from lilliput.device import Device
from lilliput.kernels import _native, group_linear
from lilliput.kernels import binary_conv2d as conv
from lilliput.kernels import binary_linear as kernel

LINEAR = ((576, 576, 1), (1024, 1024, 1), (4096, 4096, 1), (1024, 1024, 64), (1024, 1024, 256), (2048, 2048, 2048))
BEYOND = (131072, 4096, 1)  # 64 MiB of bits: twice a last-level cache
CONVOLUTIONS = ((64, 56), (128, 28), (256, 28), (256, 14), (512, 7))  # channels in and out, width and height; 3x3
LEVELS = (1.0, 0.5, 0.25)
PEAK_ROUNDS = 2_000_000
NAIVE = "naive_float"


def peak_ops() -> float:
    """Operations a second of xor, popcount and add on signs in registers: the best of several tries."""
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        signs = _native.binary_linear_peak(PEAK_ROUNDS)
        best = max(best, 2 * signs / (time.perf_counter() - start))
    return best


# --- products --------------------------------------------------------------------------------------------------


def products(rows: int, columns: int, tokens: int) -> dict[str, tuple[Run, int]]:
    """Contender -> the call and the bytes of its weights; values do not matter for their times."""
    x, scale = torch.randn(tokens, columns), torch.ones(rows)
    codes = torch.randint(0, 256, (kernel.layout_size(rows, 1, columns),), dtype=torch.uint8)
    runs: dict[str, tuple[Run, int]] = {}
    for planes in (1, 2, 3):
        levels = torch.tensor(LEVELS[:planes])
        name = "binary" if planes == 1 else f"binary M={planes}"
        runs[name] = (lambda levels=levels: kernel.binary_linear(x, codes, scale, levels)), codes.nbytes
    runs["binary with K"] = (lambda: kernel.binary_linear(x, codes, scale, torch.ones(1), None, True)), codes.nbytes
    runs["binary weights, real"] = (lambda: kernel.binary_weight_linear(x, codes, scale)), codes.nbytes
    for bits, group in ((8, columns), (4, 64)):
        sizes = group_linear.layout_sizes(rows, columns, group, bits)
        packed = torch.randint(0, 256, (sizes[0],), dtype=torch.uint8)
        grid = torch.full((sizes[1],), 1.0, dtype=torch.bfloat16).view(torch.int16)
        arguments = (packed, grid, rows, group, bits)
        call = lambda arguments=arguments: group_linear.group_linear(x, *arguments)  # noqa: E731
        runs[f"group_linear int{bits}"] = call, packed.nbytes + grid.nbytes
    w = torch.ones(rows, columns)
    half, half_w = x.bfloat16(), w.bfloat16()
    runs["torch fp32"] = (lambda: F.linear(x, w)), w.nbytes
    runs["torch bf16"] = (lambda: F.linear(half, half_w)), half_w.nbytes
    if tokens > 16:  # torch._int_mm takes no fewer
        a, b = torch.ones(tokens, columns, dtype=torch.int8), torch.ones(rows, columns, dtype=torch.int8)
        runs["torch._int_mm"] = (lambda: torch._int_mm(a, b.T)), b.nbytes
    return runs


# --- convolutions ----------------------------------------------------------------------------------------------


def convolutions(channels: int, width: int, library: ctypes.CDLL | None) -> dict[str, tuple[Run, int]]:
    """Contender -> the call and the bytes of its weights, for a zero-padded 3x3 convolution of one picture."""
    x, scale = torch.randn(1, channels, width, width), torch.ones(channels)
    positive = torch.rand(channels, 9, channels) < 0.5
    codes, place = kernel.pack(positive), ((1, 1), (1, 1), (1, 1))
    last = x.to(memory_format=torch.channels_last)
    runs: dict[str, tuple[Run, int]] = {}
    for name, given, planes, by_mean in (
        ("binary", x, 1, False), ("binary channels-last", last, 1, False), ("binary M=2", x, 2, False),
        ("binary M=3", x, 3, False), ("binary with K", x, 1, True),
    ):  # fmt: skip
        how = (codes, scale, torch.tensor(LEVELS[:planes]), (3, 3), None, by_mean, *place)
        runs[name] = (lambda given=given, how=how: conv.binary_conv2d(given, *how)), codes.nbytes
    w = torch.where(positive, 1.0, -1.0).transpose(1, 2).unflatten(2, (3, 3)).contiguous()
    half, half_w = last.bfloat16(), w.bfloat16().to(memory_format=torch.channels_last)
    runs["torch fp32"] = (lambda: F.conv2d(x, w, padding=1)), w.nbytes
    runs["torch bf16"] = (lambda: F.conv2d(half, half_w, padding=1)), half_w.nbytes
    runs |= openvino_convolutions(x.numpy(), w.numpy())
    theirs = next(iter(runs["openvino BinaryConvolution"][0]().values()))
    if not np.array_equal(theirs, runs["binary"][0]().numpy()):
        raise RuntimeError("OpenVINO's binary convolution and ours do not give the same numbers")
    if library is not None:
        y = torch.empty_like(x)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, w, y)]
        naive = (lambda keep=(x, w, y): library.naive_convolution(*pointers, channels, channels, width)), w.nbytes
        runs[NAIVE] = naive
    return runs


def openvino_convolutions(x: np.ndarray, w: np.ndarray) -> dict[str, tuple[Run, int]]:
    """BinaryConvolution behind the FakeQuantize that makes its signs, and float ones in float32 and bfloat16."""
    import openvino
    from openvino import opset1

    ov: Any = openvino

    def compiled(node: Any, parameter: Any, precision: str) -> Run:
        options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision}
        request = ov.Core().compile_model(ov.Model([node], [parameter]), "CPU", options).create_infer_request()
        return lambda: request.infer([x], share_inputs=True, share_outputs=True)

    places = [1, 1], [1, 1], [1, 1], [1, 1]  # strides, padding before and after, dilation
    runs: dict[str, tuple[Run, int]] = {}
    for precision in ("f32", "bf16"):
        given = opset1.parameter(list(x.shape), ov.Type.f32)
        node = opset1.convolution(given, opset1.constant(w), *places)
        size = w.nbytes if precision == "f32" else w.nbytes // 2
        runs[f"openvino {precision}"] = compiled(node, given, precision), size
    given = opset1.parameter(list(x.shape), ov.Type.f32)
    limits = [opset1.constant(np.full((1, 1, 1, 1), v, np.float32)) for v in (0.0, 0.0, 0.0, 1.0)]  # bits
    bits = np.packbits((w > 0).reshape(-1), bitorder="little")
    weights = ov.op.Constant(ov.Tensor(bits, ov.Shape(list(w.shape)), ov.Type.u1))
    signs = opset1.fake_quantize(given, *limits, 2)
    node = opset1.binary_convolution(signs, weights, *places, "xnor-popcount", 0.0)
    runs["openvino BinaryConvolution"] = compiled(node, given, "f32"), bits.nbytes
    return runs


def naive_library(folder: str) -> ctypes.CDLL | None:
    """The convolution of plain loops, compiled here; None without a compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    source, target = Path(__file__).with_name("naive_convolution.cpp"), Path(folder) / "naive.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


# --- the table -------------------------------------------------------------------------------------------------


def measured(runs: dict[str, tuple[Run, int]], device: Device, peak: float, ops: float, what: dict) -> list[dict]:
    """A row for each contender."""
    with torch_threads(1), torch.inference_mode():
        found = in_turn({name: run for name, (run, _) in runs.items() if name != NAIVE})
        if NAIVE in runs:  # alone: after a tenth of a second of it the others would not begin at full speed
            found |= in_turn({NAIVE: runs[NAIVE][0]})
    float_us = median(found["torch fp32"])
    rows = []
    for name, times in found.items():
        low, middle, high = quantiles(times, n=4)
        size = runs[name][1]
        row = {**what, "contender": name, "weight_bytes": size, "level": device.level(size), "threads": 1}
        row |= {
            "us": f"{middle:.2f}",
            "iqr_us": f"{high - low:.2f}",
            "times_faster_than_fp32": f"{float_us / middle:.2f}",
        }
        planes = int(name[-1]) if "M=" in name else 1
        signs = name.startswith("binary") and "real" not in name
        limit_us = 1e6 * max(size / device.bandwidth(size, 1), planes * ops / peak)
        row |= (
            {"limit_us": f"{limit_us:.2f}", "share": f"{limit_us / middle:.2f}"}
            if signs
            else {"limit_us": "", "share": ""}
        )
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/binary.csv"))
    arguments = parser.parse_args()
    device, peak, table = Device.here(), peak_ops(), []
    print(f"peak of xor, popcount and add: {peak / 1e12:.2f} T operations/s")
    for rows, columns, tokens in (*LINEAR, BEYOND):
        what = {"op": "linear", "shape": f"{rows}x{columns}", "tokens": tokens}
        table += measured(products(rows, columns, tokens), device, peak, 2.0 * rows * columns * tokens, what)
    with tempfile.TemporaryDirectory() as folder:
        library = naive_library(folder)
        for channels, width in CONVOLUTIONS:
            what = {"op": "conv 3x3", "shape": f"{channels}x{channels}, {width}x{width}", "tokens": width * width}
            ops = 2.0 * 9 * channels * channels * width * width
            table += measured(convolutions(channels, width, library), device, peak, ops, what)
    facts = {"isa": _native.binary_linear_isa(), "popcount_peak_tops": f"{peak / 1e12:.2f}", "torch": torch.__version__}
    write_rows(arguments.out, table, **facts)


if __name__ == "__main__":
    main()

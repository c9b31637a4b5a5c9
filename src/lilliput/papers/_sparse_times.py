"""Times of sparse and dense feed-forward parts, and of whole tokens, taken in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.kernels import _native
from lilliput.kernels.decoder import decoder_for
from lilliput.kernels.sparse_ffn import native_part
from lilliput.methods.layers.relufy import shift_for
from lilliput.methods.layers.sparse_ffn import SparseFeedForward, SparseFFN
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8
from lilliput.metrics.latency import Comparison, compare, wait_until_quiet
from lilliput.paper import Row
from lilliput.workload import Workload

INPUTS, NEURONS = 576, 1536  # of SmolLM2-135M
DENSE, INT8, INT4 = "feed-forward, dense float32", "feed-forward, dense int8", "feed-forward, dense int4"
SPARSE = "feed-forward, sparse int8"
SPARSE_FORMATS = {  # of the gate and of the rows
    "feed-forward, sparse float32": ("float32", "float32"),
    SPARSE: ("int8", "int8"),
    "feed-forward, sparse int8, gate int4": ("int4", "int8"),
}
TOKENS = 32  # in the cache when a token is timed, or as many as a text has


def feed_forward_times(zeros: float, seed: int = 0, rounds: int = 15) -> tuple[list[Row], Comparison]:
    """Rows of microseconds of one token, and how many times faster sparse int8 is than dense float32.

    The kernels alone, as the native decoder calls them. The weights are random; the shift silences the share `zeros` of
    the neurons. Every part is timed in turn with the dense float32 one.
    """
    torch.manual_seed(seed)
    x, layers = torch.randn(64, INPUTS), [nn.Linear(INPUTS, NEURONS, bias=False) for _ in range(2)]
    layers.append(nn.Linear(NEURONS, INPUTS, bias=False))
    with torch.no_grad():
        gates = layers[0](x)
        shift = shift_for(gates, zeros)
    runs = _runs(layers, x, gates, shift)
    wait_until_quiet()
    found = {name: compare(runs[DENSE], run, rounds=rounds) for name, run in runs.items()}
    rows = [
        Row(
            name,
            {"ffn_us": 1e3 * one.medians_ms[1], "times_faster_than_float32": one.ratio},
            {"times_faster_than_float32": (one.high - one.low) / 2},
        )
        for name, one in found.items()
    ]
    return rows, found[SPARSE]


def _runs(layers: Sequence[nn.Linear], x: Tensor, gates: Tensor, shift: float) -> dict[str, Callable[[], Any]]:
    """The contenders; each takes another token every time, so that other neurons fire."""
    names = ("first", "second", "last")
    whole = nn.ModuleDict(dict(zip(names, layers)))
    packed = {INT8: Int8().apply(whole), INT4: Group().apply(whole)}
    runs = {DENSE: _dense_run(layers, x)}
    runs |= {name: _dense_run([made.get_submodule(n) for n in names], x) for name, made in packed.items()}
    for name, (gate, rows) in SPARSE_FORMATS.items():
        part = SparseFeedForward.from_layers(dict(zip(names, layers)), shift, gate, rows)
        runs[name] = _sparse_run(part, x, gates)
    return runs


def _product(layer: Any, tokens: Tensor, outputs: int) -> Callable[[int], Tensor]:
    """The kernel of a layer without its module: it takes the number of a token in `tokens`."""
    y, threads, width = torch.zeros(1, outputs), torch.get_num_threads(), tokens.shape[1]
    at = [row.data_ptr() for row in tokens]
    if hasattr(layer, "layout"):
        codes, grid = layer.layout()
        sizes = 1, outputs, width, layer.group, layer.bits, threads

        def packed(i: int) -> Tensor:
            _native.group_linear(at[i % len(tokens)], codes.data_ptr(), grid.data_ptr(), y.data_ptr(), *sizes)
            return y

        return packed
    weight = layer.values if hasattr(layer, "values") else layer.weight

    def dense(i: int) -> Tensor:
        _native.dense_linear(weight.data_ptr(), outputs, width, False, at[i % len(tokens)], 1, y.data_ptr(), threads)
        return y

    return dense


def _dense_run(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], Any]:
    """Three products; what is multiplied between them takes no time beside them and is left out."""
    gate, up = (_product(layer, x, NEURONS) for layer in layers[:2])
    down, turn = _product(layers[2], torch.randn(1, NEURONS), INPUTS), count()

    def run() -> Tensor:
        i = next(turn)
        gate(i), up(i)
        return down(i)

    return run


def _sparse_run(part: SparseFeedForward, x: Tensor, gates: Tensor) -> Callable[[], Any]:
    """The gate, then the neurons that fire by the float gates, so that all formats read equally many."""
    gate, turn, threads = _product(part.layers()[0], x, NEURONS), count(), torch.get_num_threads()
    up, _, down, _ = kept = part.sparse_parts()
    assert up is not None
    native = native_part((INPUTS, NEURONS, INPUTS), part.shift, up[:2], None, down[:2], None)
    y, at = torch.zeros(1, INPUTS), [(a.data_ptr(), b.data_ptr()) for a, b in zip(x, gates)]

    def run() -> Any:
        i = next(turn)
        gate(i)
        _native.sparse_ffn(*at[i % len(at)], native, y.data_ptr(), 1, threads)
        return y, kept, x, gates  # which hold the memory that is read

    return run


def token_times(work: Workload, relufied: nn.Module, rounds: int = 15) -> list[Row]:
    """Milliseconds of a token in the native decoder: int4 throughout, and the relufied model with sparse parts."""
    packed = Group().apply(work.model)
    attention = Group().apply(relufied, layers=["*self_attn*", "lm_head"])
    sparse = SparseFFN(gate="int4").apply(attention)
    everywhere = Group().apply(relufied)
    runs = {
        "token, int4": packed,
        "token, relufied, int4, dense": everywhere,
        "token, relufied, int4, sparse int8 rows": sparse,
    }
    ids = work.validation[0]["input_ids"][0, : TOKENS + 1]
    base, rows = _token(packed, ids), []
    for name, model in runs.items():
        found = compare(base, _token(model, ids), rounds=rounds)
        values = {"token_ms": found.medians_ms[1], "times_faster_than_int4": found.ratio}
        rows.append(Row(name, values, {"times_faster_than_int4": (found.high - found.low) / 2}))
    return rows


def _token(model: nn.Module, ids: Tensor) -> Callable[[], Any]:
    decoder = decoder_for(model)
    before = len(ids) - 1
    cache = decoder.cache(len(ids))
    decoder(ids[:before], cache)

    def run() -> Tensor:
        cache.filled = before
        return decoder(ids[before:], cache)

    return run

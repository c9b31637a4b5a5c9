"""Times of sparse and dense feed-forward parts, and of whole tokens, taken in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.kernels.decoder import decoder_for
from lilliput.methods.layers.relufy import shift_for
from lilliput.methods.layers.sparse_ffn import SparseFeedForward, SparseFFN
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8
from lilliput.metrics.latency import Comparison, compare, wait_until_quiet
from lilliput.paper import Row
from lilliput.workload import Workload

INPUTS, NEURONS = 576, 1536  # of SmolLM2-135M
DENSE, INT8, INT4 = "feed-forward, dense float32", "feed-forward, dense int8", "feed-forward, dense int4"
SPARSE_FLOAT, SPARSE, SPARSE_4 = (
    "feed-forward, sparse float32",
    "feed-forward, sparse int8",
    "feed-forward, sparse int8, gate int4",
)
TOKENS = 32  # in the cache when a token is timed, or as many as a text has


class DensePart(nn.Module):
    """down(relu(gate - shift) * up) of any layers."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, shift: float):
        super().__init__()
        self.gate, self.up, self.down, self.shift = gate, up, down, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.gate(x) - self.shift) * self.up(x))


def feed_forward_times(zeros: float, seed: int = 0, rounds: int = 15) -> tuple[list[Row], Comparison]:
    """Rows of microseconds of one token, and how many times faster sparse int8 is than dense float32.

    The weights are random; the shift silences the share `zeros` of the neurons. Every part is timed in turn with the
    dense float32 one.
    """
    torch.manual_seed(seed)
    x = torch.randn(64, INPUTS)
    dense = DensePart(nn.Linear(INPUTS, NEURONS), nn.Linear(INPUTS, NEURONS), nn.Linear(NEURONS, INPUTS), 0.0)
    with torch.no_grad():
        dense.shift = shift_for(dense.gate(x), zeros)
    runs = {name: one_token(part, x) for name, part in _parts(dense).items()}
    wait_until_quiet()
    rows, chosen = [], None
    for name, run in runs.items():
        found = compare(one_token(dense, x), run, rounds=rounds)
        values = {"ffn_us": 1e3 * found.medians_ms[1], "times_faster_than_float32": found.ratio}
        rows.append(Row(name, values, {"times_faster_than_float32": (found.high - found.low) / 2}))
        chosen = found if name == SPARSE else chosen
    assert chosen is not None
    return rows, chosen


def _parts(dense: DensePart) -> Mapping[str, nn.Module]:
    layers: dict[str, Any] = {name: getattr(dense, name) for name in ("gate", "up", "down")}

    def sparse(gate: str, rows: str) -> nn.Module:
        return SparseFeedForward.from_layers(layers, dense.shift, gate, rows)

    return {
        DENSE: dense,
        INT8: Int8().apply(dense),
        INT4: Group().apply(dense),
        SPARSE_FLOAT: sparse("float32", "float32"),
        SPARSE: sparse("int8", "int8"),
        SPARSE_4: sparse("int4", "int8"),
    }


def one_token(part: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Another token each time, so that other neurons fire."""
    turn = 0

    def run() -> Tensor:
        nonlocal turn
        turn = (turn + 1) % len(x)
        with torch.inference_mode():
            return part(x[turn : turn + 1])

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

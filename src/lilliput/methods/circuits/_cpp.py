"""The same integers as plain C++: one function without allocation, for a processor or a high-level synthesis tool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lilliput.errors import UserError
from lilliput.methods.circuits._net import Encode, IntegerNet, Pool, Product, Scale, Stage, Steps

PRELUDE = """\
// Bytes in, a score for each class out; the class with the largest score is returned, the first of equals.
// Input bytes stand by row, column and channel: x = {offset!r} + {step!r} * q.
#include <cstdint>

namespace {{

template <int C, int H, int W, int N, int KH, int KW, int STRIDE, int PAD, int OH, int OW>
void product(const uint8_t* in, const int16_t* values, const int8_t* weights, int32_t* sums) {{
  for (int oy = 0; oy < OH; ++oy)
    for (int ox = 0; ox < OW; ++ox)
      for (int n = 0; n < N; ++n) {{
        int32_t sum = 0;
        for (int ky = 0; ky < KH; ++ky)
          for (int kx = 0; kx < KW; ++kx) {{
            const int y = oy * STRIDE + ky - PAD, x = ox * STRIDE + kx - PAD;
            if (y < 0 || y >= H || x < 0 || x >= W) continue;
            for (int c = 0; c < C; ++c)
              sum += values[in[(y * W + x) * C + c]] * weights[((n * KH + ky) * KW + kx) * C + c];
          }}
        sums[(oy * OW + ox) * N + n] = sum;
      }}
}}

template <int PLACES, int N, int J>
void by_steps(const int32_t* sums, const int32_t* thresholds, const uint8_t* falling, const uint8_t* codes,
              uint8_t* out) {{
  for (int i = 0; i < PLACES; ++i)
    for (int n = 0; n < N; ++n) {{
      int reached = 0;
      for (int j = 0; j < J; ++j) reached += sums[i * N + n] >= thresholds[n * J + j] ? 1 : 0;
      out[i * N + n] = codes[falling[n] ? J - reached : reached];
    }}
}}

template <int PLACES, int N, int SHIFT, int MOST>
void by_scale(const int32_t* sums, const int64_t* multiplier, const int64_t* offset, uint8_t* out) {{
  for (int i = 0; i < PLACES; ++i)
    for (int n = 0; n < N; ++n) {{
      const int64_t level = (multiplier[n] * sums[i * N + n] + offset[n]) >> SHIFT;
      out[i * N + n] = static_cast<uint8_t>(level < 0 ? 0 : level > MOST ? MOST : level);
    }}
}}

template <int C, int H, int W, int SIZE>
void largest(const uint8_t* in, uint8_t* out) {{
  for (int y = 0; y < H / SIZE; ++y)
    for (int x = 0; x < W / SIZE; ++x)
      for (int c = 0; c < C; ++c) {{
        uint8_t most = 0;
        for (int dy = 0; dy < SIZE; ++dy)
          for (int dx = 0; dx < SIZE; ++dx) {{
            const uint8_t code = in[((y * SIZE + dy) * W + x * SIZE + dx) * C + c];
            if (code > most) most = code;
          }}
        out[(y * (W / SIZE) + x) * C + c] = most;
      }}
}}
"""


def to_cpp(net: IntegerNet) -> str:
    """C++17 that computes the scores of one frame. Raises UserError when a sum does not fit 32 bits."""
    if any(p.bound >= 2**31 for p in net.products):
        raise UserError("a sum of this network does not fit 32 bits; use fewer bits for weights and values")
    tables: list[str] = []
    body: list[str] = []
    source = "q"
    for i, stage in enumerate(net.stages):
        tables += _tables(i, stage)
        body += _calls(i, stage, source)
        source = f"out{i}" if not isinstance(stage, Product) or stage.encoder is not None else f"sums{i}"
    tables += [
        _array("int64_t", "multiplier", net.scores.multiplier.tolist()),
        _array("int64_t", "offset", net.scores.offset.tolist()),
    ]
    head = PRELUDE.format(offset=net.grid.offset, step=net.grid.step)
    function = [
        "}  // namespace",
        "",
        'extern "C" int classify(const uint8_t* q, int64_t* scores) {',
        *(f"  {line}" for line in body),
        "  int best = 0;",
        f"  for (int n = 0; n < {net.classes}; ++n) {{",
        f"    scores[n] = multiplier[n] * {source}[n] + offset[n];",
        "    if (scores[n] > scores[best]) best = n;",
        "  }",
        "  return best;",
        "}",
    ]
    return "\n".join([head, *tables, "", *function]) + "\n"


def _tables(i: int, stage: Stage) -> list[str]:
    steps = stage.steps if isinstance(stage, Encode) else stage.encoder if isinstance(stage, Product) else None
    found: list[str] = []
    if isinstance(stage, Product):
        found += [
            _array("int16_t", f"values{i}", stage.values.tolist()),
            _array("int8_t", f"weights{i}", stage.weights.permute(0, 2, 3, 1).flatten().tolist()),
        ]
    if isinstance(steps, Steps):
        found += [
            _array("int32_t", f"thresholds{i}", steps.thresholds.flatten().tolist()),
            _array("uint8_t", f"falling{i}", steps.falling.long().tolist()),
            _array("uint8_t", f"codes{i}", steps.codes.tolist()),
        ]
    if isinstance(steps, Scale):
        found += [
            _array("int64_t", f"multiplier{i}", steps.multiplier.tolist()),
            _array("int64_t", f"offset{i}", steps.offset.tolist()),
        ]
    return found


def _calls(i: int, stage: Stage, source: str) -> list[str]:
    n, height, width = stage.out
    out = f"static uint8_t out{i}[{n * height * width}];"
    if isinstance(stage, Pool):
        return [out, f"largest<{_list((*stage.shape, stage.size))}>({source}, out{i});"]
    if isinstance(stage, Encode):
        places = n * height * width
        wide = [f"static int32_t sums{i}[{places}];", f"for (int j = 0; j < {places}; ++j) sums{i}[j] = {source}[j];"]
        return [*wide, out, _by_steps(i, (places, 1, stage.steps.thresholds.shape[1]))]
    sizes = (*stage.shape, *stage.weights.shape[:1], *stage.weights.shape[2:], stage.stride, stage.padding)
    lines = [
        f"static int32_t sums{i}[{n * height * width}];",
        f"product<{_list((*sizes, height, width))}>({source}, values{i}, weights{i}, sums{i});",
    ]
    if isinstance(stage.encoder, Steps):
        lines += [out, _by_steps(i, (height * width, n, stage.encoder.thresholds.shape[1]))]
    if isinstance(stage.encoder, Scale):
        limits = height * width, n, stage.encoder.shift, 2**stage.encoder.bits - 1
        lines += [out, f"by_scale<{_list(limits)}>(sums{i}, multiplier{i}, offset{i}, out{i});"]
    return lines


def _by_steps(i: int, sizes: Sequence[int]) -> str:
    return f"by_steps<{_list(sizes)}>(sums{i}, thresholds{i}, falling{i}, codes{i}, out{i});"


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _array(kind: str, name: str, numbers: Sequence[int]) -> str:
    return f"const {kind} {name}[{len(numbers)}] = {{{_list(numbers)}}};"

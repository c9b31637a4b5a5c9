// The inner loops of decoder; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "decoder_tiles.hpp"

#include <cmath>

#include "float_lanes.hpp"

namespace {

using namespace lilliput;

// --- one token ---------------------------------------------------------------------------------------------------

void rms_norm(const float* x, const Norm& norm, int64_t width, float* y) {
  Floats squares[2] = {};
  for (int64_t i = 0, turn = 0; i < width; i += kWidth, turn ^= 1) {
    const Floats values = load_part(x + i, width - i);
    squares[turn] = fused(values, values, squares[turn]);
  }
  const float inverse = 1.0f / std::sqrt(total(squares[0] + squares[1]) / static_cast<float>(width) + norm.epsilon);
  for (int64_t i = 0; i < width; i += kWidth) {
    const Floats weight = load_part(norm.weight + i, width - i) + norm.offset;
    store_part(load_part(x + i, width - i) * inverse * weight, width - i, y + i);
  }
}

void rotate(float* x, const float* cos, const float* sin, int64_t dim, float scaling) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = (first * cos[i] - second * sin[i]) * scaling;
    x[i + half] = (second * cos[i + half] + first * sin[i + half]) * scaling;
  }
}

/// x / (1 + e^-x)
Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

/// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), with tanh(u) = 2 / (1 + e^-2u) - 1
Floats gelu_tanh(Floats x) {
  const Floats twice = 1.59576912f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-twice));
}

/// max(0, x), NaN for NaN
Floats relu(Floats x) { return x <= Floats{} ? Floats{} : x; }

void gate(Activation activation, const float* gate, const float* up, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const Floats x = load_part(gate + i, count - i), factor = load_part(up + i, count - i);
    const Floats active = activation == Activation::silu ? silu(x) : activation == Activation::relu ? relu(x) : gelu_tanh(x);
    store_part(active * factor, count - i, y + i);
  }
}

// --- attention ---------------------------------------------------------------------------------------------------

/// Scores of query `q` for the keys first .. last-1: a sum across lanes for each key.
void score_one(const Attention& a, int q, int64_t first, int64_t last, float* scores) {
  const float* queries = a.queries + q * a.query_stride;
  for (int64_t start = first; start < last; start += kWidth) {
    Floats sums[kWidth] = {};
    for (int64_t d = 0; d < a.dim; d += kWidth) {
      const Floats query = load_part(queries + d, a.dim - d);
      for (int k = 0; k < kWidth; ++k) {
        const int64_t key = start + k < last ? start + k : last - 1;
        sums[k] = fused(query, load_part(a.keys + key * a.dim + d, a.dim - d), sums[k]);
      }
    }
    store(totals(sums), scores + start - first);
  }
}

template <int Step, int... I>
void transpose_pair(Floats& a, Floats& b, std::integer_sequence<int, I...>) {
  const Floats low = __builtin_shufflevector(a, b, (I & Step ? kWidth + (I ^ Step) : I)...);
  const Floats high = __builtin_shufflevector(a, b, (I & Step ? kWidth + I : I ^ Step)...);
  a = low;
  b = high;
}

template <int Step = kWidth / 2>
void transpose(Floats (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    if (!(i & Step)) transpose_pair<Step>(rows[i], rows[i | Step], std::make_integer_sequence<int, kWidth>{});
  }
  if constexpr (Step > 1) transpose<Step / 2>(rows);
}

/// kQueries queries as (dim, kQueries): a product reads those of a dimension side by side.
void interleave(const Attention& a, float* packed) {
  for (int64_t d = 0; d < a.dim; d += kWidth) {
    const int64_t depth = a.dim - d < kWidth ? a.dim - d : kWidth;
    for (int q = 0; q < kQueries; q += kWidth) {
      Floats rows[kWidth];
      for (int i = 0; i < kWidth; ++i) rows[i] = load_part(a.queries + (q + i) * a.query_stride + d, depth);
      transpose(rows);
      for (int i = 0; i < depth; ++i) store(rows[i], packed + (d + i) * kQueries + q);
    }
  }
}

/// Scores of kQueries interleaved queries for kWidth keys, a lane each, after the keys were transposed.
void score_keys(const Attention& a, const float* packed, int64_t start, int64_t last, float* scores, int64_t room) {
  Floats sums[kQueries] = {};
  for (int64_t d = 0; d < a.dim; d += kWidth) {
    const int64_t depth = a.dim - d < kWidth ? a.dim - d : kWidth;
    Floats keys[kWidth];
    for (int k = 0; k < kWidth; ++k) {
      keys[k] = load_part(a.keys + (start + k < last ? start + k : last - 1) * a.dim + d, depth);
    }
    transpose(keys);
    const float* queries = packed + d * kQueries;
    for (int64_t i = 0; i < depth; ++i, queries += kQueries) {
      for (int q = 0; q < kQueries; ++q) sums[q] = fused(keys[i], queries[q], sums[q]);
    }
  }
  for (int q = 0; q < kQueries; ++q) store(sums[q], scores + q * room);
}

/// Scores -> e^(score - largest) of those in reach, 0 for the others; returns the sum.
float soften(float* scores, int64_t begin, int64_t end, int64_t count) {
  Floats most = splat_float(scores[begin]);
  for (int64_t i = 0; i < begin; ++i) scores[i] = -INFINITY;
  for (int64_t i = end; i < (count + kWidth - 1) / kWidth * kWidth; ++i) scores[i] = -INFINITY;
  for (int64_t i = 0; i < count; i += kWidth) {
    const Floats values = load(scores + i);
    most = values > most ? values : most;
  }
  const Floats peak = splat_float(largest(most)), low = splat_float(-INFINITY);
  Floats sum = {};
  for (int64_t i = 0; i < count; i += kWidth) {
    const Floats values = load(scores + i);
    const Floats weights = values == low ? Floats{} : exponential(values - peak);
    sum += weights;
    store(weights, scores + i);
  }
  return total(sum);
}

/// out of `Queries` queries and `Vectors` vectors of the values' dimensions: the weighted mean of the values.
template <int Queries, int Vectors>
void mix(const float* scores, int64_t room, const float* values, int64_t keys, int64_t dim, int64_t part,
         const float* sums, float* out, int64_t stride) {
  Floats mixed[Queries][Vectors] = {};
  for (int64_t k = 0; k < keys; ++k, values += dim) {
    Floats row[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      row[v] = Vectors == 1 ? load_part(values, part) : load(values + v * kWidth);
    }
    for (int q = 0; q < Queries; ++q) {
      for (int v = 0; v < Vectors; ++v) mixed[q][v] = fused(row[v], scores[q * room + k], mixed[q][v]);
    }
  }
  for (int q = 0; q < Queries; ++q) {
    for (int v = 0; v < Vectors; ++v) {
      const Floats mean = mixed[q][v] / sums[q];
      store_part(mean, Vectors == 1 ? part : kWidth, out + q * stride + v * kWidth);
    }
  }
}

template <int Queries>
void mix_all(const Attention& a, const float* scores, int64_t room, int64_t first, int64_t keys, const float* sums,
             float* out) {
  const float* values = a.values + first * a.dim;
  int64_t d = 0;
  for (; d + 4 * kWidth <= a.dim; d += 4 * kWidth) {
    mix<Queries, 4>(scores, room, values + d, keys, a.dim, kWidth, sums, out + d, a.query_stride);
  }
  for (; d < a.dim; d += kWidth) {
    const int64_t part = a.dim - d < kWidth ? a.dim - d : kWidth;
    mix<Queries, 1>(scores, room, values + d, keys, a.dim, part, sums, out + d, a.query_stride);
  }
}

void attend(const Attention& a, float* scores) {
  const int64_t last = a.position + a.count;
  const int64_t first = a.position + 1 > a.window ? a.position + 1 - a.window : 0;
  const int64_t keys = last - first, room = score_room(keys);
  if (a.count < kQueries) {  // in the order of a single query, so that a few tokens at once give what each gives alone
    for (int q = 0; q < a.count; ++q) score_one(a, q, first, last, scores + q * room);
  } else {
    float* packed = scores + kQueries * room;
    interleave(a, packed);
    for (int64_t start = first; start < last; start += kWidth) {
      score_keys(a, packed, start, last, scores + start - first, room);
    }
  }
  float sums[kQueries];
  for (int q = 0; q < a.count; ++q) {
    const int64_t end = a.position + q + 1;
    const int64_t begin = end > a.window ? end - a.window : 0;
    sums[q] = soften(scores + q * room, begin - first, end - first, keys);
  }
  int q = 0;
  for (; q + 4 <= a.count; q += 4) {
    mix_all<4>(a, scores + q * room, room, first, keys, sums + q, a.out + q * a.query_stride);
  }
  for (; q < a.count; ++q) mix_all<1>(a, scores + q * room, room, first, keys, sums + q, a.out + q * a.query_stride);
}

}  // namespace

namespace lilliput {

const DecoderTiles LILLIPUT_TILES{rms_norm, rotate, attend, gate};

}  // namespace lilliput

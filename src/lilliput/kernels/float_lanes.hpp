// Float arithmetic on vectors of lanes.hpp: parts of a vector, sums across lanes, the exponential function.
#pragma once

#include <utility>

#include "lanes.hpp"

namespace {

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Floats load(const uint16_t* bfloat16) { return load_bfloat16(bfloat16); }

/// The first `count` lanes, 0 in the others.
template <class T>
Floats load_part(const T* from, int64_t count) {
  if (count >= kWidth) return load(from);
  T values[kWidth] = {};
  std::memcpy(values, from, count * sizeof(T));
  return load(values);
}

inline void store(Floats values, float* to) { std::memcpy(to, &values, sizeof values); }

inline void store_part(Floats values, int64_t count, float* to) {
  if (count >= kWidth) return store(values, to);
  std::memcpy(to, &values, count * sizeof(float));
}

/// Lanes whose bit `Step` is clear: a_i + a_(i+Step); the others: b_i + b_(i-Step).
template <int Step, int... I>
inline Floats fold_pair(Floats a, Floats b, std::integer_sequence<int, I...>) {
  const Floats same = __builtin_shufflevector(a, b, (I & Step ? kWidth + I : I)...);
  const Floats other = __builtin_shufflevector(a, b, (I & Step ? kWidth + (I ^ Step) : I ^ Step)...);
  return same + other;
}

template <int Step>
inline void fold(Floats* vectors) {
  for (int i = 0; i < Step; ++i) {
    vectors[i] = fold_pair<Step>(vectors[i], vectors[i + Step], std::make_integer_sequence<int, kWidth>{});
  }
  if constexpr (Step > 1) fold<Step / 2>(vectors);
}

/// Lane i is the sum of the lanes of vectors[i]; overwrites the vectors.
inline Floats totals(Floats (&vectors)[kWidth]) {
  fold<kWidth / 2>(vectors);
  return vectors[0];
}

inline float total(Floats vector) {
  float lanes[kWidth];
  store(vector, lanes);
  for (int step = kWidth / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

inline float largest(Floats vector) {
  float lanes[kWidth];
  store(vector, lanes);
  for (int i = 1; i < kWidth; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

inline Floats splat_float(float value) { return value - Floats{}; }

/// e^x within 2 units in the last place; x is held in -87 .. 88, NaN stays NaN.
inline Floats exponential(Floats x) {
  const Floats low = splat_float(-87.0f), high = splat_float(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats shift = splat_float(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats moved = fused(x, 1.44269504f, shift);
  const Floats n = moved - shift;
  const Floats r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));  // x - n ln 2, ln 2 in two parts
  Floats p = splat_float(1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = fused(p, r, splat_float(factor));
  }
  return p * (Floats)(((Ints)moved << 23) + splat(127 << 23));
}

}  // namespace

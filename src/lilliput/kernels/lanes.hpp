// A vector of 32-bit lanes, one row of a matrix in each, as wide as the instruction set this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Everything here has internal linkage: the linker must not take one instruction set's code for another's.
namespace {

#if defined(__AVX512VNNI__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int8_t Bytes __attribute__((vector_size(kWidth)));

inline Words load_words(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

inline Floats load_bfloat16(const uint16_t* from) {
#if defined(__AVX512VNNI__)
  const Words words = (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  const Words words = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  const Words words = {from[0], from[1], from[2], from[3]};
#endif
  return (Floats)(words << 16);
}

inline Ints splat(int32_t value) { return value - Ints{}; }

inline Floats to_float(Ints values) { return __builtin_convertvector(values, Floats); }

/// a * b + c, rounded once where the instruction set can.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512VNNI__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Floats fused(Floats a, float b, Floats c) { return fused(a, b - Floats{}, c); }

template <class Lanes, size_t... I>
inline auto upper_half(Lanes lanes, std::index_sequence<I...>) {
  return __builtin_shufflevector(lanes, lanes, (I + sizeof...(I))...);
}

template <class Lanes, size_t... I>
inline auto lower_half(Lanes lanes, std::index_sequence<I...>) {
  return __builtin_shufflevector(lanes, lanes, I...);
}

/// The lanes of `values` that stand for rows below `rows`, the first for `row`, into y.
inline void store_rows(Floats values, int64_t row, int64_t rows, float* y) {
  if (row + kWidth <= rows) {
    std::memcpy(y + row, &values, sizeof values);
  } else if (row < rows) {
    std::memcpy(y + row, &values, (rows - row) * sizeof(float));
  }
}

/// All `Count` lanes by `combine`, upper half with lower half again and again: the same order at every width.
template <int Count, class Lanes, class Combine>
inline auto reduce(Lanes lanes, Combine combine) {
  if constexpr (Count == 1) {
    return lanes;
  } else if constexpr (Count == 2) {
    return combine(lanes[0], lanes[1]);
  } else {
    const auto half = std::make_index_sequence<Count / 2>();
    return reduce<Count / 2>(combine(lower_half(lanes, half), upper_half(lanes, half)), combine);
  }
}

/// sum + the products of four codes (unsigned bytes, first lowest) of each lane with four signed bytes.
template <int Bits>
inline Ints dot(Ints sum, Words codes, int32_t four) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
  const __m256i c = (__m256i)codes, x = _mm256_set1_epi32(four);
  if constexpr (Bits <= 4) {  // sums of two products fit into 16 bits
    const __m256i pairs = _mm256_maddubs_epi16(c, x);
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  } else {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(x, 8));
    return sum + (Ints)even + (Ints)odd;
  }
#else
  for (int i = 0; i < 4; ++i) {
    sum += (Ints)((codes >> (8 * i)) & 255) * static_cast<int8_t>(static_cast<uint32_t>(four) >> (8 * i));
  }
  return sum;
#endif
}

}  // namespace

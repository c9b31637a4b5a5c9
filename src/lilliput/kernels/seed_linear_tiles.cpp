// The inner loops of seed_linear; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "seed_linear_tiles.hpp"

#include "lanes.hpp"

namespace {

using namespace lilliput;

constexpr int kBandVectors = kSeedRows / kWidth;
constexpr int64_t kPanelTokens = 3;  // from which on a band is regenerated once for all tokens
constexpr int kTokens = kWidth == 16 ? 8 : 2;  // that share a pass through the panel
constexpr uint32_t kTop = 0x80008000u;         // of both halves: makes v - 2^15 of v, as a signed number

/// What a vector of blocks holds: their seeds' bit streams (64 bits), t as pairs of 16 bits, and 2^e.
struct Blocks {
  Words low, high;
  Words first, second;  // t0 and t1; t2 and t3 (or 0)
  Floats power;
};

/// Bits 16 .. 31 behind the 16 of each seed; four new ones at a time are sums of known ones.
inline Words run_to_32(Words bits) {
  for (int known = 16; known < 32; known += 4) {
    const Words from = bits >> (known - 16);
    bits |= ((from ^ from >> 1 ^ from >> 3 ^ from >> 12) & 15u) << known;
  }
  return bits;
}

/// Bits 32 .. 39, or up to 63: by the square of the polynomial, b_t+32 = b_t + b_t+2 + b_t+6 + b_t+24, eight at a time.
template <int Terms>
inline Words run_to_64(Words low) {
  Words high = (low ^ low >> 2 ^ low >> 6 ^ low >> 24) & 255u;
  if constexpr (Terms == 4) {
    high |= ((low >> 8 ^ low >> 10 ^ low >> 14 ^ high) & 255u) << 8;
    high |= ((low >> 16 ^ low >> 18 ^ low >> 22 ^ high >> 8) & 255u) << 16;
    high |= (low >> 24 ^ (low >> 26 | high << 6) ^ (low >> 30 | high << 2) ^ high >> 16) << 24;
  }
  return high;
}

/// Words `index * stride` of a table for each lane.
inline Words gather(const uint32_t* table, Words index, int stride) {
#if defined(__AVX512VNNI__)
  return (Words)_mm512_i32gather_epi32((__m512i)(index * static_cast<uint32_t>(stride)), table, 4);
#elif defined(__AVX2__)
  return (Words)_mm256_i32gather_epi32((const int*)table, (__m256i)(index * static_cast<uint32_t>(stride)), 4);
#else
  Words found;
  for (int i = 0; i < kWidth; ++i) found[i] = table[index[i] * stride];
  return found;
#endif
}

/// e of the lanes of vector `v` with 3 bits: rows 0-7 are the low halves of the 8 bytes, rows 8-15 the high ones.
inline Words exponents(const uint8_t* bytes, int v) {
  typedef uint8_t Eight __attribute__((vector_size(8)));
  Eight pair;
  std::memcpy(&pair, bytes, sizeof pair);
  const Eight low = pair & 15, high = pair >> 4;
#if defined(__AVX512VNNI__)
  (void)v;
  return __builtin_convertvector(
      __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), Words);
#elif defined(__AVX2__)
  return __builtin_convertvector(v == 0 ? low : high, Words);
#else
  const Eight half = v < 2 ? low : high;
  return v % 2 == 0 ? __builtin_convertvector(__builtin_shufflevector(half, half, 0, 1, 2, 3), Words)
                    : __builtin_convertvector(__builtin_shufflevector(half, half, 4, 5, 6, 7), Words);
#endif
}

/// 4 bits from `shift` on, signed, in the low 16 bits.
inline Words signed_nibble(Words words, int shift) {
  return (Words)((Ints)(words << (28 - shift)) >> 28) & 0xffffu;
}

template <int Terms, bool Table>
inline Blocks read_blocks(const uint8_t* unit, int v, int offset, const uint32_t* table) {
  const Words words = load_words(unit + 4 * kWidth * v), seeds = words & 0xffffu;
  Blocks blocks;
  if constexpr (Table) {
    constexpr int kStride = Terms == 3 ? 1 : 2;
    const Words next = gather(table, seeds, kStride);
    blocks.low = seeds | next << 16;
    blocks.high = next >> 16;
    if constexpr (Terms == 4) blocks.high |= gather(table + 1, seeds, kStride) << 16;
  } else {
    blocks.low = run_to_32(seeds);
    blocks.high = run_to_64<Terms>(blocks.low);
  }
  blocks.first = signed_nibble(words, 16) | signed_nibble(words, 20) << 16;
  blocks.second = signed_nibble(words, 24);
  if constexpr (Terms == 4) blocks.second |= signed_nibble(words, 28) << 16;
  const Words e = Terms == 3 ? words >> 28 : exponents(unit + 4 * kSeedRows, v);
  blocks.power = (Floats)((e + static_cast<uint32_t>(offset + 127)) << 23);
  return blocks;
}

/// sum + the products of both signed halves of each lane.
inline Ints dot_halves(Ints sum, Words a, Words b) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const Ints low = ((Ints)(a << 16) >> 16) * ((Ints)(b << 16) >> 16);
  return sum + low + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

/// Input `c` of every block, in units of power / (2^15 - 1): exact, below 2^20.
template <int Terms>
inline Floats weight(const Blocks& blocks, int c) {
  const int start = c * Terms + 1;
  Words from;
  if (start >= 32) {
    from = blocks.high >> (start - 32);
  } else {
    from = blocks.low >> start | blocks.high << (32 - start);
  }
  const Words pair = ((from & 0xffffu) | (from << 15 & 0xffff0000u)) ^ kTop;
  const Words rest = from >> 2;
  const Words last = Terms == 3 ? rest ^ kTop : ((rest & 0xffffu) | (rest << 15 & 0xffff0000u)) ^ kTop;
  return to_float(dot_halves(dot_halves(Ints{}, pair, blocks.first), last, blocks.second));
}

void store(Floats sums, int64_t row, int64_t rows, float* y) {
  sums *= 1.0f / 32767.0f;
  const int64_t count = rows - row < kWidth ? rows - row : kWidth;
  if (count > 0) std::memcpy(y + row, &sums, count * sizeof(float));
}

/// Weights of the band, (inputs, 16), in units of 1 / (2^15 - 1).
template <int Terms, bool Table>
void regenerate(const SeedMatrix& matrix, const uint8_t* unit, const uint32_t* table, float* panel) {
  constexpr int kInputs = Terms == 3 ? 8 : 12;
  for (int64_t b = 0; b < matrix.row_blocks(); ++b, unit += matrix.unit_bytes(), panel += kInputs * kSeedRows) {
    for (int v = 0; v < kBandVectors; ++v) {
      const Blocks blocks = read_blocks<Terms, Table>(unit, v, matrix.offset, table);
#pragma GCC unroll 12
      for (int c = 0; c < kInputs; ++c) {
        const Floats w = weight<Terms>(blocks, c) * blocks.power;
        std::memcpy(panel + c * kSeedRows + v * kWidth, &w, sizeof w);
      }
    }
  }
}

/// y of a band and one token without storing the weights.
template <int Terms, bool Table>
void multiply_one(const SeedMatrix& matrix, const uint8_t* unit, const uint32_t* table, const float* x, int64_t row,
                  float* y) {
  constexpr int kInputs = Terms == 3 ? 8 : 12;
  Floats sums[kBandVectors] = {};
  float tail[kInputs] = {};
  for (int64_t start = 0; start < matrix.columns; start += kInputs, unit += matrix.unit_bytes()) {
    const float* inputs = x + start;
    if (matrix.columns - start < kInputs) {
      std::memcpy(tail, inputs, (matrix.columns - start) * sizeof(float));
      inputs = tail;
    }
    for (int v = 0; v < kBandVectors; ++v) {
      const Blocks blocks = read_blocks<Terms, Table>(unit, v, matrix.offset, table);
#pragma GCC unroll 12
      for (int c = 0; c < kInputs; ++c) {
        sums[v] = fused(weight<Terms>(blocks, c) * blocks.power, inputs[c], sums[v]);
      }
    }
  }
  for (int v = 0; v < kBandVectors; ++v) store(sums[v], row + v * kWidth, matrix.rows, y);
}

/// y of a band whose weights are in the panel, for `Tokens` tokens.
template <int Tokens>
void multiply_panel(const SeedMatrix& matrix, const float* panel, const float* x, int64_t row, float* y) {
  Floats sums[Tokens][kBandVectors] = {};
  for (int64_t k = 0; k < matrix.columns; ++k, panel += kSeedRows) {
    for (int v = 0; v < kBandVectors; ++v) {
      Floats w;
      std::memcpy(&w, panel + v * kWidth, sizeof w);
      for (int t = 0; t < Tokens; ++t) sums[t][v] = fused(w, x[t * matrix.columns + k], sums[t][v]);
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    for (int v = 0; v < kBandVectors; ++v) store(sums[t][v], row + v * kWidth, matrix.rows, y + t * matrix.rows);
  }
}

template <int Terms, bool Table>
void multiply_range(const SeedMatrix& matrix, const float* x, int64_t tokens, int64_t first, int64_t last, float* y,
                    const uint32_t* table, float* panel) {
  for (int64_t band = first; band < last; ++band) {
    const uint8_t* unit = matrix.codes + band * matrix.row_blocks() * matrix.unit_bytes();
    const int64_t row = band * kSeedRows;
    if (tokens < kPanelTokens) {
      for (int64_t t = 0; t < tokens; ++t) {
        multiply_one<Terms, Table>(matrix, unit, table, x + t * matrix.columns, row, y + t * matrix.rows);
      }
      continue;
    }
    regenerate<Terms, Table>(matrix, unit, table, panel);
    int64_t t = 0;
    for (; t + kTokens <= tokens; t += kTokens) {
      multiply_panel<kTokens>(matrix, panel, x + t * matrix.columns, row, y + t * matrix.rows);
    }
    for (; t < tokens; ++t) multiply_panel<1>(matrix, panel, x + t * matrix.columns, row, y + t * matrix.rows);
  }
}

void multiply_tokens(const SeedMatrix& matrix, const float* x, int64_t tokens, int64_t first, int64_t last, float* y,
              const uint32_t* table, float* panel) {
  if (matrix.bits == 4) {
    table ? multiply_range<3, true>(matrix, x, tokens, first, last, y, table, panel)
          : multiply_range<3, false>(matrix, x, tokens, first, last, y, table, panel);
  } else {
    table ? multiply_range<4, true>(matrix, x, tokens, first, last, y, table, panel)
          : multiply_range<4, false>(matrix, x, tokens, first, last, y, table, panel);
  }
}

}  // namespace

namespace lilliput {

const SeedLinearTiles LILLIPUT_TILES{multiply_tokens};

}  // namespace lilliput

// The inner loops of lookup_linear; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "lookup_linear_tiles.hpp"

#include "lanes.hpp"

namespace {

using namespace lilliput;

constexpr int kBytes = 4 * kWidth;                      // of a vector
constexpr int kSums = kLookupRows / (2 * kWidth);       // vectors of 16-bit sums of a block
constexpr int kFloats = kLookupRows / kWidth;           // vectors of 32-bit sums
constexpr int kMaxTokens = kWidth == 16 ? 4 : kWidth == 8 ? 2 : 1;

typedef uint8_t Octets __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes)));
typedef int16_t SignedHalves __attribute__((vector_size(kBytes)));

// --- tables ------------------------------------------------------------------------------------------------------

constexpr int kEntryVectors = kTableEntries / kWidth;
constexpr float kTiny = 1e-30f;  // below it 127 / largest could overflow
constexpr float kRound = 12582912.0f + 128.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
constexpr uint32_t kInfinity = 0x7f800000u;

/// +1 or -1 for each entry, by a bit of its number.
alignas(64) constexpr float kSigns[kTableInputs][kTableEntries] = {
    {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
    {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
    {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
    {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1},
};

/// The sums of `count` tables; returns their largest magnitude as bits (NaN and infinity are above all numbers).
inline uint32_t add_up(const float* inputs, int count, Floats (*entries)[kEntryVectors], float* sum) {
  Floats signs[kTableInputs][kEntryVectors], total = {};
  std::memcpy(signs, kSigns, sizeof signs);
  Words largest[kEntryVectors] = {};
  for (int t = 0; t < count; ++t, inputs += kTableInputs) {
    for (int v = 0; v < kEntryVectors; ++v) {
      Floats e = inputs[0] * signs[0][v];
      for (int i = 1; i < kTableInputs; ++i) e = fused(signs[i][v], inputs[i], e);  // +-1: rounded once in any case
      entries[t][v] = e;
      const Words magnitude = (Words)e & 0x7fffffffu;
      largest[v] = magnitude > largest[v] ? magnitude : largest[v];
    }
    total += entries[t][kEntryVectors - 1];
  }
  *sum = total[kWidth - 1];  // the last entry of a table is the plain sum
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  for (int v = 1; v < kEntryVectors; ++v) largest[0] = larger(largest[0], largest[v]);
  return reduce<kWidth>(largest[0], larger);
}

/// The lowest byte of each lane.
inline void store_low_bytes(Words lanes, uint8_t* to) {
#if defined(__AVX512VNNI__)
  _mm_store_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)lanes));
#elif defined(__AVX2__)
  const __m256i first = _mm256_set1_epi32(0x0c080400), together = _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8((__m256i)lanes, first), together);
  _mm_storel_epi64((__m128i*)to, _mm256_castsi256_si128(bytes));
#else
  for (int i = 0; i < kWidth; ++i) to[i] = static_cast<uint8_t>(lanes[i]);
#endif
}

void make_tables(const float* inputs, int count, LookupPiece& piece) {
  Floats entries[kPieceTables][kEntryVectors];
  const uint32_t bits = add_up(inputs, count, entries, &piece.sum);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  if (bits >= kInfinity || largest <= kTiny) {
    std::memset(piece.tables, 128, sizeof piece.tables);
    piece.half_step = bits >= kInfinity ? __builtin_nanf("") : 0.0f;
    return;
  }
  const float inverse = 127.0f / largest;
  for (int t = 0; t < count; ++t) {
    for (int v = 0; v < kEntryVectors; ++v) {
      store_low_bytes((Words)(entries[t][v] * inverse + kRound), piece.tables[t] + v * kWidth);
    }
  }
  piece.half_step = largest / 254.0f;
}

void prepare_tokens(const LookupMatrix& matrix, const float* x, int64_t tokens, LookupPiece* pieces) {
  constexpr int64_t kInputs = kPieceTables * kTableInputs;
  for (const float* end = x + tokens * matrix.columns; x != end; x += matrix.group) {
    for (int64_t i = 0; i < matrix.group; i += kInputs) {
      if (matrix.group - i >= kInputs) {
        make_tables(x + i, kPieceTables, *pieces++);
      } else {
        float inputs[kInputs] = {};
        std::memcpy(inputs, x + i, (matrix.group - i) * sizeof(float));
        make_tables(inputs, static_cast<int>((matrix.group - i + 7) / 8 * 2), *pieces++);
      }
    }
  }
}

// --- looking up --------------------------------------------------------------------------------------------------

/// One table in every 16 bytes.
inline Octets load_table(const uint8_t* table) {
#if defined(__AVX512VNNI__)
  return (Octets)_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table));
#elif defined(__AVX2__)
  return (Octets)_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
#else
  Octets loaded;
  std::memcpy(&loaded, table, sizeof loaded);
  return loaded;
#endif
}

/// The entries that the low (or high) four bits of each byte choose.
template <bool High>
inline Octets look_up(Octets table, Octets packed) {
#if defined(__AVX2__)
  const Octets index = (High ? (Octets)((Halves)packed >> 4) : packed) & 15;
#if defined(__AVX512VNNI__)
  return (Octets)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#else
  return (Octets)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#endif
#else
  uint8_t entries[kBytes], codes[kBytes];
  std::memcpy(entries, &table, kBytes);
  std::memcpy(codes, &packed, kBytes);
  for (uint8_t& code : codes) code = entries[High ? code >> 4 : code & 15];
  std::memcpy(&packed, codes, kBytes);
  return packed;
#endif
}

/// 2^Plane times the first byte plus 2^(Plane+1) times the second byte of each 16 bits.
template <int Plane>
inline Halves add_planes(Octets entries) {
#if defined(__AVX512VNNI__)
  return (Halves)_mm512_maddubs_epi16((__m512i)entries, _mm512_set1_epi16((2 << Plane << 8) + (1 << Plane)));
#elif defined(__AVX2__)
  return (Halves)_mm256_maddubs_epi16((__m256i)entries, _mm256_set1_epi16((2 << Plane << 8) + (1 << Plane)));
#else
  const Halves both = (Halves)entries;
  return ((both & 255) << Plane) + (both >> 8 << (Plane + 1));
#endif
}

inline Octets load_octets(const uint8_t* from) {
  Octets loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

/// The sums of a piece for the rows of a block: 16 bits with wrap-around, exact once the 128s of all entries are taken off.
template <int Bits, int Tokens>
struct Sums {
  Halves rows[Tokens][kSums];
  Halves whole[Tokens][kSums / 2], odd[Tokens][kSums / 2];  // of a plane alone: as 16 bits, and of their upper bytes

  explicit Sums(int tables) {
    const uint16_t start = static_cast<uint16_t>(-128 * ((1 << Bits) - 1) * tables);
    for (int t = 0; t < Tokens; ++t) {
      for (Halves& sum : rows[t]) sum = start - Halves{};
      for (int v = 0; v < kSums / 2; ++v) whole[t][v] = odd[t][v] = Halves{};
    }
  }

  template <int Plane>
  inline void add_pair(const uint8_t* codes, const Octets (&low)[Tokens], const Octets (&high)[Tokens]) {
    for (int v = 0; v < kSums; ++v) {
      const Octets packed = load_octets(codes + Plane * kLookupRows + v * kBytes);
      for (int t = 0; t < Tokens; ++t) {
        rows[t][v] += add_planes<Plane>(look_up<false>(low[t], packed));
        rows[t][v] += add_planes<Plane>(look_up<true>(high[t], packed));
      }
    }
  }

  inline void add_last(const uint8_t* codes, const Octets (&low)[Tokens], const Octets (&high)[Tokens]) {
    for (int v = 0; v < kSums / 2; ++v) {
      const Octets packed = load_octets(codes + (Bits - 1) * kLookupRows + v * kBytes);
      for (int t = 0; t < Tokens; ++t) {
        const Halves first = (Halves)look_up<false>(low[t], packed), second = (Halves)look_up<true>(high[t], packed);
        whole[t][v] += first + second;
        odd[t][v] += (first >> 8) + (second >> 8);
      }
    }
  }

  /// Two tables: `codes` are the next `Bits` vectors.
  inline void add(const uint8_t* codes, const uint8_t* const (&tables)[Tokens]) {
    Octets low[Tokens], high[Tokens];
    for (int t = 0; t < Tokens; ++t) {
      low[t] = load_table(tables[t]);
      high[t] = load_table(tables[t] + kTableEntries);
    }
    if constexpr (Bits >= 2) add_pair<0>(codes, low, high);
    if constexpr (Bits == 4) add_pair<2>(codes, low, high);
    if constexpr (Bits % 2) add_last(codes, low, high);
  }

  inline void finish() {
    if constexpr (Bits % 2) {
      for (int t = 0; t < Tokens; ++t) {
        for (int v = 0; v < kSums / 2; ++v) {
          rows[t][v] += (whole[t][v] - (odd[t][v] << 8)) << (Bits - 1);
          rows[t][v + kSums / 2] += odd[t][v] << (Bits - 1);
        }
      }
    }
  }

  /// 32-bit vector `v` of a token's rows.
  inline Floats values(int t, int v) const {
    const auto half = std::make_index_sequence<kWidth>();
    const SignedHalves both = (SignedHalves)rows[t][v / 2];
    return to_float(__builtin_convertvector(v % 2 ? upper_half(both, half) : lower_half(both, half), Ints));
  }
};

/// y of `Tokens` tokens and one block.
template <int Bits, int Tokens>
void tile(const LookupMatrix& matrix, int64_t block, const LookupPiece* pieces, float* y) {
  const int64_t stride = matrix.pieces(), groups = matrix.groups();
  const uint8_t* codes = matrix.codes + block * matrix.block_bytes();
  const uint16_t* grid = matrix.grid + block * matrix.block_grid();
  Floats sums[Tokens][kFloats] = {};
  for (int64_t g = 0; g < groups; ++g, grid += 2 * kLookupRows) {
    Floats parts[Tokens][kFloats] = {};
    float inputs[Tokens] = {};
    for (int64_t left = matrix.tables_per_group(); left > 0; left -= kPieceTables, ++pieces) {
      const int count = static_cast<int>(left < kPieceTables ? left : kPieceTables);
      Sums<Bits, Tokens> found(count);
      for (int table = 0; table < count; table += 2, codes += Bits * kLookupRows) {
        const uint8_t* tables[Tokens];
        for (int t = 0; t < Tokens; ++t) tables[t] = pieces[t * stride].tables[table];
        found.add(codes, tables);
      }
      found.finish();
      for (int t = 0; t < Tokens; ++t) {
        const LookupPiece& piece = pieces[t * stride];
        inputs[t] += piece.sum;
        for (int v = 0; v < kFloats; ++v) parts[t][v] = fused(found.values(t, v), piece.half_step, parts[t][v]);
      }
    }
    for (int v = 0; v < kFloats; ++v) {
      const Floats scale = load_bfloat16(grid + v * kWidth), zero = load_bfloat16(grid + kLookupRows + v * kWidth);
      for (int t = 0; t < Tokens; ++t) {
        sums[t][v] = fused(parts[t][v] - 0.5f * inputs[t], scale, sums[t][v]);
        sums[t][v] = fused(zero, inputs[t], sums[t][v]);
      }
    }
  }
  const int64_t first = block * kLookupRows, rows = matrix.rows - first < kLookupRows ? matrix.rows - first : kLookupRows;
  for (int t = 0; t < Tokens; ++t) std::memcpy(y + t * matrix.rows + first, sums[t], rows * sizeof(float));
}

template <int Bits, int Tokens = kMaxTokens>
void multiply_block(const LookupMatrix& matrix, int64_t block, const LookupPiece* pieces, int64_t tokens, float* y) {
  for (; tokens >= Tokens; tokens -= Tokens, pieces += Tokens * matrix.pieces(), y += Tokens * matrix.rows) {
    tile<Bits, Tokens>(matrix, block, pieces, y);
  }
  if constexpr (Tokens > 1) {
    if (tokens) multiply_block<Bits, Tokens - 1>(matrix, block, pieces, tokens, y);
  }
}

void multiply_tokens(const LookupMatrix& matrix, const LookupPiece* pieces, int64_t tokens, int64_t first, int64_t last,
                     float* y) {
  for (int64_t block = first; block < last; ++block) {
    if (matrix.bits == 4) multiply_block<4>(matrix, block, pieces, tokens, y);
    if (matrix.bits == 3) multiply_block<3>(matrix, block, pieces, tokens, y);
    if (matrix.bits == 2) multiply_block<2>(matrix, block, pieces, tokens, y);
    if (matrix.bits == 1) multiply_block<1>(matrix, block, pieces, tokens, y);
  }
}

}  // namespace

namespace lilliput {

const LookupLinearTiles LILLIPUT_TILES{prepare_tokens, multiply_tokens};

}  // namespace lilliput

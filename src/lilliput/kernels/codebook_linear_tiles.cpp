// The inner loops of codebook_linear; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "codebook_linear_tiles.hpp"

#include "quads.hpp"

namespace {

using namespace lilliput;

constexpr int kMaxTokens = kWidth == 16 ? 4 : kWidth == 8 ? 2 : 1;  // whose sums the registers hold beside two blocks'
constexpr int kMaxBlocks = kWidth == 16 ? 2 : 1;
constexpr int64_t kPanelTokens = 16;  // from which on weights are looked up once for all tokens
// Of table entries in registers: the dot product of AVX-512 takes its first factor without sign.
constexpr uint32_t kMoved = kWidth == 16 ? 0x80808080u : 0;

/// The tables of a block's vectors, one 16 bytes for each 4 lanes.
struct Tables {
  Words vectors[kVectors];
};

Tables load_tables(const CodebookMatrix& matrix, int64_t block) {
  Tables tables;
  const int8_t* from = matrix.tables + (matrix.shared ? 0 : block * (kBlockRows / kTableRows) * kTableBytes);
  for (int64_t i = 0; i < kBlockRows / kTableRows; ++i) {
    std::memcpy(reinterpret_cast<char*>(&tables) + i * kTableBytes, from + (matrix.shared ? 0 : i * kTableBytes),
                kTableBytes);
  }
  for (Words& vector : tables.vectors) vector ^= kMoved;
  return tables;
}

/// Where the table of each of 4 rows begins in their 16 bytes, in every byte of a lane.
template <int Bits>
inline Words table_starts() {
  Words starts;
  for (int i = 0; i < kWidth; ++i) starts[i] = (i % 4 / (1 << (Bits - 2)) << Bits) * 0x01010101u;
  return starts;
}

/// Each byte replaced by the entry that it points to among the 16 of its 4 lanes.
inline Words look_up(Words table, Words bytes) {
#if defined(__AVX512VNNI__)
  return (Words)_mm512_shuffle_epi8((__m512i)table, (__m512i)bytes);
#elif defined(__AVX2__)
  return (Words)_mm256_shuffle_epi8((__m256i)table, (__m256i)bytes);
#else
  uint8_t entries[sizeof table], places[sizeof bytes];
  std::memcpy(entries, &table, sizeof table);
  std::memcpy(places, &bytes, sizeof bytes);
  for (uint8_t& place : places) place = entries[place];
  std::memcpy(&bytes, places, sizeof bytes);
  return bytes;
#endif
}

/// sum + the products of four entries of each lane with four signed bytes; the sum begins with `first_sum`.
inline Ints dot_entries(Ints sum, Words entries, int32_t four) {
#if defined(__AVX512VNNI__)
  return dot<8>(sum, entries, four);
#elif defined(__AVX2__)
  const __m256i w = (__m256i)entries, x = _mm256_set1_epi32(four);  // 2 * 127 * 127 fits into 16 bits
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int i = 0; i < 4; ++i) {
    const Ints w = (Ints)(entries << (24 - 8 * i)) >> 24;
    sum += w * static_cast<int8_t>(static_cast<uint32_t>(four) >> (8 * i));
  }
  return sum;
#endif
}

inline Ints first_sum(const Piece& piece) { return kMoved ? splat(piece.minus_sum) << 7 : Ints{}; }

/// Four weights of each lane: looked up (Layout == bits), or as they lie in a panel (Layout == 8).
template <int Layout>
inline Words entries(const uint8_t* chunk, int quad_index, Words table) {
  const Words codes = quad<Layout>(chunk, quad_index);
  if constexpr (Layout == 8) return codes;
  if constexpr (Layout == 4) return look_up(table, codes);
  return look_up(table, codes | table_starts<Layout == 8 ? 4 : Layout>());
}

/// A byte for each weight of a block: chunk after chunk, quad after quad.
template <int Bits>
void spread(const CodebookMatrix& matrix, int64_t block, uint8_t* panel) {
  const PackedMatrix packed = matrix.packed();
  const Tables tables = load_tables(matrix, block);
  const uint8_t* chunk = matrix.codes + block * packed.block_bytes();
  for (int64_t c = 0; c < packed.chunks(); ++c, chunk += Bits * kVectorBytes) {
    for (int i = 0; i < kQuads; ++i, panel += kVectorBytes) {
      for (int v = 0; v < kVectors; ++v) {
        const Words bytes = entries<Bits>(chunk + 4 * kWidth * v, i, tables.vectors[v]);
        std::memcpy(panel + 4 * kWidth * v, &bytes, sizeof bytes);
      }
    }
  }
}

/// y of `Tokens` tokens and `Blocks` blocks, whose codes or entries begin at `chunk`.
template <int Layout, int Tokens, int Blocks>
void tile(const CodebookMatrix& matrix, const uint8_t* chunk, int64_t block_bytes, int64_t block, const Piece* pieces,
          float* y) {
  constexpr int kCount = Blocks * kVectors;
  const int64_t stride = matrix.packed().pieces(), groups = matrix.groups();
  const int64_t per_group = (matrix.group + kPieceInputs - 1) / kPieceInputs, block_scale = groups * kBlockRows;
  const uint16_t* scale = matrix.scale + block * block_scale;
  Tables tables[Blocks];
  for (int b = 0; b < Blocks; ++b) tables[b] = load_tables(matrix, block + b);
  Floats sums[Tokens][kCount] = {};
  for (int64_t g = 0; g < groups; ++g, scale += kBlockRows) {
    Floats parts[Tokens][kCount] = {};
    for (int64_t p = 0; p < per_group; ++p, ++pieces, chunk += Layout * kVectorBytes) {
      Ints dots[Tokens][kCount];
      for (int t = 0; t < Tokens; ++t) {
        for (int v = 0; v < kCount; ++v) dots[t][v] = first_sum(pieces[t * stride]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kQuads; ++i) {
        for (int v = 0; v < kCount; ++v) {
          const uint8_t* from = chunk + (v / kVectors) * block_bytes + (v % kVectors) * 4 * kWidth;
          const Words bytes = entries<Layout>(from, i, tables[v / kVectors].vectors[v % kVectors]);
          for (int t = 0; t < Tokens; ++t) {
            int32_t four;
            std::memcpy(&four, pieces[t * stride].codes + 4 * i, sizeof four);
            dots[t][v] = dot_entries(dots[t][v], bytes, four);
          }
        }
      }
      for (int t = 0; t < Tokens; ++t) {
        for (int v = 0; v < kCount; ++v) {
          parts[t][v] = fused(to_float(dots[t][v]), pieces[t * stride].scale, parts[t][v]);
        }
      }
    }
    for (int v = 0; v < kCount; ++v) {
      const Floats steps = load_bfloat16(scale + (v / kVectors) * block_scale + (v % kVectors) * kWidth);
      for (int t = 0; t < Tokens; ++t) sums[t][v] = fused(parts[t][v], steps, sums[t][v]);
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    for (int v = 0; v < kCount; ++v) {
      store_rows(sums[t][v], block * kBlockRows + v * kWidth, matrix.rows, y + t * matrix.rows);
    }
  }
}

template <int Layout, int Blocks, int Tokens = kMaxTokens>
void tiles(const CodebookMatrix& matrix, const uint8_t* chunk, int64_t block_bytes, int64_t block, const Piece* pieces,
           int64_t tokens, float* y) {
  const int64_t stride = matrix.packed().pieces();
  for (; tokens >= Tokens; tokens -= Tokens, pieces += Tokens * stride, y += Tokens * matrix.rows) {
    tile<Layout, Tokens, Blocks>(matrix, chunk, block_bytes, block, pieces, y);
  }
  if constexpr (Tokens > 1) {
    if (tokens) tiles<Layout, Blocks, Tokens - 1>(matrix, chunk, block_bytes, block, pieces, tokens, y);
  }
}

template <int Bits, int Blocks>
void multiply_blocks(const CodebookMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t block, float* y,
                     uint8_t* panel) {
  const PackedMatrix packed = matrix.packed();
  if (tokens < kPanelTokens) {
    const uint8_t* codes = matrix.codes + block * packed.block_bytes();
    return tiles<Bits, Blocks>(matrix, codes, packed.block_bytes(), block, pieces, tokens, y);
  }
  const int64_t spread_bytes = packed.chunks() * 8 * kVectorBytes;
  for (int i = 0; i < Blocks; ++i) spread<Bits>(matrix, block + i, panel + i * spread_bytes);
  tiles<8, Blocks>(matrix, panel, spread_bytes, block, pieces, tokens, y);
}

template <int Bits>
void multiply_range(const CodebookMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first, int64_t last,
                    float* y, uint8_t* panel) {
  for (; first + kMaxBlocks <= last; first += kMaxBlocks) {
    multiply_blocks<Bits, kMaxBlocks>(matrix, pieces, tokens, first, y, panel);
  }
  for (; first < last; ++first) multiply_blocks<Bits, 1>(matrix, pieces, tokens, first, y, panel);
}

void multiply_tokens(const CodebookMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first, int64_t last,
                     float* y, uint8_t* panel) {
  if (matrix.bits == 4) multiply_range<4>(matrix, pieces, tokens, first, last, y, panel);
  if (matrix.bits == 3) multiply_range<3>(matrix, pieces, tokens, first, last, y, panel);
  if (matrix.bits == 2) multiply_range<2>(matrix, pieces, tokens, first, last, y, panel);
}

}  // namespace

namespace lilliput {

const CodebookLinearTiles LILLIPUT_TILES{multiply_tokens};

}  // namespace lilliput

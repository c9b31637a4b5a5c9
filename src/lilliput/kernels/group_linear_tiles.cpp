// The inner loops of group_linear; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "group_linear_tiles.hpp"

#include "quads.hpp"

namespace {

using namespace lilliput;

constexpr int kMaxTokens = kWidth == 16 ? 5 : kWidth == 8 ? 2 : 1;  // whose sums the registers hold beside two blocks'
constexpr int kMaxBlocks = kWidth == 16 ? 2 : 1;
constexpr int64_t kPanelTokens = 32;  // from which on codes are spread out once for all tokens

// --- activations -------------------------------------------------------------------------------------------------

constexpr int kPieceVectors = kPieceInputs / kWidth;
constexpr float kTiny = 1e-30f;         // below it 127 / largest could overflow
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
constexpr uint32_t kInfinity = 0x7f800000u;

/// Lanes of a piece by `combine`, in halves.
template <class Lanes, class Combine>
inline auto reduce_piece(Lanes (&lanes)[kPieceVectors], Combine combine) {
  for (int half = kPieceVectors / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  }
  return reduce<kWidth>(lanes[0], combine);
}

void round_piece(const float* inputs, Piece& piece) {
  Floats x[kPieceVectors], sums[kPieceVectors];
  Words magnitudes[kPieceVectors];
  std::memcpy(x, inputs, sizeof x);
  std::memcpy(sums, x, sizeof x);
  for (int i = 0; i < kPieceVectors; ++i) magnitudes[i] = (Words)x[i] & 0x7fffffffu;
  piece.sum = reduce_piece(sums, [](auto a, auto b) { return a + b; });
  // As integers, NaN and infinity are above all numbers.
  const uint32_t bits = reduce_piece(magnitudes, [](auto a, auto b) { return a > b ? a : b; });
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  if (bits >= kInfinity || largest <= kTiny) {
    std::memset(piece.codes, 0, sizeof piece.codes);
    piece.scale = bits >= kInfinity ? __builtin_nanf("") : 0.0f;
    piece.minus_sum = 0;
    return;
  }
  const float inverse = 127.0f / largest;
  Ints codes[kPieceVectors];
  for (int i = 0; i < kPieceVectors; ++i) {
    const Floats moved = x[i] * inverse + kRound;
    codes[i] = (Ints)moved - (Ints)(kRound - Floats{});
    const Bytes bytes = __builtin_convertvector(codes[i], Bytes);
    std::memcpy(piece.codes + i * kWidth, &bytes, sizeof bytes);
  }
  piece.scale = largest / 127.0f;
  piece.minus_sum = -reduce_piece(codes, [](auto a, auto b) { return a + b; });
}

void prepare_tokens(const PackedMatrix& matrix, const float* x, int64_t tokens, Piece* pieces) {
  for (int64_t token = 0; token < tokens; ++token, x += matrix.columns) {
    for (int64_t start = 0; start < matrix.columns; start += matrix.group) {
      for (int64_t i = 0; i < matrix.group; i += kPieceInputs) {
        if (matrix.group - i >= kPieceInputs) {
          round_piece(x + start + i, *pieces++);
        } else {
          float inputs[kPieceInputs] = {};
          std::memcpy(inputs, x + start + i, (matrix.group - i) * sizeof(float));
          round_piece(inputs, *pieces++);
        }
      }
    }
  }
}

// --- weights -----------------------------------------------------------------------------------------------------

/// A byte for each code of a block: chunk after chunk, quad after quad.
template <int Bits>
void spread(const PackedMatrix& matrix, int64_t block, uint8_t* panel) {
  const uint8_t* chunk = matrix.codes + block * matrix.block_bytes();
  for (int64_t c = 0; c < matrix.chunks(); ++c, chunk += Bits * kVectorBytes) {
    for (int i = 0; i < kQuads; ++i, panel += kVectorBytes) {
      for (int v = 0; v < kVectors; ++v) {
        const Words codes = quad<Bits>(chunk + 4 * kWidth * v, i);
        std::memcpy(panel + 4 * kWidth * v, &codes, sizeof codes);
      }
    }
  }
}

/// Where a tile reads its codes: in the matrix (Layout == bits) or spread out in a panel (Layout == 8).
struct Source {
  const uint8_t* codes;
  int64_t block_bytes;
};

// --- products ----------------------------------------------------------------------------------------------------

/// sums += (codes - 2^(Bits-1)) . piece over the first `quads` quads, in units of the piece's scale.
template <int Layout, int Bits>
inline Ints dot_piece(const uint8_t* chunk, const Piece& piece, int quads = kQuads) {
  Ints sum = splat(piece.minus_sum) << (Bits - 1);
  for (int i = 0; i < quads; ++i) {
    int32_t four;
    std::memcpy(&four, piece.codes + 4 * i, sizeof four);
    sum = dot<Bits>(sum, quad<Layout>(chunk, i), four);
  }
  return sum;
}

/// y of `Tokens` tokens and `Blocks` blocks where each group takes whole chunks.
template <int Layout, int Bits, int Tokens, int Blocks>
void tile(const PackedMatrix& matrix, Source source, int64_t block, const Piece* pieces, float* y) {
  constexpr int kCount = Blocks * kVectors;
  const int64_t stride = matrix.pieces(), groups = matrix.groups(), per_group = matrix.pieces_per_group();
  const int64_t block_grid = matrix.block_grid();
  const uint8_t* chunk = source.codes;
  const uint16_t* grid = matrix.grid + block * block_grid;
  Floats sums[Tokens][kCount] = {};
  for (int64_t g = 0; g < groups; ++g, grid += (Bits == 8 ? 1 : 2) * kBlockRows) {
    Floats parts[Tokens][kCount] = {};
    float inputs[Tokens] = {};
    for (int64_t p = 0; p < per_group; ++p, ++pieces, chunk += Layout * kVectorBytes) {
      Ints dots[Tokens][kCount];
      for (int t = 0; t < Tokens; ++t) {
        for (int v = 0; v < kCount; ++v) dots[t][v] = splat(pieces[t * stride].minus_sum) << (Bits - 1);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kQuads; ++i) {
        for (int v = 0; v < kCount; ++v) {
          const uint8_t* from = chunk + (v / kVectors) * source.block_bytes + (v % kVectors) * 4 * kWidth;
          const Words codes = quad<Layout>(from, i);
          for (int t = 0; t < Tokens; ++t) {
            int32_t four;
            std::memcpy(&four, pieces[t * stride].codes + 4 * i, sizeof four);
            dots[t][v] = dot<Bits>(dots[t][v], codes, four);
          }
        }
      }
      for (int t = 0; t < Tokens; ++t) {
        const Piece& piece = pieces[t * stride];
        inputs[t] += piece.sum;
        for (int v = 0; v < kCount; ++v) parts[t][v] = fused(to_float(dots[t][v]), piece.scale, parts[t][v]);
      }
    }
    for (int v = 0; v < kCount; ++v) {
      const uint16_t* from = grid + (v / kVectors) * block_grid + (v % kVectors) * kWidth;
      const Floats scale = load_bfloat16(from);
      for (int t = 0; t < Tokens; ++t) sums[t][v] = fused(parts[t][v], scale, sums[t][v]);
      if constexpr (Bits != 8) {
        const Floats zero = load_bfloat16(from + kBlockRows);
        for (int t = 0; t < Tokens; ++t) sums[t][v] = fused(zero, inputs[t], sums[t][v]);
      }
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    for (int v = 0; v < kCount; ++v) {
      store_rows(sums[t][v], block * kBlockRows + v * kWidth, matrix.rows, y + t * matrix.rows);
    }
  }
}

/// y of one token and one block whose codes are spread out; groups may begin at any quad.
template <int Bits>
void ragged_tile(const PackedMatrix& matrix, const uint8_t* panel, int64_t block, const Piece* pieces, float* y) {
  const uint16_t* grid = matrix.grid + block * matrix.block_grid();
  const int64_t group_quads = matrix.padded_group() / 4;
  Floats sums[kVectors] = {};
  for (int64_t g = 0; g < matrix.groups(); ++g, grid += (Bits == 8 ? 1 : 2) * kBlockRows) {
    Floats parts[kVectors] = {};
    float inputs = 0.0f;
    for (int64_t first = 0; first < group_quads; first += kQuads, ++pieces) {
      const int quads = static_cast<int>(group_quads - first < kQuads ? group_quads - first : kQuads);
      const uint8_t* chunk = panel + (g * group_quads + first) * kVectorBytes;
      for (int v = 0; v < kVectors; ++v) {
        const Ints dots = dot_piece<8, Bits>(chunk + 4 * kWidth * v, *pieces, quads);
        parts[v] = fused(to_float(dots), pieces->scale, parts[v]);
      }
      inputs += pieces->sum;
    }
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = fused(parts[v], load_bfloat16(grid + v * kWidth), sums[v]);
      if constexpr (Bits != 8) sums[v] = fused(load_bfloat16(grid + kBlockRows + v * kWidth), inputs, sums[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) store_rows(sums[v], block * kBlockRows + v * kWidth, matrix.rows, y);
}

template <int Layout, int Bits, int Blocks, int Tokens = kMaxTokens>
void tiles(const PackedMatrix& matrix, Source source, int64_t block, const Piece* pieces, int64_t tokens, float* y) {
  for (; tokens >= Tokens; tokens -= Tokens, pieces += Tokens * matrix.pieces(), y += Tokens * matrix.rows) {
    tile<Layout, Bits, Tokens, Blocks>(matrix, source, block, pieces, y);
  }
  if constexpr (Tokens > 1) {
    if (tokens) tiles<Layout, Bits, Blocks, Tokens - 1>(matrix, source, block, pieces, tokens, y);
  }
}

template <int Bits, int Blocks>
void multiply_blocks(const PackedMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t block, float* y,
                     uint8_t* panel) {
  const int64_t spread_bytes = matrix.chunks() * 8 * kVectorBytes;
  const bool spread_out = !matrix.regular() || (Bits != 8 && tokens >= kPanelTokens);
  if (spread_out) {
    for (int i = 0; i < Blocks; ++i) spread<Bits>(matrix, block + i, panel + i * spread_bytes);
  }
  if (!matrix.regular()) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int i = 0; i < Blocks; ++i) {
        ragged_tile<Bits>(matrix, panel + i * spread_bytes, block + i, pieces + t * matrix.pieces(), y + t * matrix.rows);
      }
    }
  } else if (spread_out) {
    tiles<8, Bits, Blocks>(matrix, {panel, spread_bytes}, block, pieces, tokens, y);
  } else {
    const Source source{matrix.codes + block * matrix.block_bytes(), matrix.block_bytes()};
    tiles<Bits, Bits, Blocks>(matrix, source, block, pieces, tokens, y);
  }
}

template <int Bits>
void multiply_range(const PackedMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first, int64_t last,
                    float* y, uint8_t* panel) {
  const bool together = tokens > 1;  // one token waits for memory, which gives a single stream faster than two
  for (; together && first + kMaxBlocks <= last; first += kMaxBlocks) {
    multiply_blocks<Bits, kMaxBlocks>(matrix, pieces, tokens, first, y, panel);
  }
  for (; first < last; ++first) multiply_blocks<Bits, 1>(matrix, pieces, tokens, first, y, panel);
}

void multiply_tokens(const PackedMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first, int64_t last,
                     float* y, uint8_t* panel) {
  if (matrix.bits == 8) multiply_range<8>(matrix, pieces, tokens, first, last, y, panel);
  if (matrix.bits == 4) multiply_range<4>(matrix, pieces, tokens, first, last, y, panel);
  if (matrix.bits == 3) multiply_range<3>(matrix, pieces, tokens, first, last, y, panel);
  if (matrix.bits == 2) multiply_range<2>(matrix, pieces, tokens, first, last, y, panel);
}

}  // namespace

namespace lilliput {

const GroupLinearTiles LILLIPUT_TILES{prepare_tokens, multiply_tokens};

}  // namespace lilliput

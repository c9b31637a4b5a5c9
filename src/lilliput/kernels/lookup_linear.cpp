#include "lookup_linear.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.hpp"
#include "lookup_linear_tiles.hpp"
#include "thread_pool.hpp"

namespace lilliput {
namespace {

constexpr int64_t kTableBytes = 256 * 1024;   // of the tokens that go through all weights together: part of an L2
constexpr int64_t kThreadBytes = 16 * 1024;   // of codes, times tokens: less is not worth another thread
constexpr int64_t kStepsPerThread = 8;

const LookupLinearTiles& tiles() {
#if defined(LILLIPUT_X86)
  switch (isa()) {
    case Isa::avx512:
      return lookup_linear_avx512;
    case Isa::avx2:
      return lookup_linear_avx2;
    default:
      break;
  }
#endif
  return lookup_linear_scalar;
}

int64_t stored_row_bytes(const LookupMatrix& m) { return (m.columns + 7) / 8 * m.bits; }

/// Where the layout keeps a plane of row 0's inputs from `column` on: a bit of a byte of the block.
struct Place {
  int64_t byte;
  int shift;
};

Place place(const LookupMatrix& m, int64_t column, int plane) {
  const int64_t inside = column % m.group;
  const int64_t vectors = column / m.group * m.group_bytes() + inside / 8 * m.bits * kLookupRows;
  const bool alone = plane % 2 == 0 && plane + 1 == m.bits;
  return {vectors + (alone ? plane : plane / 2 * 2) * kLookupRows + (alone ? 0 : plane % 2), static_cast<int>(inside % 8)};
}

/// What a row of a block adds to the byte of row 0.
int64_t row_offset(const LookupMatrix& m, int64_t row, int plane) {
  const bool alone = plane % 2 == 0 && plane + 1 == m.bits;
  return alone ? row % 32 * 2 + row / 32 : row * 2;
}

/// Calls `visit(code's word, its shift in the word, byte of the layout, its shift, plane)` for each bit of a stored row.
template <class Visit>
void each_bit(const LookupMatrix& m, int64_t row, const Visit& visit) {
  for (int plane = 0; plane < m.bits; ++plane) {
    const int64_t start = row / kLookupRows * m.block_bytes() + row_offset(m, row % kLookupRows, plane);
    for (int64_t k = 0; k < m.columns; ++k) {
      const Place to = place(m, k, plane);
      const int64_t bit = k % 8 * m.bits + plane;
      visit(k / 8 * m.bits + bit / 8, static_cast<int>(bit % 8), start + to.byte, to.shift);
    }
  }
}

}  // namespace

void lookup_pack(const LookupMatrix& m, const uint8_t* stored, uint8_t* packed) {
  std::fill_n(packed, m.codes_bytes(), uint8_t{0});
  for (int64_t row = 0; row < m.rows; ++row, stored += stored_row_bytes(m)) {
    each_bit(m, row, [&](int64_t from, int from_shift, int64_t to, int to_shift) {
      packed[to] |= (stored[from] >> from_shift & 1) << to_shift;
    });
  }
}

void lookup_unpack(const LookupMatrix& m, uint8_t* stored) {
  std::fill_n(stored, m.rows * stored_row_bytes(m), uint8_t{0});
  for (int64_t row = 0; row < m.rows; ++row, stored += stored_row_bytes(m)) {
    each_bit(m, row, [&](int64_t from, int from_shift, int64_t to, int to_shift) {
      stored[from] |= (m.codes[to] >> to_shift & 1) << from_shift;
    });
  }
}

void prepare(const LookupMatrix& matrix, const float* x, int64_t tokens, LookupPiece* pieces) {
  tiles().prepare(matrix, x, tokens, pieces);
}

void multiply(const LookupMatrix& matrix, const LookupPiece* pieces, int64_t tokens, int64_t first_block,
              int64_t last_block, float* y) {
  tiles().multiply(matrix, pieces, tokens, first_block, last_block, y);
}

void lookup_linear(const LookupMatrix& matrix, const float* x, int64_t tokens, float* y, int threads) {
  thread_local std::vector<LookupPiece> room;  // kept from call to call
  const int64_t token_bytes = matrix.pieces() * static_cast<int64_t>(sizeof(LookupPiece));
  const int64_t together = std::max<int64_t>(4, kTableBytes / std::max<int64_t>(1, token_bytes));
  const int64_t needed = std::min(tokens, together) * matrix.pieces();
  if (static_cast<int64_t>(room.size()) < needed) room.resize(needed);
  LookupPiece* pieces = room.data();
  for (int64_t start = 0; start < tokens; start += together, x += together * matrix.columns, y += together * matrix.rows) {
    const int64_t count = std::min(together, tokens - start);
    const int64_t worth = std::max<int64_t>(1, matrix.codes_bytes() * count / kThreadBytes);
    const int used = static_cast<int>(std::min<int64_t>(threads, worth));
    parallel_for(count, 4, used, [&](int64_t first, int64_t last) {
      prepare(matrix, x + first * matrix.columns, last - first, pieces + first * matrix.pieces());
    });
    const int64_t grain = matrix.blocks() / (used * kStepsPerThread) + 1;
    parallel_for(matrix.blocks(), grain, used, [&](int64_t first, int64_t last) {
      multiply(matrix, pieces, count, first, last, y);
    });
  }
}

}  // namespace lilliput

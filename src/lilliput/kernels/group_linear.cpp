#include "group_linear.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "group_linear_tiles.hpp"
#include "isa.hpp"
#include "scratch.hpp"
#include "thread_pool.hpp"

namespace lilliput {
namespace {

constexpr int64_t kActivationBytes = 256 * 1024;  // of the tokens that go through all weights together: part of an L2
constexpr int64_t kThreadBytes = 32 * 1024;       // of codes, times tokens: less is not worth another thread
constexpr int64_t kStepsPerThread = 8;

const GroupLinearTiles& tiles() {
#if defined(LILLIPUT_X86)
  switch (isa()) {
    case Isa::avx512:
      return group_linear_avx512;
    case Isa::avx2:
      return group_linear_avx2;
    default:
      break;
  }
#endif
  return group_linear_scalar;
}

struct Panel {};

// --- layout ------------------------------------------------------------------------------------------------------

int64_t stored_row_bytes(const PackedMatrix& m) { return m.bits == 8 ? m.columns : (m.columns + 7) / 8 * m.bits; }

/// One stored row <-> its codes, a byte each; `codes` has room for a multiple of 8.
void read_row(const PackedMatrix& m, const uint8_t* stored, uint8_t* codes) {
  if (m.bits == 8) {
    for (int64_t k = 0; k < m.columns; ++k) codes[k] = stored[k] ^ 0x80;
    return;
  }
  for (int64_t k = 0; k < m.columns; k += 8, stored += m.bits) {
    uint32_t word = 0;
    std::memcpy(&word, stored, m.bits);
    for (int i = 0; i < 8; ++i) codes[k + i] = (word >> (i * m.bits)) & ((1 << m.bits) - 1);
  }
}

void write_row(const PackedMatrix& m, const uint8_t* codes, uint8_t* stored) {
  if (m.bits == 8) {
    for (int64_t k = 0; k < m.columns; ++k) stored[k] = codes[k] ^ 0x80;
    return;
  }
  for (int64_t k = 0; k < m.columns; k += 8, stored += m.bits) {
    uint32_t word = 0;
    for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(codes[k + i]) << (i * m.bits);
    std::memcpy(stored, &word, m.bits);
  }
}

/// Where the layout keeps (some bits of) an input's code for row 0 of a block.
struct Place {
  int64_t byte;
  int shift;
};

/// Places of all inputs; `high` asks for the third bit of 3-bit codes.
std::vector<Place> places(const PackedMatrix& m, bool high = false) {
  const int low_bits = m.bits == 3 ? 2 : m.bits, planes = 8 / low_bits;
  std::vector<Place> found(m.columns);
  for (int64_t k = 0; k < m.columns; ++k) {
    const int64_t position = k / m.group * m.padded_group() + k % m.group;
    const int64_t chunk = position / kPieceInputs, quad = position % kPieceInputs / 4;
    const int64_t vector = chunk * m.bits + (high ? 2 : quad / planes);
    found[k] = {vector * kVectorBytes + position % 4, static_cast<int>(high ? quad : quad % planes * low_bits)};
  }
  return found;
}

}  // namespace

void pack_codes(const PackedMatrix& m, const uint8_t* stored, uint8_t* packed) {
  const std::vector<Place> low = places(m), high = places(m, true);
  const int low_mask = m.bits == 3 ? 3 : 255;
  std::vector<uint8_t> codes(m.columns + 7);
  std::fill_n(packed, m.codes_bytes(), uint8_t{0});
  for (int64_t row = 0; row < m.rows; ++row) {
    read_row(m, stored + row * stored_row_bytes(m), codes.data());
    uint8_t* lane = packed + row / kBlockRows * m.block_bytes() + row % kBlockRows * 4;
    for (int64_t k = 0; k < m.columns; ++k) {
      lane[low[k].byte] |= (codes[k] & low_mask) << low[k].shift;
      if (m.bits == 3) lane[high[k].byte] |= (codes[k] >> 2) << high[k].shift;
    }
  }
}

void unpack_codes(const PackedMatrix& m, uint8_t* stored) {
  const std::vector<Place> low = places(m), high = places(m, true);
  const int low_mask = m.bits == 3 ? 3 : (1 << m.bits) - 1;
  std::vector<uint8_t> codes(m.columns + 7);
  for (int64_t row = 0; row < m.rows; ++row) {
    const uint8_t* lane = m.codes + row / kBlockRows * m.block_bytes() + row % kBlockRows * 4;
    for (int64_t k = 0; k < m.columns; ++k) {
      codes[k] = (lane[low[k].byte] >> low[k].shift) & low_mask;
      if (m.bits == 3) codes[k] |= ((lane[high[k].byte] >> high[k].shift) & 1) << 2;
    }
    write_row(m, codes.data(), stored + row * stored_row_bytes(m));
  }
}

void prepare(const PackedMatrix& matrix, const float* x, int64_t tokens, Piece* pieces) {
  tiles().prepare(matrix, x, tokens, pieces);
}

void multiply(const PackedMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first_block, int64_t last_block,
              float* y) {
  uint8_t* panel = scratch<uint8_t, Panel>(kPanelBlocks * matrix.chunks() * 8 * kVectorBytes);
  tiles().multiply(matrix, pieces, tokens, first_block, last_block, y, panel);
}

void group_linear(const PackedMatrix& matrix, const float* x, int64_t tokens, float* y, int threads) {
  const int64_t token_bytes = matrix.pieces() * static_cast<int64_t>(sizeof(Piece));
  const int64_t together = std::max<int64_t>(16, kActivationBytes / std::max<int64_t>(1, token_bytes));
  Piece* pieces = scratch<Piece, Panel>(std::min(tokens, together) * matrix.pieces());
  for (int64_t start = 0; start < tokens; start += together, x += together * matrix.columns, y += together * matrix.rows) {
    const int64_t count = std::min(together, tokens - start);
    const int64_t worth = std::max<int64_t>(1, matrix.codes_bytes() * count / kThreadBytes);
    const int used = static_cast<int>(std::min<int64_t>(threads, worth));
    parallel_for(count, 16, used, [&](int64_t first, int64_t last) {
      prepare(matrix, x + first * matrix.columns, last - first, pieces + first * matrix.pieces());
    });
    const int64_t steps = used * kStepsPerThread;
    const int64_t grain = (matrix.blocks() / steps + kPanelBlocks) / kPanelBlocks * kPanelBlocks;
    parallel_for(matrix.blocks(), grain, used,
                 [&](int64_t first, int64_t last) { multiply(matrix, pieces, count, first, last, y); });
  }
}

}  // namespace lilliput

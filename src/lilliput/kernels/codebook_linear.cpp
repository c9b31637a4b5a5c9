#include "codebook_linear.hpp"

#include <algorithm>
#include <vector>

#include "codebook_linear_tiles.hpp"
#include "isa.hpp"
#include "thread_pool.hpp"

namespace lilliput {
namespace {

constexpr int64_t kActivationBytes = 256 * 1024;  // of the tokens that go through all weights together: part of an L2
constexpr int64_t kThreadBytes = 32 * 1024;       // of codes, times tokens: less is not worth another thread
constexpr int64_t kStepsPerThread = 8;

const CodebookLinearTiles& tiles() {
#if defined(LILLIPUT_X86)
  if (isa() == Isa::avx512) return codebook_linear_avx512;
  if (isa() == Isa::avx2) return codebook_linear_avx2;
#endif
  return codebook_linear_scalar;
}

}  // namespace

void multiply(const CodebookMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first, int64_t last, float* y) {
  thread_local std::vector<uint8_t> panel;
  const int64_t needed = kCodebookPanelBlocks * matrix.packed().chunks() * 8 * kVectorBytes;
  if (static_cast<int64_t>(panel.size()) < needed) panel.resize(needed);
  tiles().multiply(matrix, pieces, tokens, first, last, y, panel.data());
}

void codebook_linear(const CodebookMatrix& matrix, const float* x, int64_t tokens, float* y, int threads) {
  thread_local std::vector<Piece> room;
  const PackedMatrix packed = matrix.packed();
  const int64_t token_bytes = packed.pieces() * static_cast<int64_t>(sizeof(Piece));
  const int64_t together = std::max<int64_t>(16, kActivationBytes / std::max<int64_t>(1, token_bytes));
  room.resize(std::max<size_t>(room.size(), std::min(tokens, together) * packed.pieces()));
  Piece* pieces = room.data();
  for (int64_t start = 0; start < tokens; start += together) {
    const int64_t count = std::min(together, tokens - start);
    const int64_t worth = std::max<int64_t>(1, packed.codes_bytes() * count / kThreadBytes);
    const int used = static_cast<int>(std::min<int64_t>(threads, worth));
    parallel_for(count, 16, used, [&](int64_t first, int64_t last) {
      prepare(packed, x + (start + first) * matrix.columns, last - first, pieces + first * packed.pieces());
    });
    const int64_t grain = packed.blocks() / (used * kStepsPerThread) / kCodebookPanelBlocks * kCodebookPanelBlocks;
    parallel_for(packed.blocks(), std::max(grain, kCodebookPanelBlocks), used, [&](int64_t first, int64_t last) {
      multiply(matrix, pieces, count, first, last, y + start * matrix.rows);
    });
  }
}

}  // namespace lilliput

#include "seed_linear.hpp"

#include <algorithm>
#include <vector>

#include "isa.hpp"
#include "seed_linear_tiles.hpp"
#include "thread_pool.hpp"

namespace lilliput {
namespace {

constexpr int64_t kThreadBytes = 8 * 1024;  // of codes, times tokens: less is not worth another thread
constexpr int64_t kStepsPerThread = 8;

const SeedLinearTiles& tiles() {
#if defined(LILLIPUT_X86)
  if (isa() == Isa::avx512) return seed_linear_avx512;
  if (isa() == Isa::avx2) return seed_linear_avx2;
#endif
  return seed_linear_scalar;
}

/// For each seed the bits that enter the register after it, first lowest: `words` words of 32 bits.
std::vector<uint32_t> following_bits(int words) {
  std::vector<uint32_t> table((kSeedStates + 1) * words);
  for (int seed = 0; seed <= kSeedStates; ++seed) {
    uint32_t state = seed;
    for (int i = 0; i < 32 * words; ++i) {
      const uint32_t bit = (state ^ state >> 1 ^ state >> 3 ^ state >> 12) & 1;
      state = state >> 1 | bit << 15;
      table[seed * words + i / 32] |= bit << (i % 32);
    }
  }
  return table;
}

const uint32_t* states_table(int bits) {
  if (bits == 4) {
    static const std::vector<uint32_t> one = following_bits(1);
    return one.data();
  }
  static const std::vector<uint32_t> two = following_bits(2);
  return two.data();
}

}  // namespace

void multiply(const SeedMatrix& matrix, const float* x, int64_t tokens, int64_t first_block, int64_t last_block, float* y,
              States states) {
  thread_local std::vector<float> panel;
  const size_t needed = matrix.row_blocks() * matrix.block_inputs() * kSeedRows;
  if (panel.size() < needed) panel.resize(needed);
  const uint32_t* table = states == States::table ? states_table(matrix.bits) : nullptr;
  tiles().multiply(matrix, x, tokens, first_block, last_block, y, table, panel.data());
}

void seed_linear(const SeedMatrix& matrix, const float* x, int64_t tokens, float* y, int threads, States states) {
  const int64_t worth = std::max<int64_t>(1, matrix.codes_bytes() * tokens / kThreadBytes);
  const int used = static_cast<int>(std::min<int64_t>(threads, worth));
  const int64_t grain = std::max<int64_t>(1, matrix.blocks() / (used * kStepsPerThread));
  parallel_for(matrix.blocks(), grain, used, [&](int64_t first, int64_t last) {
    multiply(matrix, x, tokens, first, last, y, states);
  });
}

}  // namespace lilliput

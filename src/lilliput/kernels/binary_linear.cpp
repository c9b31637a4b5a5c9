#include "binary_linear.hpp"

#include <algorithm>
#include <cstring>

#include "binary_linear_tiles.hpp"
#include "isa.hpp"
#include "scratch.hpp"
#include "thread_pool.hpp"

namespace lilliput {
namespace {

constexpr int64_t kActivationBytes = 256 * 1024;  // of the tokens that go through all weights together: part of an L2
constexpr int64_t kThreadBytes = 32 * 1024;       // of codes, times tokens: less is not worth another thread
constexpr int64_t kStepsPerThread = 8;
constexpr int64_t kGrainBlocks = 4;
constexpr int64_t kPackTokens = 16;

struct Bits {};
struct Means {};

/// Grain that gives each thread some steps of whole tiles.
int64_t grain_of(const SignMatrix& matrix, int threads) {
  return (matrix.blocks() / (threads * kStepsPerThread) + kGrainBlocks) / kGrainBlocks * kGrainBlocks;
}

int threads_for(const SignMatrix& matrix, int64_t tokens, int threads) {
  const int64_t worth = std::max<int64_t>(1, matrix.codes_bytes() * tokens / kThreadBytes);
  return static_cast<int>(std::min<int64_t>(threads, worth));
}

/// Calls `each(byte of the layout, index of its first sign, number of signs)` for every byte of every row.
template <class Each>
void for_each_byte(const SignMatrix& m, const Each& each) {
  int64_t index = 0;
  for (int64_t row = 0; row < m.rows; ++row) {
    const int64_t lane = row / kSignRows * m.block_bytes() + row % kSignRows * kSignWordBytes;
    for (int64_t byte = 0; byte < m.row_bytes(); ++byte) {
      const int64_t signs = std::min<int64_t>(8, m.segment_inputs - byte % m.segment_bytes() * 8);
      each(lane + byte / kSignWordBytes * kSignVectorBytes + byte % kSignWordBytes, index, signs);
      index += signs;
    }
  }
}

/// +1 or -1 for each bit of each byte, lowest first.
struct SignTable {
  float of[256][8];

  SignTable() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) of[byte][bit] = (byte >> bit & 1) ? 1.0f : -1.0f;
    }
  }
};

}  // namespace

const BinaryLinearTiles& binary_linear_tiles() {
#if defined(LILLIPUT_X86)
  static const bool counts_bits = __builtin_cpu_supports("avx512vpopcntdq");
  if (isa() == Isa::avx512 && counts_bits) return binary_linear_avx512;
  if (isa() != Isa::scalar) return binary_linear_avx2;
#endif
  return binary_linear_scalar;
}

const char* binary_linear_isa() {
#if defined(LILLIPUT_X86)
  if (&binary_linear_tiles() == &binary_linear_avx512) return "avx512";
  if (&binary_linear_tiles() == &binary_linear_avx2) return "avx2";
#endif
  return "scalar";
}

void pack_signs(const SignMatrix& m, const uint8_t* positive, uint8_t* codes) {
  std::fill_n(codes, m.codes_bytes(), uint8_t{0});
  for_each_byte(m, [&](int64_t byte, int64_t index, int64_t signs) {
    for (int64_t i = 0; i < signs; ++i) codes[byte] |= (positive[index + i] != 0) << i;
  });
}

void unpack_signs(const SignMatrix& m, float* signs) {
  static const SignTable table;
  for_each_byte(m, [&](int64_t byte, int64_t index, int64_t count) {
    const float* from = table.of[m.codes[byte]];
    if (count == 8) {
      std::memcpy(signs + index, from, 8 * sizeof(float));
    } else {
      std::memcpy(signs + index, from, count * sizeof(float));
    }
  });
}

void binary_linear(const SignMatrix& m, const Binarizer& how, const float* x, int64_t tokens, float* y, int threads) {
  const BinaryLinearTiles& tiles = binary_linear_tiles();
  const int64_t words = m.words(), token_words = how.planes * words, plane_bytes = words * kSignWordBytes;
  const int64_t together = std::max<int64_t>(48, kActivationBytes / std::max<int64_t>(1, how.planes * plane_bytes));
  uint32_t* bits = scratch<uint32_t, Bits>(std::min(tokens, together) * token_words);
  float* means = how.by_mean ? scratch<float, Means>(std::min(tokens, together)) : nullptr;
  for (int64_t start = 0; start < tokens; start += together, x += together * m.inputs(), y += together * m.rows) {
    const int64_t count = std::min(together, tokens - start);
    const int used = threads_for(m, count, threads);
    parallel_for(count, kPackTokens, used, [&](int64_t first, int64_t last) {
      uint32_t* to = bits + first * token_words;
      if (plane_bytes > m.row_bytes()) std::fill_n(to, (last - first) * token_words, 0u);
      const SignTarget target{reinterpret_cast<uint8_t*>(to), plane_bytes, token_words * kSignWordBytes,
                              means ? means + first : nullptr};
      tiles.pack_rows(how, x + first * m.inputs(), last - first, m.inputs(), target);
    });
    const SignTokens packed{bits, count, how.planes, how.levels, means, nullptr};
    parallel_for(m.blocks(), grain_of(m, used), used,
                 [&](int64_t first, int64_t last) { tiles.multiply(m, packed, first, last, y); });
  }
}

void binary_weight_linear(const SignMatrix& m, const float* x, int64_t tokens, float* y, int threads) {
  const BinaryLinearTiles& tiles = binary_linear_tiles();
  const int64_t token_bytes = std::max<int64_t>(1, m.inputs() * static_cast<int64_t>(sizeof(float)));
  const int64_t together = std::max<int64_t>(8, kActivationBytes / token_bytes);
  for (int64_t start = 0; start < tokens; start += together, x += together * m.inputs(), y += together * m.rows) {
    const int64_t count = std::min(together, tokens - start);
    const int used = threads_for(m, count, threads);
    parallel_for(m.blocks(), grain_of(m, used), used,
                 [&](int64_t first, int64_t last) { tiles.multiply_floats(m, x, count, first, last, y); });
  }
}

}  // namespace lilliput

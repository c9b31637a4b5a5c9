// The inner loops of dense_linear; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "decoder_tiles.hpp"
#include "float_lanes.hpp"

namespace {

using namespace lilliput;

constexpr int kRows = 4;                            // whose weights are read together
constexpr int kTokens = kWidth == 16 ? 4 : 2;       // whose sums the registers hold for those rows
constexpr int kParts = kWidth == 16 ? 4 : 2;        // sums of a row for a single token: products do not wait for each other
constexpr int64_t kPrefetchBytes = 2048;

/// sums[r * Tokens + t]: lanes add up to row r times token t.
template <class T, int Tokens>
inline void dot_rows(const T* const (&rows)[kRows], const float* x, int64_t columns, Floats* sums) {
  constexpr int kSplit = Tokens == 1 ? kParts : 1;
  Floats parts[kRows][Tokens][kSplit] = {};
  int64_t k = 0;
  for (; k + kSplit * kWidth <= columns; k += kSplit * kWidth) {
    for (int s = 0; s < kSplit; ++s) {
      Floats inputs[Tokens];
      for (int t = 0; t < Tokens; ++t) inputs[t] = load(x + t * columns + k + s * kWidth);
      for (int r = 0; r < kRows; ++r) {
        const T* from = rows[r] + k + s * kWidth;
        if constexpr (Tokens == 1) __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes);
        const Floats weights = load(from);
        for (int t = 0; t < Tokens; ++t) parts[r][t][s] = fused(weights, inputs[t], parts[r][t][s]);
      }
    }
  }
  for (; k < columns; k += kWidth) {
    for (int r = 0; r < kRows; ++r) {
      const Floats weights = load_part(rows[r] + k, columns - k);
      for (int t = 0; t < Tokens; ++t) {
        parts[r][t][0] = fused(weights, load_part(x + t * columns + k, columns - k), parts[r][t][0]);
      }
    }
  }
  for (int i = 0; i < kRows * Tokens; ++i) {
    sums[i] = parts[i / Tokens][i % Tokens][0];
    for (int s = 1; s < kSplit; ++s) sums[i] += parts[i / Tokens][i % Tokens][s];
  }
}

/// One block of rows; rows past the end are computed from the last one and not stored.
template <class T, int Tokens>
void tile(const DenseMatrix& matrix, int64_t block, const float* x, float* y) {
  const T* weights = static_cast<const T*>(matrix.weights);
  const int64_t first = block * kBlockRows, left = matrix.rows - first;
  alignas(64) Floats sums[kBlockRows * Tokens];
  for (int64_t r = 0; r < kBlockRows; r += kRows) {
    const T* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = weights + (first + (r + i < left ? r + i : left - 1)) * matrix.columns;
    dot_rows<T, Tokens>(rows, x, matrix.columns, sums + r * Tokens);
  }
  float results[kBlockRows * Tokens];
  for (int i = 0; i < kBlockRows * Tokens; i += kWidth) {
    Floats vectors[kWidth];
    for (int v = 0; v < kWidth; ++v) vectors[v] = sums[i + v];
    store(totals(vectors), results + i);
  }
  for (int64_t r = 0; r < kBlockRows && r < left; ++r) {
    for (int t = 0; t < Tokens; ++t) y[t * matrix.rows + first + r] = results[r * Tokens + t];
  }
}

template <class T>
void multiply_blocks(const DenseMatrix& matrix, const float* x, int64_t tokens, int64_t first, int64_t last, float* y) {
  for (int64_t block = first; block < last; ++block) {
    int64_t t = 0;
    for (; t + kTokens <= tokens; t += kTokens) {
      tile<T, kTokens>(matrix, block, x + t * matrix.columns, y + t * matrix.rows);
    }
    for (; t < tokens; ++t) tile<T, 1>(matrix, block, x + t * matrix.columns, y + t * matrix.rows);
  }
}

void multiply_any(const DenseMatrix& matrix, const float* x, int64_t tokens, int64_t first, int64_t last, float* y) {
  if (matrix.bfloat16) {
    multiply_blocks<uint16_t>(matrix, x, tokens, first, last, y);
  } else {
    multiply_blocks<float>(matrix, x, tokens, first, last, y);
  }
}

}  // namespace

namespace lilliput {

const DenseLinearTiles LILLIPUT_TILES{multiply_any};

}  // namespace lilliput

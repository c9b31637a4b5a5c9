// What each instruction set's copy of the inner loops offers to decoder.cpp and dense_linear.cpp.
#pragma once

#include "decoder.hpp"

namespace lilliput {

struct DenseLinearTiles {
  void (*multiply)(const DenseMatrix& matrix, const float* x, int64_t tokens, int64_t first_block, int64_t last_block,
                   float* y);
};

/// Queries of one head that attend to the keys of one sequence: query i, at `position` + i, to the keys before and at its
/// own place, at most `window` of them.
struct Attention {
  const float* queries;
  int64_t query_stride;
  int count;  // at most kQueries
  int64_t position;
  const float *keys, *values;  // (length, dim)
  int64_t dim, window;
  float* out;  // rows of the same stride as the queries'
};

constexpr int kQueries = 16;

struct DecoderTiles {
  /// y = x / sqrt(mean(x^2) + epsilon) (offset + weight); y may be x.
  void (*rms_norm)(const float* x, const Norm& norm, int64_t width, float* y);
  /// Rotary position in place: x cos + (halves of x swapped, the first one negated) sin, then times `scaling`.
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t dim, float scaling);
  /// out = softmax(q k^T) v. `scores` has room for kQueries times `score_room(keys)` + dim floats.
  void (*attend)(const Attention& attention, float* scores);
  /// y = activation(gate) * up
  void (*gate)(Activation activation, const float* gate, const float* up, int64_t count, float* y);
};

/// Floats that the scores of a query over `keys` keys take.
inline int64_t score_room(int64_t keys) { return (keys + 31) / 16 * 16; }

extern const DenseLinearTiles dense_linear_scalar, dense_linear_avx2, dense_linear_avx512;
extern const DecoderTiles decoder_scalar, decoder_avx2, decoder_avx512;

/// Those of the instruction set in use.
const DecoderTiles& decoder_tiles();

}  // namespace lilliput

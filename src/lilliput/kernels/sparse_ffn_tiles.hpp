// What each instruction set's copy of the inner loops offers to sparse_ffn.cpp.
#pragma once

#include "sparse_ffn.hpp"

namespace lilliput {

struct SparseFfnTiles {
  /// Indices and values of the activations that are not 0 (NaN is not 0); returns how many there are. Both have room for
  /// `neurons`.
  int64_t (*compact)(const float* gate, int64_t neurons, bool rectified, float shift, int32_t* index, float* value);
  /// value[i] *= row index[i] of m times x + bias[index[i]] (null: none)
  void (*dot)(const RowMatrix& m, const int32_t* index, int64_t count, const float* x, const float* bias, float* value);
  /// y[c] += sum of value[i] m[index[i]][c], one i after another, over the columns of the chunks first .. last-1.
  void (*add)(const RowMatrix& m, const int32_t* index, const float* value, int64_t count, int64_t first_chunk,
              int64_t last_chunk, float* y);
};

extern const SparseFfnTiles sparse_ffn_scalar, sparse_ffn_avx2, sparse_ffn_avx512;

}  // namespace lilliput

// What each instruction set's copy of the inner loops offers to binary_linear.cpp and binary_conv2d.cpp.
#pragma once

#include "binary_linear.hpp"

namespace lilliput {

/// Where packed signs go: plane m of row r begins at `bits + m * plane_bytes + r * row_bytes`; filling bits of the last
/// byte are written as 0. `means`, unless null, takes the mean of |x - shift| of each row.
struct SignTarget {
  uint8_t* bits;
  int64_t plane_bytes, row_bytes;
  float* means;
};

/// Tokens whose signs are packed: the planes of a token one after the other, `words` each.
struct SignTokens {
  const uint32_t* bits;
  int64_t count;
  int planes;
  const float* levels;
  const float* means;                // a factor for each token, or null
  const int32_t* const* corrections; // per token (blocks * 16) to add to each plane's sum, or null
};

struct BinaryLinearTiles {
  /// Rows of x (rows, inputs), one after the other.
  void (*pack_rows)(const Binarizer& how, const float* x, int64_t rows, int64_t inputs, SignTarget to);
  /// The columns first .. last-1 of x (inputs, columns) as rows; `to` is where column 0 goes.
  void (*pack_columns)(const Binarizer& how, const float* x, int64_t inputs, int64_t columns, int64_t first,
                       int64_t last, SignTarget to);
  /// Rows of the blocks first .. last-1 of y (tokens, rows).
  void (*multiply)(const SignMatrix& matrix, const SignTokens& tokens, int64_t first, int64_t last, float* y);
  /// sums (segments, blocks * 16): of the signs of each segment.
  void (*segment_sums)(const SignMatrix& matrix, int32_t* sums);
  /// binary_weight_linear for the blocks first .. last-1.
  void (*multiply_floats)(const SignMatrix& matrix, const float* x, int64_t tokens, int64_t first, int64_t last,
                          float* y);
  /// Differs, counts and adds `rounds` times in registers; the number of signs that were compared.
  int64_t (*peak)(int64_t rounds);
};

extern const BinaryLinearTiles binary_linear_scalar, binary_linear_avx2, binary_linear_avx512;

/// Those of the instruction set in use.
const BinaryLinearTiles& binary_linear_tiles();
/// The name of the copy in use: avx512 needs VPOPCNTDQ, machines without it take avx2.
const char* binary_linear_isa();

}  // namespace lilliput

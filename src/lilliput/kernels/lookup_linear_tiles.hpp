// What each instruction set's copy of the inner loops offers to lookup_linear.cpp.
#pragma once

#include "lookup_linear.hpp"

namespace lilliput {

struct LookupLinearTiles {
  /// Tables of activations x (tokens, columns): pieces (tokens, matrix.pieces()).
  void (*prepare)(const LookupMatrix& matrix, const float* x, int64_t tokens, LookupPiece* pieces);
  /// Rows of the blocks first .. last-1 of y (tokens, rows).
  void (*multiply)(const LookupMatrix& matrix, const LookupPiece* pieces, int64_t tokens, int64_t first, int64_t last,
                   float* y);
};

extern const LookupLinearTiles lookup_linear_scalar, lookup_linear_avx2, lookup_linear_avx512;

}  // namespace lilliput

// y = x W^T for dense weights, float32 or bfloat16, few tokens at a time; sums are float32.
#pragma once

#include <cstdint>

#include "group_linear.hpp"

namespace lilliput {

/// W (rows, columns), rows one after another; the caller owns the memory.
struct DenseMatrix {
  const void* weights;
  int64_t rows, columns;
  bool bfloat16;

  static constexpr int64_t block_rows = kBlockRows;
  int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
};

/// Rows of the blocks first .. last-1 of y (tokens, rows) = x (tokens, columns) W^T.
void multiply(const DenseMatrix& matrix, const float* x, int64_t tokens, int64_t first_block, int64_t last_block, float* y);

}  // namespace lilliput

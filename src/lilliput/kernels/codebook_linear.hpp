// y = x W^T for weights that are entries of small tables: W_nk = tables[n][index_nk] * scale_ng.
//
// Indices of 4, 3 or 2 bits lie in the layout of group_linear.hpp, as codes of one group: 16 rows (a block) side by side.
// Tables hold signed bytes in -127 .. 127. Each 4 rows have 16 bytes of them, what one byte shuffle reaches: with 4 bits
// one table of 16 entries, with 3 bits a table of 8 for each 2 rows, with 2 bits a table of 4 for each row. Either all
// rows share one such 16 bytes, or each 4 rows have their own. The scale is bfloat16: per block and group 16 values.
//
// Groups take whole pieces of 32 inputs, or there is one group. Activations are rounded as in group_linear.
#pragma once

#include <cstdint>

#include "group_linear.hpp"

namespace lilliput {

constexpr int64_t kTableBytes = 16, kTableRows = 4;

/// W (rows, columns) in the layout above; the caller owns the memory.
struct CodebookMatrix {
  const uint8_t* codes;
  const uint16_t* scale;
  const int8_t* tables;
  int64_t rows, columns, group;
  int bits;
  bool shared;  // one table for all rows

  static constexpr int64_t block_rows = kBlockRows;
  /// The indices; their pieces of activations are those of this matrix.
  PackedMatrix packed() const { return {codes, nullptr, rows, columns, columns > 0 ? columns : 1, bits}; }
  int64_t groups() const { return columns / group; }
  int64_t blocks() const { return packed().blocks(); }
  int64_t scale_count() const { return packed().blocks() * groups() * kBlockRows; }
  int64_t tables_bytes() const { return shared ? kTableBytes : packed().blocks() * kBlockRows / kTableRows * kTableBytes; }
};

/// Rows of the blocks first .. last-1 of y (tokens, rows), with pieces of `matrix.packed()`.
void multiply(const CodebookMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first_block, int64_t last_block,
              float* y);

/// All of y (tokens, rows) = x (tokens, columns) W^T on up to `threads` threads. A token's result depends on neither the
/// other tokens nor the threads.
void codebook_linear(const CodebookMatrix& matrix, const float* x, int64_t tokens, float* y, int threads);

}  // namespace lilliput

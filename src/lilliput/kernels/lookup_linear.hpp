// y = x W^T for weights W of 4, 3, 2 or 1 bits, by looking up sums of activations instead of multiplying.
//
// value = (code - 2^(bits-1)) * scale + zero, as in group_linear. With the bits of a code as signs +1 and -1,
// 2 (code - 2^(bits-1)) = sum_i 2^i sign_i - 1. The 16 sums of 4 activations with either sign are one table for all rows,
// rounded to 8 bits; four bits of a plane of a row choose one of them, in a byte shuffle.
//
// The layout that is executed: 64 rows (a block) stand side by side. Two tables, that is 8 inputs of a group, take `bits`
// vectors of 64 bytes. The low four bits of a byte belong to the first table, the high four to the second, the lowest
// bit to the first input. Planes stand in pairs, so that a multiply-add of neighbouring bytes adds them up:
//   planes 0 and 1   two vectors, for rows 0-31 and 32-63: byte 2j is plane 0 of row j, byte 2j + 1 its plane 1
//   planes 2 and 3   the same
//   a last one alone one vector: byte 2j is row j, byte 2j + 1 row 32 + j
// A group is filled up to a multiple of 8 inputs, the last block with rows of zero bits. The grid is bfloat16: per block
// and group 64 scales, then 64 zeros.
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int64_t kLookupRows = 64;  // of a block
constexpr int kTableInputs = 4, kTableEntries = 16;
constexpr int kPieceTables = 16;  // that share a step: their sums at 4 bits, 15 * 127 * 16, fit into 16 bits

/// W (rows, columns) in the layout above; the caller owns the memory.
struct LookupMatrix {
  const uint8_t* codes;
  const uint16_t* grid;
  int64_t rows, columns, group;
  int bits;

  static constexpr int64_t block_rows = kLookupRows;
  int64_t groups() const { return columns / group; }
  int64_t blocks() const { return (rows + kLookupRows - 1) / kLookupRows; }
  int64_t tables_per_group() const { return (group + 7) / 8 * 2; }
  int64_t pieces_per_group() const { return (tables_per_group() + kPieceTables - 1) / kPieceTables; }
  /// Pieces of a token.
  int64_t pieces() const { return groups() * pieces_per_group(); }
  int64_t group_bytes() const { return tables_per_group() / 2 * bits * kLookupRows; }
  int64_t block_bytes() const { return groups() * group_bytes(); }
  int64_t block_grid() const { return groups() * 2 * kLookupRows; }
  int64_t codes_bytes() const { return blocks() * block_bytes(); }
  int64_t grid_count() const { return blocks() * block_grid(); }
};

/// The tables of up to 64 activations of one group. Entry e of a table stands for (entry - 128) * 2 * half_step, the sum of
/// its four activations, each with a minus where e has a 0 bit. Activations past the end of a group are 0.
struct alignas(16) LookupPiece {
  uint8_t tables[kPieceTables][kTableEntries];
  float half_step;  // NaN when a sum of four of them is NaN or infinite: then all outputs of the token are NaN
  float sum;        // of the activations as they were
};

/// Codes as they are stored (rows of 8 codes in `bits` bytes, first lowest, the last bytes filled up) -> the layout.
void lookup_pack(const LookupMatrix& shape, const uint8_t* stored, uint8_t* packed);
/// The inverse of `lookup_pack`.
void lookup_unpack(const LookupMatrix& matrix, uint8_t* stored);

/// Tables of activations x (tokens, columns): pieces (tokens, matrix.pieces()).
void prepare(const LookupMatrix& matrix, const float* x, int64_t tokens, LookupPiece* pieces);
/// Whether what was prepared for one matrix serves another one, too.
inline bool same_pieces(const LookupMatrix& a, const LookupMatrix& b) {
  constexpr int64_t inputs = kPieceTables * kTableInputs;
  const bool uniform = a.group % inputs == 0 && b.group % inputs == 0;
  return a.columns == b.columns && (uniform || a.group == b.group);
}
/// Rows of the blocks first .. last-1 of y (tokens, rows).
void multiply(const LookupMatrix& matrix, const LookupPiece* pieces, int64_t tokens, int64_t first_block,
              int64_t last_block, float* y);

/// All of y (tokens, rows) = x (tokens, columns) W^T on up to `threads` threads. A token's result depends on neither the
/// other tokens nor the number of threads.
void lookup_linear(const LookupMatrix& matrix, const float* x, int64_t tokens, float* y, int threads);

}  // namespace lilliput

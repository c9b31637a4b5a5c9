// y = x W^T for weights W that stay packed: codes of 8, 4, 3 or 2 bits with a grid for each group of a row's inputs.
//
// value = (code - 2^(bits-1)) * scale + zero; 8-bit weights have no zero. The layout that is executed: 16 rows (a block)
// stand side by side, a 32-bit lane each. 32 inputs of a block (a chunk) take `bits` vectors of 64 bytes:
//   8 bits  vector i holds inputs 4i .. 4i+3 (a quad), a byte each
//   4 bits  the low nibbles of vector i are quad 2i, the high ones quad 2i+1
//   2 bits  bits 2p and 2p+1 of the bytes of vector i are quad 4i+p
//   3 bits  the low two bits as above, then one vector whose bit j is the high bit of quad j
// A group begins with a quad of its own (the filling is 0), the last chunk and the last block are filled up; so the
// bytes are those of the codes when 32 divides the inputs and 16 the rows. The grid is bfloat16: per block and group 16
// scales, then 16 zeros.
//
// Activations are rounded to 8 bits per token and `piece` of up to 32 inputs of a group.
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int64_t kBlockRows = 16, kPieceInputs = 32, kVectorBytes = 64;

/// W (rows, columns) in the layout above; the caller owns the memory.
struct PackedMatrix {
  const uint8_t* codes;
  const uint16_t* grid;
  int64_t rows, columns, group;
  int bits;

  static constexpr int64_t block_rows = kBlockRows;
  int64_t groups() const { return columns / group; }
  int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  /// Inputs of a group with its filling.
  int64_t padded_group() const {
    const int64_t unit = groups() == 1 ? kPieceInputs : 4;
    return (group + unit - 1) / unit * unit;
  }
  /// Whether each group takes whole chunks.
  bool regular() const { return padded_group() % kPieceInputs == 0; }
  int64_t chunks() const { return (groups() * padded_group() + kPieceInputs - 1) / kPieceInputs; }
  int64_t pieces_per_group() const { return (group + kPieceInputs - 1) / kPieceInputs; }
  /// Pieces of a token.
  int64_t pieces() const { return groups() * pieces_per_group(); }
  int64_t block_bytes() const { return chunks() * bits * kVectorBytes; }
  int64_t block_grid() const { return groups() * (bits == 8 ? 1 : 2) * kBlockRows; }
  int64_t codes_bytes() const { return blocks() * block_bytes(); }
  int64_t grid_count() const { return blocks() * block_grid(); }
};

/// Up to 32 activations of one group: x_i ~ codes[i] * scale. Codes past the end of a group are 0.
/// scale is NaN when one of them is NaN or infinite: then all outputs of the token are NaN.
struct Piece {
  int8_t codes[kPieceInputs];
  float scale;
  float sum;          // of the activations as they were
  int32_t minus_sum;  // of the codes
};

/// Codes as they are stored -> the layout. Stored are rows of 8 codes in `bits` bytes, first lowest, the last bytes filled
/// up; for 8 bits rows of signed bytes, code - 128.
void pack_codes(const PackedMatrix& shape, const uint8_t* stored, uint8_t* packed);
/// The inverse of `pack_codes`.
void unpack_codes(const PackedMatrix& matrix, uint8_t* stored);

/// Round activations x (tokens, columns) to pieces (tokens, matrix.pieces()).
void prepare(const PackedMatrix& matrix, const float* x, int64_t tokens, Piece* pieces);
/// Whether what was prepared for one matrix serves another one, too.
inline bool same_pieces(const PackedMatrix& a, const PackedMatrix& b) {
  const bool uniform = a.group % kPieceInputs == 0 && b.group % kPieceInputs == 0;
  return a.columns == b.columns && (uniform || a.group == b.group);
}
/// Rows of the blocks first .. last-1 of y (tokens, rows). A token's result depends on neither the other tokens nor the
/// split into blocks.
void multiply(const PackedMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first_block, int64_t last_block,
              float* y);

/// All of y (tokens, rows) = x (tokens, columns) W^T on up to `threads` threads.
void group_linear(const PackedMatrix& matrix, const float* x, int64_t tokens, float* y, int threads);

}  // namespace lilliput

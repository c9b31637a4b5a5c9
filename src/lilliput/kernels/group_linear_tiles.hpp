// What each instruction set's copy of the inner loops offers to group_linear.cpp.
#pragma once

#include "group_linear.hpp"

namespace lilliput {

struct GroupLinearTiles {
  void (*prepare)(const PackedMatrix& matrix, const float* x, int64_t tokens, Piece* pieces);
  /// `panel` is room for `kPanelBlocks` blocks with a byte for each code.
  void (*multiply)(const PackedMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first_block,
                   int64_t last_block, float* y, uint8_t* panel);
};

constexpr int64_t kPanelBlocks = 2;

extern const GroupLinearTiles group_linear_scalar, group_linear_avx2, group_linear_avx512;

}  // namespace lilliput

// What each instruction set's copy of the inner loops offers to codebook_linear.cpp.
#pragma once

#include "codebook_linear.hpp"

namespace lilliput {

struct CodebookLinearTiles {
  /// Rows of the blocks first .. last-1; `panel` is room for `kCodebookPanelBlocks` blocks with a byte for each weight.
  void (*multiply)(const CodebookMatrix& matrix, const Piece* pieces, int64_t tokens, int64_t first_block,
                   int64_t last_block, float* y, uint8_t* panel);
};

constexpr int64_t kCodebookPanelBlocks = 2;

extern const CodebookLinearTiles codebook_linear_scalar, codebook_linear_avx2, codebook_linear_avx512;

}  // namespace lilliput

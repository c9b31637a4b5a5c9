// What each instruction set's copy of the inner loops offers to seed_linear.cpp.
#pragma once

#include "seed_linear.hpp"

namespace lilliput {

struct SeedLinearTiles {
  /// Rows of the bands first .. last-1. `table` holds for each seed the bits that follow it (32 or 64 bits a seed), or is
  /// null; `panel` is room for a band with a float for each weight.
  void (*multiply)(const SeedMatrix& matrix, const float* x, int64_t tokens, int64_t first_band, int64_t last_band,
                   float* y, const uint32_t* table, float* panel);
};

extern const SeedLinearTiles seed_linear_scalar, seed_linear_avx2, seed_linear_avx512;

}  // namespace lilliput

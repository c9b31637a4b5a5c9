// What each instruction set's copy of the search's inner loop offers to seed_search.cpp.
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int kSearchLanes = 16;  // blocks that are searched side by side
constexpr int kMostInputs = 12, kMostTerms = 4;

/// The best seeds so far of 16 blocks: `count` energies a block, and their seeds; `worst` is the least of a block's.
struct Best {
  float* energies;  // (16, count)
  uint16_t* seeds;  // (16, count)
  float* worst;     // (16)
  int count;
};

struct SeedSearchTiles {
  /// Takes the seeds first .. last-1 into `best` that hold more of a block's energy than its worst. `bases` are their
  /// orthonormal columns (seeds, terms, inputs), `w` is (inputs, 16).
  void (*scan)(const float* bases, int inputs, int first, int last, const float* w, Best best);
};

extern const SeedSearchTiles seed_search_scalar, seed_search_avx2, seed_search_avx512;

}  // namespace lilliput

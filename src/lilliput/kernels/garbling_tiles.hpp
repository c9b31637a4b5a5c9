// What each instruction set's copy of the inner loops offers to garbling.cpp.
#pragma once

#include "garbling.hpp"

namespace lilliput {

struct GarblingTiles {
  void (*encrypt)(const CipherKey& key, const uint8_t* x, uint8_t* y, int64_t blocks);
  void (*hash)(const CipherKey& key, const uint8_t* x, uint8_t* y, int64_t blocks, int64_t tweak);
  void (*garble)(const CipherKey& key, const Gates& gates, int64_t first, int64_t last, const uint8_t* bits,
                 const uint8_t* delta, uint8_t* labels, int64_t tweak, uint8_t* tables);
  void (*evaluate)(const CipherKey& key, const Gates& gates, int64_t first, int64_t last, uint8_t* labels,
                   int64_t tweak, const uint8_t* tables);
};

extern const GarblingTiles garbling_scalar, garbling_avx2, garbling_avx512;

}  // namespace lilliput

// Reading codes in the layout of group_linear.hpp: four inputs (a quad) of each row at a time, a row in each lane.
#pragma once

#include "group_linear.hpp"
#include "lanes.hpp"

namespace {

constexpr int kVectors = lilliput::kBlockRows / kWidth;  // of a block
constexpr int kQuads = 8;                                // of a piece

/// Quad `i` of a chunk, from the lanes that begin at `chunk`.
template <int Bits>
inline Words quad(const uint8_t* chunk, int i) {
  if constexpr (Bits == 8) {
    return load_words(chunk + lilliput::kVectorBytes * i);
  } else if constexpr (Bits == 4) {
    return (load_words(chunk + lilliput::kVectorBytes * (i / 2)) >> (4 * (i % 2))) & 0x0f0f0f0fu;
  } else {
    const Words low = (load_words(chunk + lilliput::kVectorBytes * (i / 4)) >> (2 * (i % 4))) & 0x03030303u;
    if constexpr (Bits == 2) return low;
    const Words high = load_words(chunk + lilliput::kVectorBytes * 2);
    return low | ((i < 2 ? high << (2 - i) : high >> (i - 2)) & 0x04040404u);
  }
}

}  // namespace

// AES-128 byte by byte, for its key schedule and for machines without AES instructions (FIPS 197).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "garbling.hpp"

namespace lilliput {

/// x times 2 in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1.
constexpr uint8_t doubled(uint8_t x) { return static_cast<uint8_t>(x << 1 ^ (x >> 7) * 0x1b); }

/// Bits turned to the left.
constexpr uint8_t rotated(uint8_t x, int by) { return static_cast<uint8_t>(x << by | x >> (8 - by)); }

/// The product in that field.
constexpr uint8_t product(uint8_t a, uint8_t b) {
  uint8_t sum = 0;
  for (; b; b >>= 1, a = doubled(a)) sum ^= (b & 1) ? a : 0;
  return sum;
}

/// The substitution box: x^254, which is 1/x, then an affine map.
constexpr std::array<uint8_t, 256> substitution_box() {
  std::array<uint8_t, 256> box{};
  for (int x = 0; x < 256; ++x) {
    uint8_t power = static_cast<uint8_t>(x), inverse = 1;
    for (int bit = 1; bit < 8; ++bit) {
      power = product(power, power);
      inverse = product(inverse, power);
    }
    box[x] = 0x63;
    for (int turn = 0; turn < 5; ++turn) box[x] ^= rotated(inverse, turn);
  }
  return box;
}

inline constexpr std::array<uint8_t, 256> kBox = substitution_box();

/// One block; byte 4 c + r is row r of column c. The table is read at secret places: a cache can tell them.
inline void encrypt_bytes(const CipherKey& key, uint8_t* state) {
  for (int i = 0; i < 16; ++i) state[i] ^= key.rounds[0][i];
  for (int round = 1; round <= kCipherRounds; ++round) {
    uint8_t moved[16];
    for (int i = 0; i < 16; ++i) moved[i] = kBox[state[(i + i % 4 * 4) % 16]];
    for (int c = 0; c < 16; c += 4) {
      const uint8_t all = moved[c] ^ moved[c + 1] ^ moved[c + 2] ^ moved[c + 3];
      for (int r = 0; r < 4; ++r) {
        const uint8_t own = moved[c + r], next = moved[c + (r + 1) % 4];
        const uint8_t mixed = round == kCipherRounds ? own : static_cast<uint8_t>(own ^ all ^ doubled(own ^ next));
        state[c + r] = mixed ^ key.rounds[round][c + r];
      }
    }
  }
}

}  // namespace lilliput

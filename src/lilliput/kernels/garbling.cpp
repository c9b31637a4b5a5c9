#include "garbling.hpp"

#include "cipher_bytes.hpp"
#include "garbling_tiles.hpp"
#include "isa.hpp"

namespace lilliput {
namespace {

const GarblingTiles& garbling_tiles() {
#if defined(LILLIPUT_X86)
  if (isa() != Isa::scalar && __builtin_cpu_supports("aes")) {
    return isa() == Isa::avx512 ? garbling_avx512 : garbling_avx2;
  }
#endif
  return garbling_scalar;
}

}  // namespace

bool hardware_cipher() { return &garbling_tiles() != &garbling_scalar; }

CipherKey expand_key(const uint8_t* key) {
  CipherKey expanded;
  uint8_t* words = expanded.rounds[0];
  std::memcpy(words, key, 16);
  uint8_t constant = 1;
  for (int i = 16; i < 16 * (kCipherRounds + 1); i += 4) {
    uint8_t word[4];
    std::memcpy(word, words + i - 4, 4);
    if (i % 16 == 0) {
      const uint8_t first = word[0];
      for (int b = 0; b < 3; ++b) word[b] = kBox[word[b + 1]];
      word[3] = kBox[first];
      word[0] ^= constant;
      constant = doubled(constant);
    }
    for (int b = 0; b < 4; ++b) words[i + b] = words[i + b - 16] ^ word[b];
  }
  return expanded;
}

void encrypt(const CipherKey& key, const uint8_t* x, uint8_t* y, int64_t blocks) {
  garbling_tiles().encrypt(key, x, y, blocks);
}

void hash_labels(const CipherKey& key, const uint8_t* x, uint8_t* y, int64_t blocks, int64_t tweak) {
  garbling_tiles().hash(key, x, y, blocks, tweak);
}

void garble(const CipherKey& key, const Gates& gates, int64_t first, int64_t last, const uint8_t* bits,
            const uint8_t* delta, uint8_t* labels, int64_t tweak, uint8_t* tables) {
  garbling_tiles().garble(key, gates, first, last, bits, delta, labels, tweak, tables);
}

void evaluate(const CipherKey& key, const Gates& gates, int64_t first, int64_t last, uint8_t* labels, int64_t tweak,
              const uint8_t* tables) {
  garbling_tiles().evaluate(key, gates, first, last, labels, tweak, tables);
}

}  // namespace lilliput

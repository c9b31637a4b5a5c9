// The inner loops of garbling; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "garbling_tiles.hpp"

#include <cstring>

#include "cipher_bytes.hpp"

#if defined(__AES__)
#include <immintrin.h>
#endif

namespace {

using namespace lilliput;

using Block = long long __attribute__((vector_size(16)));  // a label; what __m128i is, too

constexpr int kTogether = 8;  // blocks whose rounds overlap

inline Block load(const uint8_t* from) {
  Block block;
  std::memcpy(&block, from, sizeof block);
  return block;
}

inline void store(Block block, uint8_t* to) { std::memcpy(to, &block, sizeof block); }

inline Block tweaked(Block block, int64_t tweak) { return block ^ Block{tweak, 0}; }

/// All ones where the colour of the label is 1, without a branch that would tell it by its time.
inline Block if_coloured(Block label) {
  const long long mask = -(label[0] & 1);
  return Block{mask, mask};
}

#if defined(__AES__)
template <int Count>
inline void encrypt_all(const CipherKey& key, Block (&x)[Count]) {
  const Block first = load(key.rounds[0]), last = load(key.rounds[kCipherRounds]);
  for (Block& block : x) block ^= first;
  for (int round = 1; round < kCipherRounds; ++round) {
    const Block of_round = load(key.rounds[round]);
    for (Block& block : x) block = (Block)_mm_aesenc_si128((__m128i)block, (__m128i)of_round);
  }
  for (Block& block : x) block = (Block)_mm_aesenclast_si128((__m128i)block, (__m128i)last);
}
#else
template <int Count>
inline void encrypt_all(const CipherKey& key, Block (&x)[Count]) {
  for (Block& block : x) {
    uint8_t bytes[16];
    store(block, bytes);
    encrypt_bytes(key, bytes);
    block = load(bytes);
  }
}
#endif

/// H of each block with its tweak.
template <int Count>
inline void hash_all(const CipherKey& key, Block (&x)[Count], const int64_t (&tweaks)[Count]) {
  encrypt_all(key, x);
  Block again[Count];
  for (int i = 0; i < Count; ++i) again[i] = tweaked(x[i], tweaks[i]);
  encrypt_all(key, again);
  for (int i = 0; i < Count; ++i) x[i] ^= again[i];
}

/// Calls `each(block array, index of the first)` for all blocks, many at a time; `each` changes them.
template <class Each>
void for_blocks(const uint8_t* x, uint8_t* y, int64_t blocks, const Each& each) {
  int64_t done = 0;
  for (; done + kTogether <= blocks; done += kTogether) {
    Block some[kTogether];
    for (int i = 0; i < kTogether; ++i) some[i] = load(x + (done + i) * kLabelBytes);
    each(some, done);
    for (int i = 0; i < kTogether; ++i) store(some[i], y + (done + i) * kLabelBytes);
  }
  for (; done < blocks; ++done) {
    Block one[1] = {load(x + done * kLabelBytes)};
    each(one, done);
    store(one[0], y + done * kLabelBytes);
  }
}

void encrypt_blocks(const CipherKey& key, const uint8_t* x, uint8_t* y, int64_t blocks) {
  for_blocks(x, y, blocks, [&](auto& some, int64_t) { encrypt_all(key, some); });
}

template <int Count>
inline void hash_run(const CipherKey& key, Block (&x)[Count], int64_t tweak) {
  int64_t tweaks[Count];
  for (int i = 0; i < Count; ++i) tweaks[i] = tweak + i;
  hash_all(key, x, tweaks);
}

void hash_blocks(const CipherKey& key, const uint8_t* x, uint8_t* y, int64_t blocks, int64_t tweak) {
  for_blocks(x, y, blocks, [&](auto& some, int64_t first) { hash_run(key, some, tweak + first); });
}

/// The label for false of a AND b, and its table: the half that the garbler can open, then the evaluator's.
inline Block garbled_and(const CipherKey& key, Block a, Block b, Block delta, int64_t tweak, uint8_t* table) {
  Block pads[4] = {a, a ^ delta, b, b ^ delta};
  hash_all(key, pads, {tweak, tweak, tweak + 1, tweak + 1});
  const Block garbler = pads[0] ^ pads[1] ^ (if_coloured(b) & delta), evaluator = pads[2] ^ pads[3] ^ a;
  store(garbler, table);
  store(evaluator, table + kLabelBytes);
  return pads[0] ^ (if_coloured(a) & garbler) ^ pads[2] ^ (if_coloured(b) & (evaluator ^ a));
}

void garble_gates(const CipherKey& key, const Gates& gates, int64_t first, int64_t last, const uint8_t* bits,
                  const uint8_t* delta_bytes, uint8_t* labels, int64_t tweak, uint8_t* tables) {
  const Block delta = load(delta_bytes);
  for (int64_t g = first; g < last; ++g) {
    const Block a = load(labels + gates.left[g] * kLabelBytes);
    Block out = a;
    if (gates.kinds[g] == kXor) {
      out ^= load(labels + gates.right[g] * kLabelBytes);
    } else if (gates.kinds[g] == kAnd) {
      out = garbled_and(key, a, load(labels + gates.right[g] * kLabelBytes), delta, tweak, tables);
      tweak += 2;
      tables += kTableBytes;
    } else if (gates.kinds[g] == kNot) {
      out ^= delta;
    } else {
      const long long mask = -static_cast<long long>(bits[gates.right[g]] & 1);
      out ^= Block{mask, mask} & delta;
    }
    store(out, labels + (gates.inputs + g) * kLabelBytes);
  }
}

void evaluate_gates(const CipherKey& key, const Gates& gates, int64_t first, int64_t last, uint8_t* labels,
                    int64_t tweak, const uint8_t* tables) {
  for (int64_t g = first; g < last; ++g) {
    const Block a = load(labels + gates.left[g] * kLabelBytes);
    Block out = a;
    if (gates.kinds[g] == kXor) {
      out ^= load(labels + gates.right[g] * kLabelBytes);
    } else if (gates.kinds[g] == kAnd) {
      const Block b = load(labels + gates.right[g] * kLabelBytes);
      Block pads[2] = {a, b};
      hash_all(key, pads, {tweak, tweak + 1});
      out = pads[0] ^ (if_coloured(a) & load(tables)) ^ pads[1] ^ (if_coloured(b) & (load(tables + kLabelBytes) ^ a));
      tweak += 2;
      tables += kTableBytes;
    }
    store(out, labels + (gates.inputs + g) * kLabelBytes);
  }
}

}  // namespace

namespace lilliput {

const GarblingTiles LILLIPUT_TILES{encrypt_blocks, hash_blocks, garble_gates, evaluate_gates};

}  // namespace lilliput

// Garbled circuits with half-gates and free XOR, and the AES under them.
//
// A wire has two labels of 16 bytes, W0 for false and W0 ^ delta for true; the lowest bit of delta is 1, so the lowest
// bit of a label (its colour) says which row of a table to open, and nothing else. An AND has a table of 32 bytes, all
// other gates have none. Labels become pads by   H(x, i) = p(p(x) ^ i) ^ p(x),   p AES-128 with the key of a session.
//
// Papers: Zahur, Rosulek & Evans, "Two Halves Make a Whole", 2015; Guo, Katz, Wang & Yu, "Efficient and Secure
// Multiparty Computation from Fixed-Key Block Ciphers", 2020 (H is their TMMO, robust under correlations with tweaks).
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int64_t kLabelBytes = 16;
constexpr int64_t kTableBytes = 32;
constexpr int kCipherRounds = 10;

/// The round keys of AES-128.
struct CipherKey {
  alignas(16) uint8_t rounds[kCipherRounds + 1][16];
};

enum GateKind : uint8_t { kXor, kAnd, kNot, kFlip };

/// Gates in the order in which they run; gate g writes wire `inputs + g`. They read wires written before them.
struct Gates {
  const uint8_t* kinds;
  const int32_t* left;
  const int32_t* right;  // of kXor and kAnd a wire, of kFlip the index of a bit that only the garbler knows
  int64_t inputs;
};

CipherKey expand_key(const uint8_t* key);
/// AES-128 of each block.
void encrypt(const CipherKey& key, const uint8_t* x, uint8_t* y, int64_t blocks);
/// H of block b with tweak `tweak + b`.
void hash_labels(const CipherKey& key, const uint8_t* x, uint8_t* y, int64_t blocks, int64_t tweak);
/// Labels for false of the wires that the gates first .. last-1 write, and their tables. ANDs use two tweaks each.
void garble(const CipherKey& key, const Gates& gates, int64_t first, int64_t last, const uint8_t* bits,
            const uint8_t* delta, uint8_t* labels, int64_t tweak, uint8_t* tables);
/// The one label of each wire that the evaluator can know.
void evaluate(const CipherKey& key, const Gates& gates, int64_t first, int64_t last, uint8_t* labels, int64_t tweak,
              const uint8_t* tables);
/// Whether the AES instructions of the machine are used.
bool hardware_cipher();

}  // namespace lilliput

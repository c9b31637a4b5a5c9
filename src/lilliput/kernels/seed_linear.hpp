// y = x W^T for weights that are regenerated from seeds (SeedLM): W is cut into blocks of C inputs of a row, and a block
// is 2^e U t with U (C, P) made of the states of a shift register after its seed.
//
// The register has 16 bits and shifts right; the bit that enters is the sum of bits 0, 1, 3 and 12 (taps 16, 15, 13, 4:
// all 2^16 - 1 states follow each other). U_cp = (v - 2^15) / (2^15 - 1) with v the state after c P + p + 1 steps. t are
// P signed numbers of 4 bits, e is 4 bits above the layer's `offset`. Two formats, in 16 rows side by side (a 32-bit lane
// each) and for each of them column after column of blocks:
//   4 bits  C = 8, P = 3: words of seed (low 16 bits), t (3 x 4 bits), e (the highest 4)
//   3 bits  C = 12, P = 4: words of seed and t (4 x 4 bits), then 8 bytes of e: rows 0-7 low, 8-15 high
// The last block of a row, and the last 16 rows, are filled up.
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int64_t kSeedRows = 16;
constexpr int kSeedStates = 65535;

/// W (rows, columns) in the layout above; the caller owns the memory. `bits` is 4 or 3.
struct SeedMatrix {
  const uint8_t* codes;
  int64_t rows, columns;
  int bits, offset;

  static constexpr int64_t block_rows = kSeedRows;
  int block_inputs() const { return bits == 4 ? 8 : 12; }  // C
  int terms() const { return bits == 4 ? 3 : 4; }          // P
  int64_t unit_bytes() const { return bits == 4 ? 64 : 72; }  // of 16 rows' blocks
  int64_t row_blocks() const { return (columns + block_inputs() - 1) / block_inputs(); }
  int64_t blocks() const { return (rows + kSeedRows - 1) / kSeedRows; }
  int64_t codes_bytes() const { return blocks() * row_blocks() * unit_bytes(); }
};

/// How the states after a seed are found: by running the register, or in a table of 256 KiB (512 KiB with 3 bits), which
/// fits an L2 and was faster by 5 to 16 % where both were timed (benchmarks/codebook.py).
enum class States { run, table };

/// Rows of the blocks of 16 rows first .. last-1 of y (tokens, rows).
void multiply(const SeedMatrix& matrix, const float* x, int64_t tokens, int64_t first_block, int64_t last_block, float* y,
              States states = States::table);

/// All of y (tokens, rows) = x (tokens, columns) W^T on up to `threads` threads. A token's result depends on neither the
/// other tokens nor the threads.
void seed_linear(const SeedMatrix& matrix, const float* x, int64_t tokens, float* y, int threads,
                 States states = States::table);

/// The seed, t and e of every block of W (rows, columns) that come closest to it, in the layout above at `codes`. Of each
/// block the `candidates` (1 .. 64) seeds that can hold most of its energy are tried; each t goes to its nearest number,
/// or, with `pick`, to that neighbour which makes the block's error least.
void seed_encode(const SeedMatrix& shape, const float* w, int candidates, bool pick, uint8_t* codes, int threads);

}  // namespace lilliput

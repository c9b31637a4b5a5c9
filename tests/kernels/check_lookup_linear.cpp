// The product by lookup on odd shapes without Python, to be built with sanitizers (test_sanitizers.py): every buffer is
// exactly as large as needed, so that a read or a write beside it is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "isa.hpp"
#include "lookup_linear.hpp"

using namespace lilliput;

namespace {

std::mt19937 generator(0);

float bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

/// 8 codes in `bits` bytes, first lowest.
int stored_code(int bits, const uint8_t* row, int64_t k) {
  int code = 0;
  for (int i = 0; i < bits; ++i) {
    const int64_t bit = k % 8 * bits + i;
    code |= (row[k / 8 * bits + bit / 8] >> (bit % 8) & 1) << i;
  }
  return code;
}

void require(bool right, const char* what, const LookupMatrix& m, int64_t tokens) {
  if (right) return;
  std::printf("%s: %s, rows %ld, columns %ld, group %ld, bits %d, tokens %ld\n", isa_name(isa()).c_str(), what,
              long(m.rows), long(m.columns), long(m.group), m.bits, long(tokens));
  std::exit(1);
}

void check(int64_t rows, int64_t columns, int64_t group, int bits, int threads) {
  LookupMatrix m{nullptr, nullptr, rows, columns, group, bits};
  const int64_t row_bytes = (columns + 7) / 8 * bits;
  std::vector<uint8_t> stored(rows * row_bytes), again(stored.size()), codes(m.codes_bytes());
  for (uint8_t& byte : stored) byte = static_cast<uint8_t>(generator());
  for (int64_t row = 0; columns % 8 && row < rows; ++row) {  // the filling of the last bytes is zero
    for (int64_t bit = columns % 8 * bits; bit < 8 * bits; ++bit) {
      stored[row * row_bytes + columns / 8 * bits + bit / 8] &= static_cast<uint8_t>(~(1 << bit % 8));
    }
  }
  std::vector<uint16_t> grid(m.grid_count());
  for (uint16_t& value : grid) value = static_cast<uint16_t>(0x3f00 + generator() % 128 + (generator() % 2 << 15));
  lookup_pack(m, stored.data(), codes.data());
  m.codes = codes.data();
  m.grid = grid.data();
  lookup_unpack(m, again.data());
  require(stored == again, "the layout does not give the codes back", m, 0);

  for (const int64_t tokens : {0, 1, 2, 5, 11}) {
    std::vector<float> x(tokens * columns), y(tokens * rows, -1.0f);
    for (float& value : x) value = std::normal_distribution<float>()(generator);
    lookup_linear(m, x.data(), tokens, y.data(), threads);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < rows; ++n) {
        double expected = 0, reach = 0;
        for (int64_t k = 0; k < columns; ++k) {
          const uint16_t* at = m.grid + n / 64 * m.block_grid() + k / group * 128 + n % 64;
          const int code = stored_code(bits, stored.data() + n * row_bytes, k) - (1 << (bits - 1));
          expected += (code * bfloat16(at[0]) + bfloat16(at[64])) * x[t * columns + k];
          reach += (1 << (bits - 1)) * std::abs(bfloat16(at[0]));
        }
        require(std::abs(expected - y[t * rows + n]) <= 0.03 * reach + 1e-3, "a wrong value", m, tokens);
      }
    }
  }
}

}  // namespace

int main() {
  for (const Isa set : available_isas()) {
    set_isa(isa_name(set));
    for (const int bits : {4, 3, 2, 1}) {
      for (const int threads : {1, 2}) {
        check(1, 1, 1, bits, threads);
        check(5, 7, 7, bits, threads);
        check(67, 31, 1, bits, threads);
        check(15, 15, 3, bits, threads);
        check(65, 96, 32, bits, threads);
        check(31, 192, 96, bits, threads);
        check(3, 200, 8, bits, threads);
        check(130, 36, 36, bits, threads);
        check(0, 32, 32, bits, threads);
        check(4, 0, 8, bits, threads);
      }
      check(700, 256, 64, bits, 3);
    }
  }
  std::puts("right");
}

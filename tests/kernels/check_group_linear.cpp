// The kernels on odd shapes without Python, to be built with sanitizers (test_sanitizers.py): every buffer is exactly as
// large as needed, so that a read or a write beside it is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "group_linear.hpp"
#include "isa.hpp"

using namespace lilliput;

namespace {

std::mt19937 generator(0);

float bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

/// 8 codes in `bits` bytes, first lowest; 8 bits are signed.
int stored_code(const PackedMatrix& m, const uint8_t* row, int64_t k) {
  if (m.bits == 8) return row[k] ^ 0x80;
  int code = 0;
  for (int i = 0; i < m.bits; ++i) {
    const int64_t bit = k % 8 * m.bits + i;
    code |= (row[k / 8 * m.bits + bit / 8] >> (bit % 8) & 1) << i;
  }
  return code;
}

void require(bool right, const char* what, const PackedMatrix& m, int64_t tokens) {
  if (right) return;
  std::printf("%s: %s, rows %ld, columns %ld, group %ld, bits %d, tokens %ld\n", isa_name(isa()).c_str(), what,
              long(m.rows), long(m.columns), long(m.group), m.bits, long(tokens));
  std::exit(1);
}

void check(int64_t rows, int64_t columns, int64_t group, int bits, int threads) {
  PackedMatrix m{nullptr, nullptr, rows, columns, group, bits};
  const int64_t row_bytes = bits == 8 ? columns : (columns + 7) / 8 * bits;
  std::vector<uint8_t> stored(rows * row_bytes), again(stored.size()), codes(m.codes_bytes());
  for (uint8_t& byte : stored) byte = static_cast<uint8_t>(generator());
  if (bits != 8 && columns % 8) {  // the filling of the last bytes is zero
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t bit = columns % 8 * bits; bit < 8 * bits; ++bit) {
        stored[row * row_bytes + columns / 8 * bits + bit / 8] &= static_cast<uint8_t>(~(1 << bit % 8));
      }
    }
  }
  std::vector<uint16_t> grid(m.grid_count());
  for (uint16_t& value : grid) value = static_cast<uint16_t>(0x3f00 + generator() % 128 + (generator() % 2 << 15));
  pack_codes(m, stored.data(), codes.data());
  m.codes = codes.data();
  m.grid = grid.data();
  unpack_codes(m, again.data());
  require(stored == again, "the layout does not give the codes back", m, 0);

  for (const int64_t tokens : {0, 1, 2, 5, 6, 40}) {
    std::vector<float> x(tokens * columns), y(tokens * rows, -1.0f);
    for (float& value : x) value = std::normal_distribution<float>()(generator);
    group_linear(m, x.data(), tokens, y.data(), threads);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < rows; ++n) {
        double expected = 0, reach = 0;
        for (int64_t k = 0; k < columns; ++k) {
          const uint16_t* at = m.grid + n / 16 * m.block_grid() + k / group * (bits == 8 ? 16 : 32) + n % 16;
          const double zero = bits == 8 ? 0.0 : bfloat16(at[16]);
          const int code = stored_code(m, stored.data() + n * row_bytes, k) - (1 << (bits - 1));
          expected += (code * bfloat16(at[0]) + zero) * x[t * columns + k];
          reach += std::abs(code * bfloat16(at[0]));
        }
        require(std::abs(expected - y[t * rows + n]) <= 0.02 * reach + 1e-3, "a wrong value", m, tokens);
      }
    }
  }
}

}  // namespace

int main() {
  for (const Isa set : available_isas()) {
    set_isa(isa_name(set));
    for (const int bits : {8, 4, 3, 2}) {
      for (const int threads : {1, 2}) {
        check(1, 1, 1, bits, threads);
        check(5, 7, 7, bits, threads);
        check(17, 31, 1, bits, threads);
        check(15, 15, 3, bits, threads);
        check(33, 96, 32, bits, threads);
        check(31, 96, 48, bits, threads);
        check(3, 200, 8, bits, threads);
        check(50, 36, 36, bits, threads);
        check(0, 32, 32, bits, threads);
        check(4, 0, 8, bits, threads);
      }
      check(700, 256, 64, bits, 3);
    }
  }
  std::puts("right");
}

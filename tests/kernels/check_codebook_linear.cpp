// codebook_linear on odd shapes without Python, to be built with sanitizers (test_sanitizers.py): every buffer is exactly
// as large as needed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "codebook_linear.hpp"
#include "isa.hpp"

using namespace lilliput;

namespace {

std::mt19937 generator(0);

void check(int64_t rows, int64_t columns, int64_t group, int bits, bool shared, int threads) {
  CodebookMatrix m{nullptr, nullptr, nullptr, rows, columns, group, bits, shared};
  const PackedMatrix packed = m.packed();
  const int64_t row_bytes = (columns + 7) / 8 * bits;
  std::vector<uint8_t> stored(rows * row_bytes), codes(packed.codes_bytes());
  for (uint8_t& byte : stored) byte = static_cast<uint8_t>(generator());
  pack_codes(packed, stored.data(), codes.data());
  std::vector<uint16_t> scale(m.scale_count(), 0x3f80);  // 1
  std::vector<int8_t> tables(m.tables_bytes());
  for (int8_t& entry : tables) entry = static_cast<int8_t>(generator());
  m.codes = codes.data(), m.scale = scale.data(), m.tables = tables.data();
  for (const int64_t tokens : {0, 1, 3, 20}) {
    std::vector<float> x(tokens * columns), y(tokens * rows, -1.0f);
    for (float& value : x) value = static_cast<float>(generator() % 3) - 1.0f;  // exact as 8 bits
    codebook_linear(m, x.data(), tokens, y.data(), threads);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < rows; ++n) {
        double expected = 0;
        for (int64_t k = 0; k < columns; ++k) {
          uint32_t word = 0;
          std::memcpy(&word, &stored[n * row_bytes + k / 8 * bits], bits);
          const int64_t code = word >> (k % 8 * bits) & ((1 << bits) - 1);
          const int64_t table = (shared ? 0 : n / 4 * 16) + n % 4 / (1 << (bits - 2)) * (1 << bits);
          expected += tables[table + code] * x[t * columns + k];
        }
        if (std::abs(expected - y[t * rows + n]) > 1e-3 * (std::abs(expected) + 10)) {
          std::printf("%s: row %ld is %f, not %f\n", isa_name(isa()).c_str(), long(n), y[t * rows + n], expected);
          std::exit(1);
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (const Isa set : available_isas()) {
    set_isa(isa_name(set));
    for (const int bits : {4, 3, 2}) {
      for (const bool shared : {true, false}) {
        check(1, 1, 1, bits, shared, 1);
        check(17, 31, 31, bits, shared, 2);
        check(33, 96, 32, bits, shared, 2);
        check(50, 36, 36, bits, shared, 1);
        check(0, 32, 32, bits, shared, 1);
        check(4, 0, 32, bits, shared, 1);
        check(700, 256, 64, bits, shared, 3);
      }
    }
  }
  std::puts("right");
}

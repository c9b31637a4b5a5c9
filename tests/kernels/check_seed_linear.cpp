// seed_linear and seed_encode on odd shapes without Python, to be built with sanitizers (test_sanitizers.py): every
// buffer is exactly as large as needed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "isa.hpp"
#include "seed_linear.hpp"

using namespace lilliput;

namespace {

std::mt19937 generator(0);

std::vector<float> random_values(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

void require(bool right, const char* what, const SeedMatrix& m) {
  if (right) return;
  std::printf("%s: %s, %ld x %ld, bits %d\n", isa_name(isa()).c_str(), what, long(m.rows), long(m.columns), m.bits);
  std::exit(1);
}

/// Any bytes are codes; products of one token and of many, by running the register and by the table, are the same.
void check_products(int64_t rows, int64_t columns, int bits, int threads) {
  SeedMatrix m{nullptr, rows, columns, bits, -12};
  std::vector<uint8_t> codes(m.codes_bytes());
  for (uint8_t& byte : codes) byte = static_cast<uint8_t>(generator());
  m.codes = codes.data();
  const int64_t tokens = 11;
  const std::vector<float> x = random_values(tokens * columns);
  std::vector<float> all(tokens * rows, -1.0f), one(rows, -1.0f);
  seed_linear(m, x.data(), tokens, all.data(), threads);
  for (int64_t t = 0; t < tokens; ++t) {
    seed_linear(m, x.data() + t * columns, 1, one.data(), threads, t % 2 ? States::run : States::table);
    for (int64_t n = 0; n < rows; ++n) require(one[n] == all[t * rows + n], "a token differs beside others", m);
  }
}

/// What is found has less error than nothing.
void check_search(int64_t rows, int64_t columns, int bits, int threads) {
  SeedMatrix m{nullptr, rows, columns, bits, -14};
  std::vector<uint8_t> codes(m.codes_bytes());
  const std::vector<float> w = random_values(rows * columns);
  seed_encode(m, w.data(), 3, true, codes.data(), threads);
  m.codes = codes.data();
  std::vector<float> x(columns), y(rows);
  double error = 0, size = 0;
  for (int64_t k = 0; k < columns; ++k) {
    x[k] = 1;
    seed_linear(m, x.data(), 1, y.data(), threads);
    x[k] = 0;
    for (int64_t n = 0; n < rows; ++n) {
      const double exact = w[n * columns + k];
      error += (exact - y[n]) * (exact - y[n]), size += exact * exact;
    }
  }
  require(error <= 0.2 * size, "the search found nothing near", m);
}

}  // namespace

int main() {
  for (const Isa set : available_isas()) {
    set_isa(isa_name(set));
    for (const int bits : {4, 3}) {
      check_products(1, 1, bits, 1);
      check_products(17, 31, bits, 2);
      check_products(33, 96, bits, 3);
      check_products(0, 32, bits, 1);
      check_products(4, 0, bits, 1);
      check_products(300, 60, bits, 3);
      if (set == available_isas().back()) check_search(5, 19, bits, 2);
    }
  }
  std::puts("right");
}

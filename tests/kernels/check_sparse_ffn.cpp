// sparse_ffn on odd shapes without Python, to be built with sanitizers (test_sanitizers.py): every buffer is exactly as
// large as needed. Values are compared with sums over all neurons in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "isa.hpp"
#include "sparse_ffn.hpp"

using namespace lilliput;

namespace {

std::mt19937 generator(0);

/// Rows with the values that they stand for.
struct Made {
  RowMatrix m;
  std::vector<uint8_t> bytes;
  std::vector<uint16_t> grid;
  std::vector<double> means;
};

double float_of(const uint8_t* from, int64_t i) {
  float value;
  std::memcpy(&value, from + 4 * i, sizeof value);
  return value;
}

double bfloat16_of(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

/// Column `c` of a row that begins at `row`.
double value_of(const Made& made, int64_t row, int64_t c) {
  const RowMatrix& m = made.m;
  const uint8_t* at = made.bytes.data() + row * m.row_bytes();
  const uint16_t* grid = made.grid.data() + row * m.row_grid();
  if (m.format == RowFormat::float32) return float_of(at, c);
  if (m.format == RowFormat::bfloat16) return bfloat16_of(at[2 * c] | at[2 * c + 1] << 8);
  if (m.format == RowFormat::int8) return static_cast<int8_t>(at[c]) * bfloat16_of(grid[0]);
  const uint8_t pair = at[c / 32 * 16 + c % 16];
  const int code = (c % 32 < 16 ? pair & 15 : pair >> 4) - 8;
  return code * bfloat16_of(grid[c / m.group * 2]) + bfloat16_of(grid[c / m.group * 2 + 1]);
}

Made make(RowFormat format, int64_t rows, int64_t columns, int64_t group) {
  Made made{{format, nullptr, nullptr, rows, columns, group}, {}, {}, {}};
  made.bytes.resize(rows * made.m.row_bytes());
  if (made.m.dense()) {
    const int64_t width = format == RowFormat::float32 ? 4 : 2;
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float value = std::normal_distribution<float>()(generator);
      std::memcpy(made.bytes.data() + width * i, reinterpret_cast<const uint8_t*>(&value) + 4 - width, width);
    }
  } else {
    for (uint8_t& byte : made.bytes) byte = static_cast<uint8_t>(generator());
    made.grid.resize(rows * made.m.row_grid());
    for (uint16_t& value : made.grid) value = static_cast<uint16_t>(0x3c00 + generator() % 128);
  }
  made.m.values = made.bytes.data();
  made.m.grid = made.grid.data();
  for (int64_t i = 0; i < rows * columns; ++i) made.means.push_back(value_of(made, i / columns, i % columns));
  return made;
}

std::vector<float> random(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = std::normal_distribution<float>()(generator);
  return values;
}

void check(RowFormat format, int64_t inputs, int64_t neurons, int64_t outputs, bool gated, int threads) {
  const auto group = [&](int64_t columns) { return columns % 64 == 0 ? 32 : columns; };
  const Made up = make(format, neurons, inputs, group(inputs)), down = make(format, neurons, outputs, group(outputs));
  const std::vector<float> up_bias = random(neurons), down_bias = random(outputs);
  SparseFfn ffn{std::nullopt, up_bias.data(), down.m, down_bias.data(), gated, 0.2f};
  if (gated) ffn.up = up.m;
  for (const int64_t tokens : {0, 1, 3, 33}) {
    const std::vector<float> x = random(tokens * inputs), gate = random(tokens * neurons);
    std::vector<float> y(tokens * outputs);
    sparse_ffn(ffn, x.data(), gate.data(), tokens, y.data(), threads);
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> expected(down_bias.begin(), down_bias.end());
      double reach = 1.0;
      for (int64_t j = 0; j < neurons; ++j) {
        double hidden = gate[t * neurons + j];
        if (gated) {
          double product = up_bias[j];
          for (int64_t k = 0; k < inputs; ++k) product += up.means[j * inputs + k] * x[t * inputs + k];
          hidden = std::max(0.0, hidden - 0.2f) * product;
        }
        for (int64_t c = 0; c < outputs; ++c) expected[c] += hidden * down.means[j * outputs + c];
        reach += std::abs(hidden);
      }
      for (int64_t c = 0; c < outputs; ++c) {
        if (std::abs(expected[c] - y[t * outputs + c]) <= 1e-4 * reach) continue;
        std::printf("%s: format %d, %ld x %ld x %ld, %ld tokens: %g, not %g\n", isa_name(isa()).c_str(), int(format),
                    long(inputs), long(neurons), long(outputs), long(tokens), y[t * outputs + c], expected[c]);
        std::exit(1);
      }
    }
  }
}

}  // namespace

int main() {
  for (const Isa set : available_isas()) {
    set_isa(isa_name(set));
    for (const RowFormat format : {RowFormat::float32, RowFormat::bfloat16, RowFormat::int8, RowFormat::int4}) {
      for (const int threads : {1, 2, 3}) {
        check(format, 1, 1, 1, true, threads);
        check(format, 7, 5, 31, true, threads);
        check(format, 33, 0, 5, true, threads);
        check(format, 64, 50, 128, true, threads);
        check(format, 100, 77, 65, false, threads);
      }
      check(format, 256, 700, 192, true, 3);
    }
  }
  std::puts("right");
}

// Products of signs on odd shapes without Python, to be built with sanitizers (test_sanitizers.py): every buffer is
// exactly as large as needed, so that a read or a write beside it is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "binary_conv2d.hpp"
#include "binary_linear.hpp"
#include "isa.hpp"

using namespace lilliput;

namespace {

std::mt19937 generator(0);

std::vector<float> normal(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = std::normal_distribution<float>()(generator);
  return values;
}

void require(bool right, const char* what, long a, long b, long c) {
  if (right) return;
  std::printf("%s: %s, %ld %ld %ld\n", isa_name(isa()).c_str(), what, a, b, c);
  std::exit(1);
}

/// Random signs in the layout, and as +1 and -1.
struct Weights {
  std::vector<uint8_t> codes;
  std::vector<float> scale, signs;
  SignMatrix matrix;

  Weights(int64_t rows, int64_t segments, int64_t inputs)
      : scale(normal(rows)), matrix{nullptr, scale.data(), rows, segments, inputs} {
    std::vector<uint8_t> positive(rows * segments * inputs);
    for (uint8_t& value : positive) value = generator() % 2 ? generator() % 255 + 1 : 0;
    codes.resize(matrix.codes_bytes());
    signs.resize(positive.size());
    pack_signs(matrix, positive.data(), codes.data());
    matrix.codes = codes.data();
    unpack_signs(matrix, signs.data());
    for (size_t i = 0; i < signs.size(); ++i) {
      require(signs[i] == (positive[i] ? 1.0f : -1.0f), "the layout loses signs", rows, segments, inputs);
    }
  }
};

double binarized(const Binarizer& how, float x, int64_t input) {
  float r = how.shift ? x - how.shift[input] : x, sum = 0;
  for (int p = 0; p < how.planes; ++p) {
    const float plane = r >= 0 ? how.levels[p] : -how.levels[p];
    sum += plane;
    r -= plane;
  }
  return sum;
}

void check_linear(int64_t rows, int64_t inputs, int planes, bool by_mean, int threads) {
  const Weights w(rows, 1, inputs);
  const std::vector<float> levels{1.0f, 0.5f, 0.25f}, shift = normal(inputs);
  const std::vector<float> used(levels.begin(), levels.begin() + planes);
  const Binarizer how{used.data(), planes, by_mean ? shift.data() : nullptr, by_mean};
  for (const int64_t tokens : {0, 1, 2, 7, 12, 31, 60}) {
    const std::vector<float> x = normal(tokens * inputs);
    std::vector<float> y(tokens * rows, -1.0f), real(tokens * rows, -1.0f);
    binary_linear(w.matrix, how, x.data(), tokens, y.data(), threads);
    binary_weight_linear(w.matrix, x.data(), tokens, real.data(), threads);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < rows; ++n) {
        double sum = 0, mean = 0, straight = 0;
        for (int64_t k = 0; k < inputs; ++k) {
          const float value = x[t * inputs + k];
          sum += w.signs[n * inputs + k] * binarized(how, value, k);
          straight += w.signs[n * inputs + k] * value;
          if (by_mean) mean += std::abs(value - shift[k]) / static_cast<double>(inputs);
        }
        const double expected = sum * w.scale[n] * (by_mean ? mean : 1.0);
        const double slack = 1e-4 * (1 + static_cast<double>(inputs));
        require(std::abs(expected - y[t * rows + n]) <= slack, "a wrong product of signs", rows, inputs, tokens);
        require(std::abs(straight * w.scale[n] - real[t * rows + n]) <= slack, "a wrong product", rows, inputs, tokens);
      }
    }
  }
}

void check_conv(ConvShape shape, int64_t rows, int planes, int threads) {
  const Weights w(rows, shape.taps(), shape.channels);
  const std::vector<float> levels{1.0f, 0.5f, 0.25f}, shift = normal(shape.channels);
  const std::vector<float> used(levels.begin(), levels.begin() + planes);
  const Binarizer how{used.data(), planes, shift.data(), false};
  const int64_t height = shape.output(0), width = shape.output(1), area = shape.height * shape.width;
  const std::vector<float> x = normal(shape.pictures * shape.channels * area);
  std::vector<float> y(shape.pictures * rows * height * width);
  binary_conv2d(w.matrix, how, shape, x.data(), y.data(), threads);
  for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
    const bool last = shape.channels_last;
    const int64_t positions = height * width, picture = i / (rows * positions);
    const int64_t n = last ? i % rows : i / positions % rows, place = last ? i / rows % positions : i % positions;
    double expected = 0;
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      const int64_t r = place / width * shape.stride[0] - shape.padding[0] + tap / shape.kernel[1] * shape.dilation[0];
      const int64_t c = place % width * shape.stride[1] - shape.padding[1] + tap % shape.kernel[1] * shape.dilation[1];
      if (r < 0 || r >= shape.height || c < 0 || c >= shape.width) continue;
      for (int64_t k = 0; k < shape.channels; ++k) {
        const int64_t pixel = r * shape.width + c;
        const int64_t at =
            last ? (picture * area + pixel) * shape.channels + k : (picture * shape.channels + k) * area + pixel;
        expected += w.signs[(n * shape.taps() + tap) * shape.channels + k] * binarized(how, x[at], k);
      }
    }
    require(std::abs(expected * w.scale[n] - y[i]) < 1e-2, "a wrong convolution", rows, shape.channels, i);
  }
}

}  // namespace

int main() {
  for (const Isa set : available_isas()) {
    set_isa(isa_name(set));
    for (const int threads : {1, 2}) {
      for (const int planes : {1, 2, 3}) {
        for (const bool by_mean : {false, true}) {
          check_linear(1, 1, planes, by_mean, threads);
          check_linear(17, 31, planes, by_mean, threads);
          check_linear(16, 32, planes, by_mean, threads);
          check_linear(70, 1100, planes, by_mean, threads);
          check_linear(0, 5, planes, by_mean, threads);
        }
        for (const bool last : {false, true}) {
          check_conv({2, 20, 9, 11, {3, 3}, {1, 1}, {1, 1}, {1, 1}, last}, 17, planes, threads);
          check_conv({1, 33, 7, 6, {3, 2}, {2, 1}, {2, 0}, {1, 1}, last}, 40, planes, threads);
          check_conv({1, 8, 3, 3, {5, 5}, {1, 1}, {4, 3}, {1, 2}, last}, 16, planes, threads);
          check_conv({1, 64, 5, 5, {1, 1}, {2, 2}, {0, 0}, {1, 1}, last}, 5, planes, threads);
        }
      }
      check_linear(3, 0, 1, false, threads);
    }
  }
  std::puts("right");
}

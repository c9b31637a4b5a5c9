// The decoder on odd shapes without Python, to be built with sanitizers (test_sanitizers.py): every buffer is exactly as
// large as needed. A prompt at once and token by token must give the same logits.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <vector>

#include "decoder.hpp"
#include "isa.hpp"

using namespace lilliput;

namespace {

std::mt19937 generator(0);
std::deque<std::vector<float>> floats;  // memory of the weights
std::deque<std::vector<uint8_t>> codes;
std::deque<std::vector<uint16_t>> grids;

const float* random_floats(int64_t count, float spread = 0.3f) {
  std::vector<float>& values = floats.emplace_back(count);
  for (float& value : values) value = std::normal_distribution<float>(0.0f, spread)(generator);
  return values.data();
}

const uint8_t* random_bytes(int64_t count) {
  std::vector<uint8_t>& bytes = codes.emplace_back(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
  return bytes.data();
}

const uint16_t* small_grid(int64_t count) { return grids.emplace_back(count, 0x3c00).data(); }  // 2^-7

Matrix packed(int64_t rows, int64_t columns, int64_t group, int bits) {
  PackedMatrix m{nullptr, nullptr, rows, columns, bits == 8 ? columns : group, bits};
  m.codes = random_bytes(m.codes_bytes());
  m.grid = small_grid(m.grid_count());
  return m;
}

Matrix lookup(int64_t rows, int64_t columns, int bits) {
  LookupMatrix m{nullptr, nullptr, rows, columns, columns, bits};
  m.codes = random_bytes(m.codes_bytes());
  m.grid = small_grid(m.grid_count());
  return m;
}

Matrix codebook(int64_t rows, int64_t columns, int bits, bool shared) {
  CodebookMatrix m{nullptr, nullptr, nullptr, rows, columns, columns, bits, shared};
  m.codes = random_bytes(m.packed().codes_bytes());
  m.scale = grids.emplace_back(m.scale_count(), 0x3900).data();  // 2^-13
  m.tables = reinterpret_cast<const int8_t*>(random_bytes(m.tables_bytes()));
  return m;
}

Matrix seeds(int64_t rows, int64_t columns, int bits) {
  SeedMatrix m{nullptr, rows, columns, bits, -19};
  m.codes = random_bytes(m.codes_bytes());
  return m;
}

Matrix dense(int64_t rows, int64_t columns) { return DenseMatrix{random_floats(rows * columns), rows, columns, false}; }

/// Another format each time.
Linear linear(int64_t rows, int64_t columns) {
  static int turn = 0;
  const float* bias = turn % 2 ? random_floats(rows) : nullptr;
  switch (turn++ % 8) {
    case 0:
      return {{dense(rows, columns)}, bias};
    case 1:
      return {{packed(rows, columns, 1, 4)}, bias};
    case 2:
      return {{dense(7, columns), packed(rows, 7, 7, 3)}, bias};
    case 3:
      return {{lookup(rows, columns, 3)}, bias};
    case 4:
      return {{codebook(rows, columns, 4, true)}, bias};
    case 5:
      return {{seeds(rows, columns, 4)}, bias};
    case 6:
      return {{seeds(7, columns, 3), codebook(rows, 7, 2, false)}, bias};
    default:
      return {{packed(rows, columns, columns, 8)}, bias};
  }
}

SparseFfn sparse(int64_t neurons, int64_t width) {
  const auto rows = [&] {
    return RowMatrix{RowFormat::float32, random_floats(neurons * width), nullptr, neurons, width, width};
  };
  return {rows(), random_floats(neurons), rows(), nullptr, true, 0.1f};
}

void check(int64_t width, int64_t heads, int64_t kv_heads, int64_t dim, int64_t middle, int64_t window, int threads) {
  const int64_t vocabulary = 21, length = 141, blocks = 3;
  const auto norm = [](int64_t size) { return Norm{random_floats(size), 1e-6f, 1.0f}; };
  Decoder decoder(width, norm(width), linear(vocabulary, width));
  for (int64_t i = 0; i < blocks; ++i) {
    decoder.add_block({norm(width), norm(dim), norm(dim), norm(width), norm(width), i ? norm(width) : Norm{},
                       linear(heads * dim, width), linear(kv_heads * dim, width), linear(kv_heads * dim, width),
                       linear(width, heads * dim), linear(middle, width),
                       i == 2 ? Linear{} : linear(middle, width), i == 2 ? Linear{} : linear(width, middle), heads,
                       kv_heads, dim, 0.3f, window, 0, i ? Activation::relu : Activation::gelu_tanh,
                       i == 2 ? std::optional(sparse(middle, width)) : std::nullopt});
  }
  const Rotary rotary{random_floats(length * dim), random_floats(length * dim)};
  const float* inputs = random_floats(length * width, 1.0f);
  std::vector<float> all(length * vocabulary), one(vocabulary);
  for (const int64_t together : {length, int64_t{1}, int64_t{2}, int64_t{19}}) {
    std::vector<std::vector<float>> memory(2 * blocks, std::vector<float>(kv_heads * length * dim));
    std::vector<Cache> caches;
    for (int64_t i = 0; i < blocks; ++i) caches.push_back({memory[2 * i].data(), memory[2 * i + 1].data()});
    const Sequence sequence{caches.data(), length};
    for (int64_t start = 0; start < length; start += together) {
      const int64_t tokens = std::min(together, length - start);
      std::vector<float> hidden(inputs + start * width, inputs + (start + tokens) * width);
      std::vector<Place> places;
      for (int64_t t = 0; t < tokens; ++t) places.push_back({0, start + t});
      const bool whole = together == length;
      decoder.run(places.data(), tokens, hidden.data(), &sequence, &rotary, whole ? all.data() : one.data(),
                  whole ? 0 : tokens - 1, threads);
      for (int64_t i = 0; i < vocabulary && !whole; ++i) {
        const float expected = all[(start + tokens - 1) * vocabulary + i];
        if (!(std::abs(one[i] - expected) <= 0.1f * (1.0f + std::abs(expected)))) {
          std::printf("%s: position %ld, %ld together: %f, not %f\n", isa_name(isa()).c_str(), long(start),
                      long(together), one[i], expected);
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
    for (const int threads : {1, 2, 3}) {
      check(5, 3, 1, 2, 7, 1000, threads);
      check(33, 4, 2, 10, 50, 9, threads);
      check(32, 2, 2, 72, 64, 1, threads);
    }
  }
  std::puts("right");
}

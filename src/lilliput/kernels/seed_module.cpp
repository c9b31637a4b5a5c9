// seed_linear and seed_encode as Python sees them: addresses and sizes; seed_linear.py checks them.
#include "module.hpp"
#include "seed_linear.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

void bind(nb::module_& m) {
  const auto free_gil = nb::call_guard<nb::gil_scoped_release>();
  m.def("seed_linear_bytes", [](int64_t rows, int64_t columns, int bits) {
    return SeedMatrix{nullptr, rows, columns, bits, 0}.codes_bytes();
  });
  m.def(
      "seed_linear",
      [](uintptr_t x, uintptr_t codes, uintptr_t y, int64_t tokens, int64_t rows, int64_t columns, int bits, int offset,
         int threads, bool table) {
        const SeedMatrix matrix{at<const uint8_t>(codes), rows, columns, bits, offset};
        seed_linear(matrix, at<const float>(x), tokens, at<float>(y), threads, table ? States::table : States::run);
      },
      free_gil);
  m.def(
      "seed_encode",
      [](uintptr_t w, uintptr_t codes, int64_t rows, int64_t columns, int bits, int offset, int candidates, bool pick,
         int threads) {
        const SeedMatrix shape{nullptr, rows, columns, bits, offset};
        seed_encode(shape, at<const float>(w), candidates, pick, at<uint8_t>(codes), threads);
      },
      free_gil);
}

const Binding binding(bind);

}  // namespace
}  // namespace lilliput

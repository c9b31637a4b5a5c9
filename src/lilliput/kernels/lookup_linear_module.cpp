// lookup_linear as Python sees it: addresses and sizes; lookup_linear.py checks them.
#include "lookup_linear.hpp"

#include "module.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

LookupMatrix matrix(uintptr_t codes, uintptr_t grid, int64_t rows, int64_t columns, int64_t group, int bits) {
  return {at<const uint8_t>(codes), at<const uint16_t>(grid), rows, columns, group, bits};
}

void bind(nb::module_& m) {
  const auto free_gil = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "lookup_linear_sizes",
      [](int64_t rows, int64_t columns, int64_t group, int bits) {
        const LookupMatrix shape = matrix(0, 0, rows, columns, group, bits);
        return nb::make_tuple(shape.codes_bytes(), shape.grid_count());
      },
      "bytes of codes and number of grid values of the executed layout");
  m.def(
      "lookup_linear_pack",
      [](uintptr_t stored, uintptr_t packed, int64_t rows, int64_t columns, int64_t group, int bits) {
        lookup_pack(matrix(0, 0, rows, columns, group, bits), at<const uint8_t>(stored), at<uint8_t>(packed));
      },
      free_gil);
  m.def(
      "lookup_linear_unpack",
      [](uintptr_t packed, uintptr_t stored, int64_t rows, int64_t columns, int64_t group, int bits) {
        lookup_unpack(matrix(packed, 0, rows, columns, group, bits), at<uint8_t>(stored));
      },
      free_gil);
  m.def(
      "lookup_linear",
      [](uintptr_t x, uintptr_t codes, uintptr_t grid, uintptr_t y, int64_t tokens, int64_t rows, int64_t columns,
         int64_t group, int bits, int threads) {
        lookup_linear(matrix(codes, grid, rows, columns, group, bits), at<const float>(x), tokens, at<float>(y), threads);
      },
      free_gil);
}

const Binding binding(bind);

}  // namespace
}  // namespace lilliput

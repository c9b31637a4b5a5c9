// Binds an operation on packed matrices: sizes of its layout, into it and out of it, and the product.
#pragma once

#include <string>

#include "module.hpp"

namespace lilliput {

template <class Matrix, auto Pack, auto Unpack, auto Multiply>
void bind_packed(nanobind::module_& m, const std::string& name) {
  const auto others_may_run = nanobind::call_guard<nanobind::gil_scoped_release>();
  m.def(
      (name + "_sizes").c_str(),
      [](int64_t rows, int64_t columns, int64_t group, int bits) {
        const Matrix shape{nullptr, nullptr, rows, columns, group, bits};
        return nanobind::make_tuple(shape.codes_bytes(), shape.grid_count());
      },
      "bytes of codes and number of grid values of the executed layout");
  m.def(
      (name + "_pack").c_str(),
      [](uintptr_t stored, uintptr_t packed, int64_t rows, int64_t columns, int64_t group, int bits) {
        Pack(Matrix{nullptr, nullptr, rows, columns, group, bits}, at<const uint8_t>(stored), at<uint8_t>(packed));
      },
      others_may_run);
  m.def(
      (name + "_unpack").c_str(),
      [](uintptr_t packed, uintptr_t stored, int64_t rows, int64_t columns, int64_t group, int bits) {
        Unpack(Matrix{at<const uint8_t>(packed), nullptr, rows, columns, group, bits}, at<uint8_t>(stored));
      },
      others_may_run);
  m.def(
      name.c_str(),
      [](uintptr_t x, uintptr_t codes, uintptr_t grid, uintptr_t y, int64_t tokens, int64_t rows, int64_t columns,
         int64_t group, int bits, int threads) {
        const Matrix matrix{at<const uint8_t>(codes), at<const uint16_t>(grid), rows, columns, group, bits};
        Multiply(matrix, at<const float>(x), tokens, at<float>(y), threads);
      },
      others_may_run);
}

}  // namespace lilliput

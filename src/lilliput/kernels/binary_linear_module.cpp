// binary_linear as Python sees it: addresses and sizes; binary_linear.py checks them.
#include "binary_linear.hpp"

#include "binary_linear_tiles.hpp"
#include "module.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

SignMatrix matrix(uintptr_t codes, uintptr_t scale, int64_t rows, int64_t segments, int64_t segment_inputs) {
  return {at<const uint8_t>(codes), at<const float>(scale), rows, segments, segment_inputs};
}

void bind(nb::module_& m) {
  const auto free_gil = nb::call_guard<nb::gil_scoped_release>();
  m.def("binary_linear_isa", &binary_linear_isa, "the copy of the inner loops in use: scalar, avx2 or avx512");
  m.def(
      "binary_linear_peak", [](int64_t rounds) { return binary_linear_tiles().peak(rounds); }, free_gil,
      "compares and counts signs in registers; how many");
  m.def(
      "binary_linear_size",
      [](int64_t rows, int64_t segments, int64_t segment_inputs) {
        return matrix(0, 0, rows, segments, segment_inputs).codes_bytes();
      },
      "bytes of the layout");
  m.def(
      "binary_linear_pack",
      [](uintptr_t positive, uintptr_t codes, int64_t rows, int64_t segments, int64_t segment_inputs) {
        pack_signs(matrix(0, 0, rows, segments, segment_inputs), at<const uint8_t>(positive), at<uint8_t>(codes));
      },
      free_gil);
  m.def(
      "binary_linear_unpack",
      [](uintptr_t codes, uintptr_t signs, int64_t rows, int64_t segments, int64_t segment_inputs) {
        unpack_signs(matrix(codes, 0, rows, segments, segment_inputs), at<float>(signs));
      },
      free_gil);
  m.def(
      "binary_linear",
      [](uintptr_t x, uintptr_t codes, uintptr_t scale, uintptr_t levels, int planes, uintptr_t shift, bool by_mean,
         uintptr_t y, int64_t tokens, int64_t rows, int64_t inputs, int threads) {
        const Binarizer how{at<const float>(levels), planes, at<const float>(shift), by_mean};
        binary_linear(matrix(codes, scale, rows, 1, inputs), how, at<const float>(x), tokens, at<float>(y), threads);
      },
      free_gil);
  m.def(
      "binary_weight_linear",
      [](uintptr_t x, uintptr_t codes, uintptr_t scale, uintptr_t y, int64_t tokens, int64_t rows, int64_t inputs,
         int threads) {
        const SignMatrix weights = matrix(codes, scale, rows, 1, inputs);
        binary_weight_linear(weights, at<const float>(x), tokens, at<float>(y), threads);
      },
      free_gil);
}

const Binding binding(bind);

}  // namespace
}  // namespace lilliput

// binary_conv2d as Python sees it: addresses and sizes; binary_conv2d.py checks them.
#include "binary_conv2d.hpp"

#include <array>

#include <nanobind/stl/array.h>

#include "module.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

using Pair = std::array<int64_t, 2>;
using Sizes = std::array<int64_t, 4>;

void bind(nb::module_& m) {
  m.def(
      "binary_conv2d",
      [](uintptr_t x, Sizes size, bool channels_last, uintptr_t codes, uintptr_t scale, int64_t rows, uintptr_t levels,
         int planes, uintptr_t shift, bool by_mean, Pair kernel, Pair stride, Pair padding, Pair dilation, uintptr_t y,
         int threads) {
        const ConvShape shape{size[0],
                              size[1],
                              size[2],
                              size[3],
                              {kernel[0], kernel[1]},
                              {stride[0], stride[1]},
                              {padding[0], padding[1]},
                              {dilation[0], dilation[1]},
                              channels_last};
        const SignMatrix weights{at<const uint8_t>(codes), at<const float>(scale), rows, shape.taps(), shape.channels};
        const Binarizer how{at<const float>(levels), planes, at<const float>(shift), by_mean};
        binary_conv2d(weights, how, shape, at<const float>(x), at<float>(y), threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

const Binding binding(bind);

}  // namespace
}  // namespace lilliput

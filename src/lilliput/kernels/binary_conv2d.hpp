// A 2-D convolution with weights that are signs, on the layout and the tiles of binary_linear.
//
// Pixels are packed once, channels side by side; an output position is then a token whose segments are its taps. A
// place outside the picture counts nothing (as a zero would): its bits are 0, which stands for -1, and the sums of the
// weights at such taps are added again, as integers.
#pragma once

#include "binary_linear.hpp"

namespace lilliput {

struct ConvShape {
  int64_t pictures, channels, height, width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  bool channels_last;  // of x and y

  int64_t output(int axis) const {
    const int64_t size = axis ? width : height;
    return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  int64_t taps() const { return kernel[0] * kernel[1]; }
};

/// y (pictures, rows, output(0), output(1)) from x (pictures, channels, height, width), both in the memory format of
/// the shape. `how.by_mean` multiplies a position with the mean over all taps of the pixels means, 0 where outside.
void binary_conv2d(const SignMatrix& matrix, const Binarizer& how, const ConvShape& shape, const float* x, float* y,
                   int threads);

}  // namespace lilliput

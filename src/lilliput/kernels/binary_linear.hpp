// Products with weights that are signs: y_tn = k_t scale_n sum_k sign(w_nk) x_tk, one bit for a weight.
//
// The inputs of a row are `segments` of equal length (the taps of a convolution; a linear layer has one), each filled
// up to whole bytes; a row is filled up to whole 32-bit words. Bit i of byte j of a segment is input 8 j + i, 1 for +1;
// filling is 0. 16 rows (a block) stand side by side, a 32-bit lane each: word i of a block is 64 bytes.
//
// Activations are `planes` of signs with a coefficient each (residual binarisation): r_0 = x - shift,
// b_m = r_m >= 0 ? +1 : -1, r_m+1 = r_m - level_m b_m, and x ~ sum_m level_m b_m. Then
//     sum_k sign(w_nk) x_tk = sum_m level_m (inputs - 2 popcount(w_n xor b_tm)).
// Zero and minus zero count as +1, NaN as -1.
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int64_t kSignRows = 16, kSignVectorBytes = 64, kSignWordBytes = 4;
constexpr int kMaxPlanes = 3;

/// Signs (rows, segments * segment_inputs) in the layout above with a scale for each row; the caller owns the memory.
struct SignMatrix {
  const uint8_t* codes;
  const float* scale;
  int64_t rows, segments, segment_inputs;

  int64_t inputs() const { return segments * segment_inputs; }
  int64_t segment_bytes() const { return (segment_inputs + 7) / 8; }
  int64_t row_bytes() const { return segments * segment_bytes(); }
  int64_t words() const { return (row_bytes() + kSignWordBytes - 1) / kSignWordBytes; }
  int64_t blocks() const { return (rows + kSignRows - 1) / kSignRows; }
  int64_t block_bytes() const { return words() * kSignVectorBytes; }
  int64_t codes_bytes() const { return blocks() * block_bytes(); }
};

/// How activations become signs.
struct Binarizer {
  const float* levels;  // (planes); plane m stands for level_m times its signs
  int planes;
  const float* shift;  // per input, or null
  bool by_mean;        // multiply a token with the mean of |x - shift| (XNOR-Net's K)
};

/// Signs as bytes that are 0 or not, (rows, segments, segment_inputs) -> the layout.
void pack_signs(const SignMatrix& shape, const uint8_t* positive, uint8_t* codes);
/// The inverse of `pack_signs`: +1 or -1 for each input.
void unpack_signs(const SignMatrix& matrix, float* signs);

/// y (tokens, rows) from x (tokens, inputs), on up to `threads` threads; a token's result depends on nothing else.
void binary_linear(const SignMatrix& matrix, const Binarizer& how, const float* x, int64_t tokens, float* y,
                   int threads);
/// The same with activations as they are, one segment only: y_tn = scale_n sum_k sign(w_nk) x_tk, summed in float.
void binary_weight_linear(const SignMatrix& matrix, const float* x, int64_t tokens, float* y, int threads);

}  // namespace lilliput

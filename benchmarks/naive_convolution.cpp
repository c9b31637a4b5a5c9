// A float convolution as plain loops, what XNOR-Net's 58 times are measured against: 3x3, zero padding, stride 1.
// benchmarks/binary.py compiles it.
extern "C" void naive_convolution(const float* x, const float* w, float* y, int inputs, int filters, int size) {
  for (int o = 0; o < filters; ++o) {
    for (int row = 0; row < size; ++row) {
      for (int column = 0; column < size; ++column) {
        float sum = 0;
        for (int i = 0; i < inputs; ++i) {
          for (int tap = 0; tap < 9; ++tap) {
            const int r = row + tap / 3 - 1, c = column + tap % 3 - 1;
            if (r < 0 || r >= size || c < 0 || c >= size) continue;
            sum += x[(i * size + r) * size + c] * w[(o * inputs + i) * 9 + tap];
          }
        }
        y[(o * size + row) * size + column] = sum;
      }
    }
  }
}

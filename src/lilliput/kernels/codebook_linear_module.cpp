// codebook_linear as Python sees it: addresses and sizes; codebook_linear.py checks them.
#include "codebook_linear.hpp"

#include "module.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

void bind(nb::module_& m) {
  m.def(
      "codebook_linear",
      [](uintptr_t x, uintptr_t codes, uintptr_t scale, uintptr_t tables, uintptr_t y, int64_t tokens, int64_t rows,
         int64_t columns, int64_t group, int bits, bool shared, int threads) {
        const CodebookMatrix matrix{at<const uint8_t>(codes), at<const uint16_t>(scale), at<const int8_t>(tables),
                                    rows, columns, group, bits, shared};
        codebook_linear(matrix, at<const float>(x), tokens, at<float>(y), threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

const Binding binding(bind);

}  // namespace
}  // namespace lilliput

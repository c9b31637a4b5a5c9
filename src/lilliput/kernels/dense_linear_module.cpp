// dense_linear as Python sees it: addresses and sizes, already checked by dense_linear.py.
#include "dense_linear.hpp"

#include <algorithm>

#include "module.hpp"
#include "thread_pool.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

constexpr int64_t kThreadBytes = 128 * 1024;  // of weights, times tokens: less is not worth another thread
constexpr int64_t kUnitsPerThread = 6;

void run(uintptr_t weights, int64_t rows, int64_t columns, bool bfloat16, uintptr_t x, int64_t tokens, uintptr_t y,
         int threads) {
  const nb::gil_scoped_release others_may_run;
  const DenseMatrix m{at<const void>(weights), rows, columns, bfloat16};
  const int64_t bytes = rows * columns * (bfloat16 ? 2 : 4) * tokens;
  const int used = static_cast<int>(std::clamp<int64_t>(bytes / kThreadBytes, 1, threads));
  const int64_t grain = std::max<int64_t>(1, m.blocks() / (used * kUnitsPerThread));
  parallel_for(m.blocks(), grain, used, [&](int64_t first, int64_t last) {
    multiply(m, at<const float>(x), tokens, first, last, at<float>(y));
  });
}

void bind(nb::module_& m) { m.def("dense_linear", &run); }

const Binding binding(bind);

}  // namespace
}  // namespace lilliput

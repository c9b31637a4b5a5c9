// sparse_ffn as Python sees it: addresses and sizes, already checked by sparse_ffn.py.
#include "sparse_ffn.hpp"

#include <nanobind/stl/tuple.h>

#include <tuple>

#include "module.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

// (format, address of the values, address of the grid, rows, columns, group)
using Rows = std::tuple<int, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;

RowMatrix matrix(const Rows& row) {
  const auto& [format, values, grid, rows, columns, group] = row;
  return {static_cast<RowFormat>(format), at<const void>(values), at<const uint16_t>(grid), rows, columns, group};
}

void run(uintptr_t x, uintptr_t gate, bool rectified, float shift, const Rows& up, uintptr_t up_bias, const Rows& down,
         uintptr_t down_bias, uintptr_t y, int64_t tokens, int threads) {
  const RowMatrix rows = matrix(up);
  const SparseFfn ffn{rows.values ? &rows : nullptr, at<const float>(up_bias),   matrix(down),
                      at<const float>(down_bias),    rectified,                  shift};
  const nb::gil_scoped_release others_may_run;
  sparse_ffn(ffn, at<const float>(x), at<const float>(gate), tokens, at<float>(y), threads);
}

void bind(nb::module_& m) { m.def("sparse_ffn", &run); }

const Binding binding(bind);

}  // namespace
}  // namespace lilliput

// sparse_ffn as Python sees it: addresses and sizes, already checked by sparse_ffn.py.
#include "sparse_ffn_module.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

void run(uintptr_t x, uintptr_t gate, const SparseRow& row, uintptr_t y, int64_t tokens, int threads) {
  const SparseFfn ffn = sparse_part(row);
  const nb::gil_scoped_release others_may_run;
  sparse_ffn(ffn, at<const float>(x), at<const float>(gate), tokens, at<float>(y), threads);
}

void bind(nb::module_& m) { m.def("sparse_ffn", &run); }

const Binding binding(bind);

}  // namespace
}  // namespace lilliput

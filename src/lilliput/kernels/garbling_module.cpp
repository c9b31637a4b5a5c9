// garbling as Python sees it: addresses and sizes, already checked by garbling.py.
#include <nanobind/stl/tuple.h>

#include "garbling.hpp"
#include "module.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

using GateRow = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>;  // kinds, left, right, inputs

Gates gates_of(const GateRow& row) {
  const auto& [kinds, left, right, inputs] = row;
  return {at<const uint8_t>(kinds), at<const int32_t>(left), at<const int32_t>(right), inputs};
}

void run_encrypt(uintptr_t key, uintptr_t x, uintptr_t y, int64_t blocks) {
  const nb::gil_scoped_release others_may_run;
  encrypt(expand_key(at<const uint8_t>(key)), at<const uint8_t>(x), at<uint8_t>(y), blocks);
}

void run_hash(uintptr_t key, uintptr_t x, uintptr_t y, int64_t blocks, int64_t tweak) {
  const nb::gil_scoped_release others_may_run;
  hash_labels(expand_key(at<const uint8_t>(key)), at<const uint8_t>(x), at<uint8_t>(y), blocks, tweak);
}

void run_garble(uintptr_t key, const GateRow& gates, int64_t first, int64_t last, uintptr_t bits, uintptr_t delta,
                uintptr_t labels, int64_t tweak, uintptr_t tables) {
  const nb::gil_scoped_release others_may_run;
  garble(expand_key(at<const uint8_t>(key)), gates_of(gates), first, last, at<const uint8_t>(bits),
         at<const uint8_t>(delta), at<uint8_t>(labels), tweak, at<uint8_t>(tables));
}

void run_evaluate(uintptr_t key, const GateRow& gates, int64_t first, int64_t last, uintptr_t labels, int64_t tweak,
                  uintptr_t tables) {
  const nb::gil_scoped_release others_may_run;
  evaluate(expand_key(at<const uint8_t>(key)), gates_of(gates), first, last, at<uint8_t>(labels), tweak,
           at<const uint8_t>(tables));
}

void bind(nb::module_& m) {
  m.def("garbling_hardware_cipher", &hardware_cipher);
  m.def("garbling_encrypt", &run_encrypt);
  m.def("garbling_hash", &run_hash);
  m.def("garbling_garble", &run_garble);
  m.def("garbling_evaluate", &run_evaluate);
}

const Binding binding(bind);

}  // namespace
}  // namespace lilliput

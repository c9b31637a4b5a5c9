// lookup_linear as Python sees it: addresses and sizes; lookup_linear.py checks them.
#include "lookup_linear.hpp"

#include "packed_module.hpp"

namespace lilliput {
namespace {

const Binding binding([](nanobind::module_& m) {
  bind_packed<LookupMatrix, lookup_pack, lookup_unpack, lookup_linear>(m, "lookup_linear");
});

}  // namespace
}  // namespace lilliput

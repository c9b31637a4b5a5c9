// group_linear as Python sees it: addresses and sizes; group_linear.py checks them.
#include "group_linear.hpp"

#include "packed_module.hpp"

namespace lilliput {
namespace {

const Binding binding([](nanobind::module_& m) {
  bind_packed<PackedMatrix, pack_codes, unpack_codes, group_linear>(m, "group_linear");
});

}  // namespace
}  // namespace lilliput

// The Python module: the instruction sets, and all that the X_module.cpp files bind.
#include "module.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.hpp"

using namespace lilliput;

namespace {

std::vector<std::string> names_of_isas() {
  std::vector<std::string> names;
  for (const Isa isa : available_isas()) names.push_back(isa_name(isa));
  return names;
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("isa", [] { return isa_name(isa()); });
  m.def("set_isa", &set_isa);
  m.def("available_isas", &names_of_isas);
  for (const Bind bind : bindings()) bind(m);
}

// What the parts of the Python module share: each operation's X_module.cpp holds one `const Binding` with its functions.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

namespace lilliput {

using Bind = void (*)(nanobind::module_&);

/// Functions that the module gets when it is made; bindings are static objects and add themselves.
inline std::vector<Bind>& bindings() {
  static std::vector<Bind> all;
  return all;
}

struct Binding {
  explicit Binding(Bind bind) { bindings().push_back(bind); }
};

/// Memory that Python passed as an address, having checked its size and type.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace lilliput

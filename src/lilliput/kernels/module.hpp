// The parts of the Python module, one for each operation that is more than a function.
#pragma once

#include <nanobind/nanobind.h>

namespace lilliput {

void bind_decoder(nanobind::module_& m);

}  // namespace lilliput

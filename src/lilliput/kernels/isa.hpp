// Which instruction set the kernels of this process use.
#pragma once

#include <string>
#include <vector>

namespace lilliput {

enum class Isa { scalar, avx2, avx512 };

/// The best set of this machine, or what LILLIPUT_ISA or `set_isa` chose; throws std::runtime_error for a wrong choice.
Isa isa();
/// Choose a set by its name; throws std::runtime_error when it is unknown or the machine lacks it.
void set_isa(const std::string& name);
std::string isa_name(Isa isa);
/// The sets this build has and this machine can run, slowest first.
std::vector<Isa> available_isas();

}  // namespace lilliput

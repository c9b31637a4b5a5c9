#include "isa.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace lilliput {
namespace {

const char* const kNames[] = {"scalar", "avx2", "avx512"};
constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

bool runs_here(Isa isa) {
#if defined(LILLIPUT_X86)
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == Isa::scalar;
}

Isa by_name(const std::string& name) {
  std::string known;
  for (const Isa candidate : available_isas()) {
    if (name == isa_name(candidate)) return candidate;
    known += (known.empty() ? "" : ", ") + isa_name(candidate);
  }
  throw std::runtime_error("the instruction set is '" + name + "'; this machine can run: " + known);
}

}  // namespace

std::string isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> available_isas() {
  std::vector<Isa> found;
  for (const Isa candidate : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (runs_here(candidate)) found.push_back(candidate);
  }
  return found;
}

void set_isa(const std::string& name) { chosen = static_cast<int>(by_name(name)); }

Isa isa() {
  if (chosen == kUnset) {
    const char* wished = std::getenv("LILLIPUT_ISA");
    chosen = static_cast<int>(wished && *wished ? by_name(wished) : available_isas().back());
  }
  return static_cast<Isa>(chosen.load());
}

}  // namespace lilliput

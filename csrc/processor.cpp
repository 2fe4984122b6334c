#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#define INLINE_LAMBDA __attribute__((always_inline))

namespace oapl {

#define VECTOR_BYTES 16
namespace portable {
#include "rows.inc"
#include "weights.inc"
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define VECTOR_BYTES 32
namespace avx2 {
#include "rows.inc"
#include "weights.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define VECTOR_BYTES 64
namespace avx512 {
#include "rows.inc"
#include "weights.inc"
}
#pragma GCC pop_options
#endif

// What this processor has, the fastest first.
static std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) sets.push_back({"avx512_bf16", &avx512::kernels, true, true});
    sets.push_back({"avx512", &avx512::kernels, true, false});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    sets.push_back({"avx2", &avx2::kernels, false, false});
#endif
  sets.push_back({"portable", &portable::kernels, false, false});
  return sets;
}

static const std::vector<InstructionSet> PRESENT = instruction_sets();
static const InstructionSet* selected = &PRESENT.front();

const InstructionSet& instruction_set() { return *selected; }

bool select_instruction_set(const char* name) {
  for (const auto& set : PRESENT)
    if (std::strcmp(set.name, name) == 0) {
      selected = &set;
      return true;
    }
  return false;
}

}  // namespace oapl

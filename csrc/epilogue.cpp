#include "epilogue.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"

#define INLINE_LAMBDA __attribute__((always_inline))

namespace oapl {

struct Scale {
  float inverse_temperature, softcap, inverse_softcap;
};

struct Kernels {
  using RowStatistics = void (*)(const float*, int64_t, int64_t, const Scale&, float*);
  using RowGradient = void (*)(float*, int64_t, int64_t, const Scale&, const float*, float, const float*, bool);
  RowStatistics statistics, capped_statistics;
  RowGradient gradient, capped_gradient;
  void (*accumulate)(float*, const uint16_t*, int64_t, bool);
};

#define VECTOR_BYTES 16
namespace portable {
#include "rows.inc"
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define VECTOR_BYTES 32
namespace avx2 {
#include "rows.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define VECTOR_BYTES 64
namespace avx512 {
#include "rows.inc"
}
#pragma GCC pop_options
#endif

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool present;
};

static std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  sets.push_back({"avx512_bf16", &avx512::kernels, avx512 && __builtin_cpu_supports("avx512bf16")});
  sets.push_back({"avx512", &avx512::kernels, avx512});
  sets.push_back({"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
  sets.push_back({"portable", &portable::kernels, true});
  return sets;
}

static InstructionSet& current() {
  static InstructionSet set = [] {
    const auto sets = instruction_sets();
    return *std::find_if(sets.begin(), sets.end(), [](const InstructionSet& s) { return s.present; });
  }();
  return set;
}

const char* instruction_set() { return current().name; }

bool select_instruction_set(const char* name) {
  for (const auto& set : instruction_sets()) {
    if (std::strcmp(set.name, name) != 0 || !set.present) continue;
    current() = set;
    return true;
  }
  return false;
}

static Scale scale_of(const Logits& logits) {
  return {1.f / logits.temperature, logits.softcap, logits.softcap > 0 ? 1.f / logits.softcap : 0.f};
}

void statistics(const Logits& logits, const Statistics& out, int threads) {
  const Scale scale = scale_of(logits);
  const auto kernel = logits.softcap > 0 ? current().kernels->capped_statistics : current().kernels->statistics;
  parallel(logits.rows, 2, threads, [&](int64_t row) {
    float values[4];
    kernel(logits.data + row * logits.stride, logits.vocabulary, logits.target[row], scale, values);
    for (int i = 0; i < 4; i++) out.data[i * out.stride + row] = values[i];
  });
}

void gradient(const Logits& logits, const Statistics& statistics, const Coefficients& coefficients, bool bf16,
              int threads) {
  const Scale scale = scale_of(logits);
  const auto kernel = logits.softcap > 0 ? current().kernels->capped_gradient : current().kernels->gradient;
  parallel(logits.rows, 2, threads, [&](int64_t row) {
    float values[4];
    for (int i = 0; i < 4; i++) values[i] = statistics.data[i * statistics.stride + row];
    kernel(logits.data + row * logits.stride, logits.vocabulary, logits.target[row], scale, values,
           coefficients.logprob[row], coefficients.entropy ? coefficients.entropy + row : nullptr, bf16);
  });
}

void accumulate(float* sums, const uint16_t* products, int64_t count, bool add, int threads) {
  const int64_t block = 1 << 16;
  const auto kernel = current().kernels->accumulate;
  parallel((count + block - 1) / block, 4, threads, [&](int64_t index) {
    const int64_t begin = index * block;
    kernel(sums + begin, products + begin, std::min(block, count - begin), add);
  });
}

}  // namespace oapl

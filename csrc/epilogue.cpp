#include "kernels.h"

#include <algorithm>

#include "parallel.h"

namespace oapl {

void statistics(const Logits& logits, const Statistics& out, int threads) {
  const auto kernel = instruction_set().kernels->statistics[logits.scale.softcap > 0];
  parallel(logits.rows, 2, threads, [&](int64_t row) {
    float values[4];
    kernel(logits.data + row * logits.stride, logits.vocabulary, logits.target[row], logits.scale, values);
    for (int i = 0; i < 4; i++) out.data[i * out.stride + row] = values[i];
  });
}

void gradient(const Logits& logits, const Statistics& statistics, const Coefficients& coefficients, bool bf16,
              int threads) {
  const auto kernel = instruction_set().kernels->gradient[logits.scale.softcap > 0];
  parallel(logits.rows, 2, threads, [&](int64_t row) {
    float values[4];
    for (int i = 0; i < 4; i++) values[i] = statistics.data[i * statistics.stride + row];
    kernel(logits.data + row * logits.stride, logits.vocabulary, logits.target[row], logits.scale, values,
           coefficients.logprob[row], coefficients.entropy ? coefficients.entropy + row : nullptr, bf16);
  });
}

void accumulate(float* sums, const uint16_t* products, int64_t count, bool add, int threads) {
  const int64_t block = 1 << 16;
  const auto kernel = instruction_set().kernels->accumulate;
  parallel((count + block - 1) / block, 4, threads, [&](int64_t index) {
    const int64_t begin = index * block;
    kernel(sums + begin, products + begin, std::min(block, count - begin), add);
  });
}

}  // namespace oapl

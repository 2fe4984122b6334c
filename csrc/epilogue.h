// The chunk epilogue on CPU: statistics of each row of fp32 logits, then its gradient in the same memory.
#pragma once
#include <cstdint>

namespace oapl {

struct Logits {
  float* data;         // [rows, vocabulary]; the gradient overwrites it
  int64_t stride;      // floats from row to row
  int64_t rows, vocabulary;
  const int64_t* target;  // [rows]; -1: no target here
  float temperature, softcap;  // softcap 0: none
};

struct Statistics {
  float* data;  // [4, rows]: log-prob, entropy, max, ln sum exp(x - max)
  int64_t stride;
};

struct Coefficients {
  const float* logprob;  // [rows], d loss / d log-prob
  const float* entropy;  // [rows] or null, d loss / d entropy
};

void statistics(const Logits& logits, const Statistics& out, int threads);
void gradient(const Logits& logits, const Statistics& statistics, const Coefficients& coefficients, bool bf16,
              int threads);
// sums[i] = (or, with add, +=) the bf16 value products[i]
void accumulate(float* sums, const uint16_t* products, int64_t count, bool add, int threads);

// "avx512_bf16" (differs from "avx512" in matmul.h alone), "avx512", "avx2" or "portable": what runs. select returns false if this processor lacks the named one.
const char* instruction_set();
bool select_instruction_set(const char* name);

}  // namespace oapl

// What Python calls (see oapl_kernels.epilogue_cpu, .matmul and .weight_pack), and the loops inside it.
#pragma once
#include <cstdint>
#include <vector>

namespace oapl {

// epilogue.cpp: statistics of each row of fp32 logits, then its gradient in the same memory

struct Scale {
  float inverse_temperature, softcap, inverse_softcap;  // softcap 0: none
};

struct Logits {
  float* data;         // [rows, vocabulary]; the gradient overwrites it
  int64_t stride;      // floats from row to row
  int64_t rows, vocabulary;
  const int64_t* target;  // [rows]; -1: no target here
  Scale scale;
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

// matmul.cpp: matrix products with fp32 sums, for fp32 and bf16; no library has the latter on CPU

struct Operand {  // [across, depth], one of the strides (in elements) is 1
  const void* data;
  int64_t across_stride, depth_stride;
};

struct Product {  // out [rows, columns] = (or, with add, +=) left [rows, depth] x right [columns, depth]
  Operand left, right;
  int64_t rows, columns, depth;
  float* out;
  int64_t out_stride;
  bool add;
};

// Whether this processor can, by the instruction set that is selected.
bool multiplies(bool bf16);
void multiply(const Product& product, bool bf16, int threads);

// weights.cpp: weights on their way through a bucket

struct Seeds {
  uint32_t first, second;
};

struct Digest {
  uint32_t h0, h1;
  int64_t nonfinite;  // values that are not finite
};

enum class Format { float32, bfloat16, float16 };

struct Bytes {
  const unsigned char* at;
  int64_t count;
};
struct Cast {
  const void* source;
  Format from;
  void* payload;
  Format to;
  int64_t count;  // values
};
struct Copy {
  const void* source;
  void* destination;
  int64_t count;  // values
  int bytes;      // of a value, 2 or 4
};

// Many tensors a call: to start threads for each costs more than to hash a megabyte.
// h_0 and h_1 of each
std::vector<Digest> checksum(const std::vector<Bytes>& spans, Seeds seeds, int threads);
// payload[i] = source[i]; float32 into bfloat16 rounds to nearest even, else the formats are equal. Digests of payloads
std::vector<Digest> pack(const std::vector<Cast>& casts, Seeds seeds, int threads);
// destination = source; returns how many values changed their bits
int64_t copy_and_count_changes(const std::vector<Copy>& copies, int threads);

// processor.cpp: the loops that are compiled once per instruction set, and which of them this processor runs

struct Kernels {
  using RowStatistics = void (*)(const float*, int64_t, int64_t, const Scale&, float*);
  using RowGradient = void (*)(float*, int64_t, int64_t, const Scale&, const float*, float, const float*, bool);
  RowStatistics statistics[2];  // without and with a soft cap
  RowGradient gradient[2];
  void (*accumulate)(float*, const uint16_t*, int64_t, bool);
  void (*hash_words)(const unsigned char*, int64_t, uint32_t, Seeds, uint32_t*);
  void (*round_values)(const float*, uint16_t*, int64_t);
  int64_t (*count_nonfinite)(const void*, int64_t, Format);
  int64_t (*copy_and_count)(const void*, void*, int64_t, int);
};

struct InstructionSet {
  const char* name;  // "avx512_bf16", "avx512", "avx2" or "portable"
  const Kernels* kernels;
  bool multiplies_float, multiplies_bf16;  // whether matmul.cpp has a product for it
};

// What runs. select returns false if this processor lacks the named one.
const InstructionSet& instruction_set();
bool select_instruction_set(const char* name);

}  // namespace oapl

// Matrix products with fp32 sums, for fp32 and bf16 alike: no library has the latter on CPU.
#pragma once
#include <cstdint>

namespace oapl {

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

}  // namespace oapl

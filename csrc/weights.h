// Weights on their way through a bucket on CPU; see oapl_kernels/weight_pack.py.
#pragma once
#include <cstdint>

namespace oapl {

struct Seeds {
  uint32_t first, second;
};

struct Digest {
  uint32_t h0, h1;
  int64_t infinite;  // values that are not finite
};

enum class Format { float32, bfloat16, float16 };

// h_0 and h_1 of `count` bytes
Digest checksum(const unsigned char* bytes, int64_t count, Seeds seeds, int threads);
// payload[i] = source[i] for `count` values; float32 into bfloat16 rounds to nearest even, else the formats are equal
Digest pack(const void* source, Format from, void* payload, Format to, int64_t count, Seeds seeds, int threads);
// destination = source for `count` values of 2 or 4 bytes; returns how many changed their bits
int64_t copy_changed(const void* source, void* destination, int64_t count, int bytes, int threads);

}  // namespace oapl

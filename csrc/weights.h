// Weights on their way through a bucket on CPU; see oapl_kernels/weight_pack.py.
#pragma once
#include <cstdint>
#include <vector>

namespace oapl {

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

}  // namespace oapl

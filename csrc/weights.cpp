#include "weights.h"

#include <atomic>
#include <cstring>

#include "parallel.h"

// Plain loops, compiled for each of these processors; the loader picks.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace oapl {

constexpr int64_t BLOCK = 1 << 13;  // words: a block is cast, looked at and hashed while it is in a core's cache
constexpr int64_t AT_A_TIME = 8;

// MurmurHash3's 32-bit finaliser
static inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

FOR_EACH_PROCESSOR
static void hash_words(const unsigned char* bytes, int64_t words, uint32_t first, Seeds seeds, uint32_t sums[2]) {
  uint32_t h0 = 0, h1 = 0;
  for (int64_t i = 0; i < words; i++) {
    uint32_t word;
    std::memcpy(&word, bytes + 4 * i, sizeof word);
    const uint32_t index = first + (uint32_t)i;
    h0 += mix(word ^ mix(index + seeds.first));
    h1 += mix(word ^ mix(index + seeds.second));
  }
  sums[0] = h0, sums[1] = h1;
}

FOR_EACH_PROCESSOR
static void round_to_bf16(const uint32_t* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = from[i], rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i] = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (uint16_t)rounded;
  }
}

// Counts are kept as wide as the values, which keeps vectors full; so few values cannot overflow 16 bits.
constexpr int64_t COUNTED = 1 << 14;

// How many of `count` values have every bit of the exponent set.
template <typename Word>
static inline int64_t count_infinite(const Word* values, int64_t count, Word exponent) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += COUNTED) {
    const int64_t end = std::min(begin + COUNTED, count);
    Word found = 0;
    for (int64_t i = begin; i < end; i++) found += (Word)(values[i] & exponent) == exponent;
    total += found;
  }
  return total;
}
FOR_EACH_PROCESSOR
static int64_t infinite_of(const void* values, int64_t count, Format format) {
  if (format == Format::float32) return count_infinite((const uint32_t*)values, count, 0x7f800000u);
  return count_infinite((const uint16_t*)values, count, (uint16_t)(format == Format::bfloat16 ? 0x7f80 : 0x7c00));
}

template <typename Word>
static inline int64_t copy_and_count(const Word* __restrict from, Word* __restrict to, int64_t count) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += COUNTED) {
    const int64_t end = std::min(begin + COUNTED, count);
    Word found = 0;
    for (int64_t i = begin; i < end; i++) {
      found += to[i] != from[i];
      to[i] = from[i];
    }
    total += found;
  }
  return total;
}
FOR_EACH_PROCESSOR
static int64_t copy_block(const void* from, void* to, int64_t count, int bytes) {
  return bytes == 4 ? copy_and_count((const uint32_t*)from, (uint32_t*)to, count)
                    : copy_and_count((const uint16_t*)from, (uint16_t*)to, count);
}

namespace {
struct Sums {
  std::atomic<uint32_t> h0{0}, h1{0};
  std::atomic<int64_t> infinite{0};

  void add(const unsigned char* bytes, int64_t words, int64_t first, Seeds seeds) {
    uint32_t part[2];
    hash_words(bytes, words, (uint32_t)first, seeds, part);
    h0 += part[0], h1 += part[1];
  }
  // What is left of `count` bytes after whole words, zero-padded.
  void add_rest(const unsigned char* bytes, int64_t count, Seeds seeds) {
    if (count % 4 == 0) return;
    unsigned char last[4] = {};
    std::memcpy(last, bytes + count / 4 * 4, count % 4);
    add(last, 1, count / 4, seeds);
  }
  Digest digest() const { return {h0, h1, infinite}; }
};
}  // namespace

Digest checksum(const unsigned char* bytes, int64_t count, Seeds seeds, int threads) {
  const int64_t words = count / 4;
  Sums sums;
  parallel((words + BLOCK - 1) / BLOCK, AT_A_TIME, threads, [&](int64_t block) {
    const int64_t begin = block * BLOCK;
    sums.add(bytes + 4 * begin, std::min(BLOCK, words - begin), begin, seeds);
  });
  sums.add_rest(bytes, count, seeds);
  return sums.digest();
}

Digest pack(const void* source, Format from, void* payload, Format to, int64_t count, Seeds seeds, int threads) {
  const int64_t size = to == Format::float32 ? 4 : 2, a_block = BLOCK * 4 / size;
  const auto* read = (const unsigned char*)source;
  auto* written = (unsigned char*)payload;
  Sums sums;
  parallel((count + a_block - 1) / a_block, AT_A_TIME, threads, [&](int64_t block) {
    const int64_t begin = block * a_block, values = std::min(a_block, count - begin);
    unsigned char* place = written + begin * size;
    if (from != to)
      round_to_bf16((const uint32_t*)read + begin, (uint16_t*)place, values);
    else if (read != written)
      std::memcpy(place, read + begin * size, values * size);
    sums.infinite += infinite_of(place, values, to);
    sums.add(place, values * size / 4, begin * size / 4, seeds);
  });
  sums.add_rest(written, count * size, seeds);
  return sums.digest();
}

int64_t copy_changed(const void* source, void* destination, int64_t count, int bytes, int threads) {
  const int64_t a_block = BLOCK * 4 / bytes;
  std::atomic<int64_t> changed{0};
  parallel((count + a_block - 1) / a_block, AT_A_TIME, threads, [&](int64_t block) {
    const int64_t begin = block * a_block * bytes, values = std::min(a_block, count - block * a_block);
    const auto* from = (const unsigned char*)source + begin;
    auto* to = (unsigned char*)destination + begin;
    changed += copy_block(from, to, values, bytes);
  });
  return changed;
}

}  // namespace oapl

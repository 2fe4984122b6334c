#include "weights.h"

#include <atomic>
#include <cstring>
#include <vector>

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
static inline int64_t count_nonfinite(const Word* values, int64_t count, Word exponent) {
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
static int64_t nonfinite_in(const void* values, int64_t count, Format format) {
  if (format == Format::float32) return count_nonfinite((const uint32_t*)values, count, 0x7f800000u);
  return count_nonfinite((const uint16_t*)values, count, (uint16_t)(format == Format::bfloat16 ? 0x7f80 : 0x7c00));
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
  std::atomic<int64_t> nonfinite{0};

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
  Digest digest() const { return {h0, h1, nonfinite}; }
};
}  // namespace

// work(task, block) for each block of BLOCK words of each task, `bytes(task)` long.
template <typename Task, typename Size, typename Work>
static void by_blocks(const std::vector<Task>& tasks, int threads, const Size& bytes, const Work& work) {
  std::vector<int64_t> ends;
  for (const Task& task : tasks)
    ends.push_back((ends.empty() ? 0 : ends.back()) + (bytes(task) + 4 * BLOCK - 1) / (4 * BLOCK));
  parallel(tasks.empty() ? 0 : ends.back(), AT_A_TIME, threads, [&](int64_t item) {
    const size_t task = std::upper_bound(ends.begin(), ends.end(), item) - ends.begin();
    work(task, item - (task ? ends[task - 1] : 0));
  });
}

std::vector<Digest> checksum(const std::vector<Bytes>& spans, Seeds seeds, int threads) {
  std::vector<Sums> sums(spans.size());
  const auto size = [](const Bytes& span) { return span.count; };
  by_blocks(spans, threads, size, [&](size_t task, int64_t block) {
    const Bytes& span = spans[task];
    const int64_t begin = block * BLOCK;
    sums[task].add(span.at + 4 * begin, std::min(BLOCK, span.count / 4 - begin), begin, seeds);
  });
  std::vector<Digest> digests;
  for (size_t task = 0; task < spans.size(); task++) {
    sums[task].add_rest(spans[task].at, spans[task].count, seeds);
    digests.push_back(sums[task].digest());
  }
  return digests;
}

static int64_t size_of(Format format) { return format == Format::float32 ? 4 : 2; }

std::vector<Digest> pack(const std::vector<Cast>& casts, Seeds seeds, int threads) {
  std::vector<Sums> sums(casts.size());
  const auto bytes = [](const Cast& cast) { return cast.count * size_of(cast.to); };
  by_blocks(casts, threads, bytes, [&](size_t task, int64_t block) {
    const Cast& cast = casts[task];
    const int64_t size = size_of(cast.to), begin = block * (4 * BLOCK / size);
    const int64_t values = std::min(4 * BLOCK / size, cast.count - begin);
    const auto* read = (const unsigned char*)cast.source + begin * size_of(cast.from);
    auto* place = (unsigned char*)cast.payload + begin * size;
    if (cast.from != cast.to)
      round_to_bf16((const uint32_t*)read, (uint16_t*)place, values);
    else if (read != place)
      std::memcpy(place, read, values * size);
    sums[task].nonfinite += nonfinite_in(place, values, cast.to);
    sums[task].add(place, values * size / 4, block * BLOCK, seeds);
  });
  std::vector<Digest> digests;
  for (size_t task = 0; task < casts.size(); task++) {
    sums[task].add_rest((const unsigned char*)casts[task].payload, bytes(casts[task]), seeds);
    digests.push_back(sums[task].digest());
  }
  return digests;
}

int64_t copy_and_count_changes(const std::vector<Copy>& copies, int threads) {
  std::atomic<int64_t> changed{0};
  const auto bytes = [](const Copy& copy) { return copy.count * copy.bytes; };
  by_blocks(copies, threads, bytes, [&](size_t task, int64_t block) {
    const Copy& copy = copies[task];
    const int64_t begin = block * BLOCK * 4, values = std::min(BLOCK * 4, bytes(copy) - begin) / copy.bytes;
    changed += copy_block((const unsigned char*)copy.source + begin, (unsigned char*)copy.destination + begin, values,
                          copy.bytes);
  });
  return changed;
}

}  // namespace oapl

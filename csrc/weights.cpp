#include "kernels.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace oapl {

constexpr int64_t BLOCK = 1 << 13;  // words: a block is cast, looked at and hashed while it is in a core's cache

namespace {
struct Sums {
  std::atomic<uint32_t> h0{0}, h1{0};
  std::atomic<int64_t> nonfinite{0};

  void add(const unsigned char* bytes, int64_t words, int64_t first, Seeds seeds) {
    uint32_t part[2];
    instruction_set().kernels->hash_words(bytes, words, (uint32_t)first, seeds, part);
    h0 += part[0], h1 += part[1];
  }
};
}  // namespace

// work(task, block) for each block of BLOCK words of each task, `bytes(task)` long.
template <typename Task, typename Size, typename Work>
static void by_blocks(const std::vector<Task>& tasks, int threads, const Size& bytes, const Work& work) {
  std::vector<int64_t> ends;
  for (const Task& task : tasks)
    ends.push_back((ends.empty() ? 0 : ends.back()) + (bytes(task) + 4 * BLOCK - 1) / (4 * BLOCK));
  parallel(tasks.empty() ? 0 : ends.back(), 8, threads, [&](int64_t item) {
    const size_t task = std::upper_bound(ends.begin(), ends.end(), item) - ends.begin();
    work(task, item - (task ? ends[task - 1] : 0));
  });
}

// Digests of tasks, each of `bytes(task)` bytes in memory that prepare(task, block, sums) fills in and returns.
template <typename Task, typename Size, typename Prepare>
static std::vector<Digest> digest(const std::vector<Task>& tasks, Seeds seeds, int threads, const Size& bytes,
                                  const Prepare& prepare) {
  std::vector<Sums> sums(tasks.size());
  by_blocks(tasks, threads, bytes, [&](size_t task, int64_t block) {
    const unsigned char* start = prepare(tasks[task], block, sums[task]);
    const int64_t words = std::min(BLOCK, bytes(tasks[task]) / 4 - block * BLOCK);
    sums[task].add(start, words, block * BLOCK, seeds);
    const int64_t rest = bytes(tasks[task]) - 4 * (block * BLOCK + words);
    if (words < BLOCK && rest > 0) {  // of the last word, zero-padded
      unsigned char last[4] = {};
      std::memcpy(last, start + 4 * words, rest);
      sums[task].add(last, 1, block * BLOCK + words, seeds);
    }
  });
  std::vector<Digest> digests;
  for (const Sums& found : sums) digests.push_back({found.h0, found.h1, found.nonfinite});
  return digests;
}

std::vector<Digest> checksum(const std::vector<Bytes>& spans, Seeds seeds, int threads) {
  const auto bytes = [](const Bytes& span) { return span.count; };
  return digest(spans, seeds, threads, bytes,
                [](const Bytes& span, int64_t block, Sums&) { return span.at + 4 * BLOCK * block; });
}

static int64_t size_of(Format format) { return format == Format::float32 ? 4 : 2; }

std::vector<Digest> pack(const std::vector<Cast>& casts, Seeds seeds, int threads) {
  const Kernels& kernels = *instruction_set().kernels;
  const auto bytes = [](const Cast& cast) { return cast.count * size_of(cast.to); };
  return digest(casts, seeds, threads, bytes, [&](const Cast& cast, int64_t block, Sums& sums) {
    const int64_t size = size_of(cast.to), begin = block * (4 * BLOCK / size);
    const int64_t values = std::min(4 * BLOCK / size, cast.count - begin);
    const auto* read = (const unsigned char*)cast.source + begin * size_of(cast.from);
    auto* place = (unsigned char*)cast.payload + begin * size;
    if (cast.from != cast.to)
      kernels.round_values((const float*)read, (uint16_t*)place, values);
    else if (read != place)
      std::memcpy(place, read, values * size);
    sums.nonfinite += kernels.count_nonfinite(place, values, cast.to);
    return place;
  });
}

int64_t copy_and_count_changes(const std::vector<Copy>& copies, int threads) {
  std::atomic<int64_t> changed{0};
  const Kernels& kernels = *instruction_set().kernels;
  const auto bytes = [](const Copy& copy) { return copy.count * copy.bytes; };
  by_blocks(copies, threads, bytes, [&](size_t task, int64_t block) {
    const Copy& copy = copies[task];
    const int64_t begin = block * BLOCK * 4, values = std::min(BLOCK * 4, bytes(copy) - begin) / copy.bytes;
    changed += kernels.copy_and_count((const unsigned char*)copy.source + begin,
                                      (unsigned char*)copy.destination + begin, values, copy.bytes);
  });
  return changed;
}

}  // namespace oapl

// A loop on threads of our own: nothing waits at a barrier of an OpenMP team that shares the cores with another process.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace oapl {

// work(item) for each item in [0, items), a few at a time, on `threads` threads.
template <typename Work>
void parallel(int64_t items, int64_t at_a_time, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto loop = [&] {
    for (int64_t begin; (begin = next.fetch_add(at_a_time)) < items;)
      for (int64_t item = begin; item < std::min(begin + at_a_time, items); item++) work(item);
  };
  std::vector<std::thread> others;
  const int64_t useful = (items + at_a_time - 1) / at_a_time;
  for (int64_t other = 1; other < std::min<int64_t>(threads, useful); other++) others.emplace_back(loop);
  loop();
  for (auto& other : others) other.join();
}

}  // namespace oapl

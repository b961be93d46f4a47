// Work on several threads, and the memory that a thread works in.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#endif
#include <vector>

#include "kernels.h"

namespace sb::cpu {

// Memory for one thread, aligned to a cache line.
struct Scratch {
  explicit Scratch(int64_t bytes) : memory(new char[size_t(bytes) + 64]) {}
  void* data() const { return reinterpret_cast<void*>(pad_to(reinterpret_cast<int64_t>(memory.get()), 64)); }
  std::unique_ptr<char[]> memory;
};

// A row of zeros for ignored tokens to point at, `width` wide.
template <class T>
struct ZeroRow {
  explicit ZeroRow(int64_t width) : memory(size_t(width), T(0)) {}
  const void* data() const { return memory.data(); }
  std::vector<T> memory;
};

// torch::stable::parallel_for runs on OpenMP, whose barriers ThreadSanitizer does not see: it would report every stage
// that reads what the one before it wrote. Threads that are started and joined it does see.
template <class Body>
void on_threads(int64_t n, int64_t grain, const Body& body) {
#if defined(__SANITIZE_THREAD__)
  const int64_t count = std::min<int64_t>(torch::stable::get_num_threads(), (n + grain - 1) / grain);
  const int64_t part = (n + count - 1) / count;
  std::vector<std::thread> others;
  for (int64_t begin = part; begin < n; begin += part)
    others.emplace_back([&body, begin, end = std::min(n, begin + part)] { body(begin, end); });
  body(int64_t(0), std::min(n, part));
  for (std::thread& other : others) other.join();
#else
  torch::stable::parallel_for(0, n, grain, body);
#endif
}

// Calls body(begin, end) for parts of [0, n) of at least `grain`. torch's own function takes its time even on one
// thread.
template <class Body>
void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (n <= grain || torch::stable::get_num_threads() == 1)
    body(int64_t(0), n);
  else
    on_threads(n, grain, body);
}

// Calls body(b, head, unit, scratch) for every unit of every head, each thread with `bytes` of scratch of its own.
template <class Body>
void parallel_units(int64_t batch, int64_t heads, int64_t units, int64_t bytes, const Body& body) {
  parallel_ranges(batch * heads * units, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    for (int64_t at = begin; at < end; ++at) body(at / (heads * units), at / units % heads, at % units, scratch.data());
  });
}

// Key/value heads [first, first + count), numbered through all batch rows.
struct HeadRange {
  int64_t first, count;
};

inline int64_t heads_per_range(int64_t heads, int64_t tokens) {
  const int64_t most =
      std::max<int64_t>(torch::stable::get_num_threads(), kTokensPerWave / std::max<int64_t>(1, tokens));
  return std::min(heads, most);
}

template <class Body>
void for_each_head_range(int64_t heads, int64_t tokens, const Body& body) {
  const int64_t count = heads_per_range(heads, tokens);
  for (int64_t first = 0; first < heads; first += count) body(HeadRange{first, std::min(count, heads - first)});
}

}  // namespace sb::cpu

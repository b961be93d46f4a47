// Work on several threads, and the memory that a thread works in.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
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

// Calls body(begin, end) for parts of [0, n) of at least `grain`. torch's own function takes its time even on one
// thread.
template <class Body>
void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (n <= grain || torch::stable::get_num_threads() == 1)
    body(int64_t(0), n);
  else
    torch::stable::parallel_for(0, n, grain, body);
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

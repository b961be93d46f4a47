// Per-row ranges and counts, on the device so that the host never waits for them.
#pragma once
#include "device.h"

namespace sb::cuda {

inline constexpr int kRowsThreads = 128;

SB_DEVICE int32_t clamped(int32_t value, int32_t low, int32_t high) {
  return value < low ? low : value > high ? high : value;
}

// One block per batch row.
SB_DEVICE void rows_of_batch_row(const RowsParams& p, int64_t b) {
  const int32_t queries = int32_t(p.q_tokens), keys = int32_t(p.k_tokens);
  RowRange range{0, queries, 0, keys, 0};
  if (p.q_range) {
    range.q_first = clamped(load(p.q_range + 2 * b), 0, queries);
    range.q_end = clamped(load(p.q_range + 2 * b + 1), range.q_first, queries);
  }
  if (p.k_range) {
    range.k_first = clamped(load(p.k_range + 2 * b), 0, keys);
    range.k_end = clamped(load(p.k_range + 2 * b + 1), range.k_first, keys);
  }
  if (p.offset) range.offset = load(p.offset + b);
  const int thread = thread_index();
  if (thread == 0) store(p.rows + b, range);
  if (p.any_flagged)
    for (int64_t h = thread; h < p.kv_heads; h += kRowsThreads) store(p.any_flagged + b * p.kv_heads + h, uint8_t(0));
  if (!p.valid_before) return;

  // Every thread counts neighbouring segments; then it knows what stands before its own.
  const auto counts = shared_array<int32_t>(0);
  const int64_t share = ceil_div(p.slots, kRowsThreads), first = thread * share,
                end = first + share < p.slots ? first + share : p.slots;
  // How many keys of a segment are not ignored. Calls visit(key) with each where a mask tells which, from the row's
  // first one.
  const auto count_valid = [&](int64_t slot, const auto& visit) {
    const int64_t begin = range.k_first + slot * p.segment,
                  stop = begin + p.segment < range.k_end ? begin + p.segment : range.k_end;
    if (!p.k_mask) return stop > begin ? int32_t(stop - begin) : 0;
    int32_t count = 0;
    for (int64_t j = begin; j < stop; ++j) {
      if (load(p.k_mask + b * p.k_tokens + j)) continue;
      visit(int32_t(j - range.k_first));
      ++count;
    }
    return count;
  };
  int32_t sum = 0;
  for (int64_t slot = first; slot < end; ++slot) sum += count_valid(slot, [](int32_t) {});
  counts.set(thread, sum);
  sync_block();
  int32_t before = 0;
  for (int t = 0; t < thread; ++t) before += counts.get(t);
  for (int64_t slot = first; slot < end; ++slot) {
    store(p.valid_before + b * p.slots + slot, before);
    int32_t* to = p.valid_keys ? p.valid_keys + b * p.k_tokens + before : nullptr;
    before += count_valid(slot, [&](int32_t key) {
      if (to) store(to++, key);
    });
  }
  sync_block();
}

SB_KERNEL rows_kernel(RowsParams p) {
  for_each_task(p.batch, [&](int64_t b) { rows_of_batch_row(p, b); });
}

}  // namespace sb::cuda

// Keys of a segment sorted by cluster, and sums over the keys of each: a fixed order, and work that depends on the
// number of keys alone.
#pragma once
#include "device.h"

namespace sb::cuda {

inline constexpr int64_t kChain = 32;  // terms that are added up before their sum is: short chains round little

// Tokens [begin, end) of segment `segment` of a row's [first, last), and which of them are not ignored.
struct TokenSegment {
  int64_t begin, end;
  const uint8_t* mask;  // of the row, or null
  SB_DEVICE TokenSegment(int64_t segment, int64_t length, int64_t first, int64_t last, const uint8_t* mask)
      : begin(first + segment * length), end(begin + length < last ? begin + length : last), mask(mask) {}
  SB_DEVICE bool is_valid(int64_t i) const { return !(mask && load(mask + i)); }
};

// In shared memory: the places of up to kSegment keys in the order of their clusters and then their own, and where each
// cluster begins.
class SortedKeys {
 public:
  static SB_HD int64_t bytes(int64_t clusters) {
    return (kSegment + pad_to(clusters + 1, 4)) * int64_t(sizeof(int32_t));
  }
  SB_DEVICE SortedKeys(int64_t offset, int64_t clusters)
      : code(shared_array<int32_t>(offset)),
        first(shared_array<int32_t>(offset + kSegment * int64_t(sizeof(int32_t)))),
        clusters(clusters) {}

  // Room of `count` keys; those that set_key leaves out are in no cluster.
  SB_DEVICE void clear(int64_t count) {
    size = 2;
    while (size < count) size *= 2;
    for (int64_t i = thread_index(); i < size; i += block_threads()) code.set(i, kNoKey);
  }
  // By the thread that cleared this place, which is thread place % block_threads(), or behind a barrier.
  SB_DEVICE void set_key(int64_t place, int64_t cluster) { code.set(place, int32_t(cluster * kSegment + place)); }

  // Bitonic. Begins and ends with a barrier of the block.
  SB_DEVICE void sort() {
    sync_block();
    for (int64_t run = 2; run <= size; run *= 2)
      for (int64_t step = run / 2; step > 0; step /= 2) {
        for (int64_t i = thread_index(); i < size / 2; i += block_threads()) {
          const int64_t low = 2 * i - (i & (step - 1)), high = low + step;
          const int32_t a = code.get(low), b = code.get(high);
          if ((a > b) == ((low & run) == 0)) code.set(low, b), code.set(high, a);
        }
        sync_block();
      }
    for (int64_t i = thread_index(); i <= size; i += block_threads()) {
      const int64_t before = i > 0 ? cluster_at(i - 1) : -1, here = i < size ? cluster_at(i) : clusters;
      for (int64_t c = before + 1; c <= here; ++c) first.set(c, int32_t(i));
    }
    sync_block();
  }

  // Positions of a cluster's keys: begin(c) to begin(c + 1).
  SB_DEVICE int64_t begin(int64_t cluster) const { return first.get(cluster); }
  SB_DEVICE int64_t place_at(int64_t position) const { return code.get(position) % kSegment; }

 private:
  static constexpr int32_t kNoKey = 0x7fffffff;
  SB_DEVICE int64_t cluster_at(int64_t position) const {
    const int32_t value = code.get(position);
    return value == kNoKey ? clusters : value / kSegment;
  }
  Shared<int32_t> code, first;
  int64_t clusters, size = 0;
};

// For every cluster, by a warp: take(c, top, mass, sum, keys) with the largest of its keys' logs, to base 2, the sum of
// their weights exp(log - top), and the weighted sum of their rows, of which a lane has columns lane + i kWarp. A lane
// weighs one key of every kWarp, and all lanes go through their rows.
template <class T, class Row, class Take>
SB_DEVICE void sum_by_cluster(const SortedKeys& keys, int64_t clusters, const Shared<T>& logs, int64_t width,
                              const Row& row_of, const Take& take) {
  constexpr int kAtOnce = 4;  // rows that are on their way together
  const int lane = lane_index(), columns = int(width);
  for (int64_t c = warp_index(); c < clusters; c += block_threads() / kWarp) {
    const int64_t begin = keys.begin(c), end = keys.begin(c + 1);
    T top = -T(INFINITY), mass = T(0), sum[kColumns];
    for (int64_t i = begin + lane; i < end; i += kWarp) top = larger(top, logs.get(keys.place_at(i)));
    top = warp_max(top);
    for (int m = 0; m < kColumns; ++m) sum[m] = T(0);
    for (int64_t first = begin; first < end; first += kWarp) {
      const int count = end - first < kWarp ? int(end - first) : kWarp;
      const auto place = lane < count ? int32_t(keys.place_at(first + lane)) : 0;
      const T weight = lane < count ? exp2_of(logs.get(place) - top) : T(0);
      mass += weight;
      T chain[kColumns];  // short ones round little
      for (int m = 0; m < kColumns; ++m) chain[m] = T(0);
      SB_NO_UNROLL
      for (int i = 0; i < count; i += kAtOnce) {
        T of_key[kAtOnce];
        decltype(row_of(0)) column[kAtOnce];
        for (int k = 0; k < kAtOnce; ++k) {
          of_key[k] = shuffle_from(weight, i + k);
          column[k] = as_it_is(row_of(shuffle_from(place, i + k)) + lane);
        }
        for (int m = 0; m < kColumns; ++m) {
          if (m * kWarp >= columns) break;
          const bool is_inside = lane + m * kWarp < columns;
          T value[kAtOnce];
          for (int k = 0; k < kAtOnce; ++k)
            value[k] = is_inside && i + k < count ? T(widened(load(column[k] + m * kWarp))) : T(0);
          for (int k = 0; k < kAtOnce; ++k) chain[m] += of_key[k] * value[k];
        }
      }
      for (int m = 0; m < kColumns; ++m) sum[m] += chain[m];
    }
    take(c, top, warp_sum(mass), sum, end - begin);
  }
}

}  // namespace sb::cuda

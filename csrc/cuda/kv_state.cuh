// States (docs/algorithm.md, sections 2 and 4): sums over segments of keys, then their prefix sums, or without a causal
// edge, or before one of few queries, their total, in a fixed order.
#pragma once
#include "../math/edges.h"
#include "clusters_of_segment.cuh"
#include "low_rank.cuh"

namespace sb::cuda {

inline constexpr int kStateThreads = 128;

// Where keys of states end, absolute.
SB_DEVICE int64_t end_of_states(const ForwardParams& p, const RowRange& range) {
  if (!p.has_one_state) return range.k_end;
  return range.k_first + kv_state_of_edge(p, edge_of_slot(p, range, 0)) * kChunk;
}

// A segment's keys, whose sums go into slot + 1.
struct Segment : TokenSegment {
  int64_t b, kv, head, slot;
  SB_DEVICE Segment(const ForwardParams& p, int64_t task)
      : Segment(p, task / (p.state_slots - 1), task % (p.state_slots - 1)) {}

 private:
  SB_DEVICE Segment(const ForwardParams& p, int64_t head, int64_t slot)
      : Segment(p, head, slot, load(p.rows + head / p.kv_heads)) {}
  SB_DEVICE Segment(const ForwardParams& p, int64_t head, int64_t slot, const RowRange& range)
      : TokenSegment(slot, p.state_segment, range.k_first, end_of_states(p, range),
                     p.k_mask ? p.k_mask + head / p.kv_heads * p.k_tokens : nullptr),
        b(head / p.kv_heads),
        kv(head % p.kv_heads),
        head(head),
        slot(slot) {}
};

// Whether nobody reads the states of a head.
SB_DEVICE bool is_unwanted(const ForwardParams& p, int64_t head) {
  return p.only_flagged && !load(p.any_flagged + head);
}

// Whether a state slot holds out a key of its segments; absolute.
SB_DEVICE bool is_held_out(const ForwardParams& p, int64_t head, int64_t j, int64_t state_slot) {
  return p.first_slot && load(p.first_slot + head * p.k_tokens + j) > state_slot;
}
// The keys that a state slot holds out.
struct HeldOut {
  const int32_t* keys;
  int64_t count;
  SB_DEVICE HeldOut(const ForwardParams& p, int64_t head, int64_t state_slot) : keys(nullptr), count(0) {
    if (!p.held_keys) return;
    const int64_t slot = head * p.held_slots() + (p.is_causal ? state_slot : 0);
    keys = p.held_keys + slot * p.most_held, count = load(p.held_counts + slot);
  }
  SB_DEVICE int64_t key_at(int64_t i) const { return load(keys + i); }
};

// Keys whose sums go into the slot behind a segment: those of the segment that are not held out, and those that were
// held until then.
struct EnteringKeys {
  const Segment& s;
  const int32_t *first_slot, *late;
  int64_t own, late_count;
  SB_DEVICE EnteringKeys(const ForwardParams& p, const Segment& s)
      : s(s),
        first_slot(p.first_slot ? p.first_slot + s.head * p.k_tokens : nullptr),
        late(nullptr),
        own(s.end > s.begin ? s.end - s.begin : 0),
        late_count(0) {
    if (!p.late_keys) return;
    const int64_t slot = s.head * p.slots + s.slot + 1;
    late = p.late_keys + slot * (p.most_held + kChunk), late_count = load(p.late_counts + slot);
  }
  SB_DEVICE int64_t count() const { return own + late_count; }
  // -1 for none.
  SB_DEVICE int64_t key_at(int64_t i) const {
    if (i >= own) return load(late + i - own);
    const int64_t j = s.begin + i;
    return s.is_valid(j) && (!first_slot || load(first_slot + j) == s.slot + 1) ? j : -1;
  }
};

// Where the log scale of a segment's sums stands: every cluster has its own.
template <class T>
SB_DEVICE T* segment_log_of(const ForwardParams& p, int64_t head, int64_t slot, int64_t cluster) {
  return static_cast<T*>(p.segment_log) + (head * p.state_slots + slot) * p.logs_of_state() + cluster;
}

// Sums by cluster, relative to the largest log mass of the cluster in the segment.
template <class E, class T>
SB_KERNEL cluster_segments(ForwardParams p) {
  typedef AccType<E> M;
  SortedKeys keys(0, p.rank);
  const auto logs = shared_array<T>(SortedKeys::bytes(p.rank));
  for_each_task(p.batch * p.kv_heads * (p.state_slots - 1), [&](int64_t task) {
    const Segment s(p, task);
    if (is_unwanted(p, s.head)) return;
    keys.clear(s.end - s.begin);
    for (int64_t j = s.begin + thread_index(); j < s.end; j += kStateThreads) {
      if (!s.is_valid(j)) continue;
      keys.set_key(j - s.begin, cluster_of(p, s.head, j)), logs.set(j - s.begin, log_mass_of<M, T>(p, s.head, j));
    }
    keys.sort();
    T* state = state_of<T>(p, s.head, s.slot + 1);
    const int64_t columns = p.value_pad + 1;
    sum_by_cluster(
        keys, p.rank, logs, p.value_pad, [&](int64_t place) { return p.v.at<const E>(s.b, s.kv, s.begin + place); },
        [&](int64_t c, T top, T mass, const T* sum, int64_t count) {
          // All keys' logs NaN: so are their sums, at any scale.
          const T log = count == 0 ? T(kLowestLog) : top > T(kLowestLog) ? top : T(0);
          if (lane_index() == 0) store(segment_log_of<T>(p, s.head, s.slot + 1, c), log);
          if (count == 0) return;  // nobody reads the sums
          for (int m = 0; m < kColumns; ++m) {
            const int64_t e = lane_index() + m * kWarp;
            if (e < p.value_pad) store(state + c * columns + e, sum[m]);
          }
          if (lane_index() == 0) store(state + c * columns + p.value_pad, mass);
        });
    sync_block();
  });
}

// Features of a chunk of tokens, in shared memory as [feature][token], and the token of each place, -1 for none.
template <class T>
struct ChunkOfFeatures {
  Shared<T> features;
  Shared<int32_t> token;
  // Adds the sums of `count` features times the tokens' `width` values, and behind them their last number, to rows of
  // the state: a thread per entry. value(token, e) and last(place).
  template <class Value, class Last>
  SB_DEVICE void add_to(T* state, int64_t count, int64_t width, const Value& value, const Last& last) const {
    const int64_t columns = width + 1;
    for (int64_t x = thread_index(); x < count * columns; x += kStateThreads) {
      const int64_t f = x / columns, e = x % columns;
      T sum = T(0);
      for (int i = 0; i < kChunk; ++i) {
        const int64_t at = token.get(i);
        if (at >= 0) sum += features.get(f * kChunk + i) * (e < width ? value(at, e) : last(i));
      }
      store(state + x, load(state + x) + sum);  // short chains round little
    }
  }
};

// The largest kappa of keys, kLowestLog for none; all threads get it. Where no kappa is a number it is 0, so that the
// segment counts: its sums are no numbers at any scale. Begins or ends with no barrier that the caller could lean on.
template <class M, class T>
SB_DEVICE T largest_kappa(const ForwardParams& p, const Segment& s, const EnteringKeys& keys,
                          const Shared<T>& of_warps) {
  constexpr T kNoNumber = T(kLowestLog / 2);  // below every kappa, as kLowestLog is
  T top = T(kLowestLog);
  for (int64_t i = thread_index(); i < keys.count(); i += kStateThreads) {
    const int64_t j = keys.key_at(i);
    if (j < 0) continue;
    const T log = MapRow<M, T>(p.y_map, s.b, s.kv, j).log();
    top = larger(top, log == log ? log : kNoNumber);
  }
  top = warp_max(top);
  if (lane_index() == 0) of_warps.set(warp_index(), top);
  sync_block();
  for (int w = 0; w < kStateThreads / kWarp; ++w) top = larger(top, of_warps.get(w));
  return top == kNoNumber ? T(0) : top;
}

// Sums of features: a block per segment and kFeatureTile features.
template <class E, class T>
SB_KERNEL feature_segments(ForwardParams p) {
  typedef AccType<E> M;
  const int64_t tiles = ceil_div(p.features, kFeatureTile), columns = p.value_pad + 1;
  const auto features = shared_array<T>(0);
  const auto warp_tops = shared_array<T>(kFeatureTile * kChunk * int64_t(sizeof(T)));
  const auto key = shared_array<int32_t>((kFeatureTile * kChunk + kStateThreads / kWarp) * int64_t(sizeof(T)));
  const ChunkOfFeatures<T> chunk{features, key};
  const int thread = thread_index();
  for_each_task(p.batch * p.kv_heads * (p.state_slots - 1) * tiles, [&](int64_t task) {
    const Segment s(p, task / tiles);
    if (is_unwanted(p, s.head)) return;
    const EnteringKeys keys(p, s);
    const int64_t first = task % tiles * kFeatureTile,
                  count = first + kFeatureTile < p.features ? kFeatureTile : p.features - first;
    T* state = state_of<T>(p, s.head, s.slot + 1) + first * columns;
    const T top = largest_kappa<M>(p, s, keys, warp_tops);
    if (thread == 0 && first == 0) store(segment_log_of<T>(p, s.head, s.slot + 1, 0), top);

    // kChunk keys at a time: exp(kappa - top) F(y), then sums.
    for (int64_t x = thread; x < count * columns; x += kStateThreads) store(state + x, T(0));
    for (int64_t begin = 0; begin < keys.count(); begin += kChunk) {
      if (thread < kChunk) {
        const int64_t j = begin + thread < keys.count() ? keys.key_at(begin + thread) : -1;
        key.set(thread, int32_t(j));
        if (j >= 0) {
          const MapRow<M, T> y(p.y_map, s.b, s.kv, j);
          const T weight = exp2_of(y.log() - top);
          visit_low_rank(p.low_rank, [&](auto kernel) SB_INLINE_LAMBDA {
            kernel.expand(p.rank, weight, y, [&](int64_t f, T value) {
              if (f >= first && f < first + count) features.set((f - first) * kChunk + thread, value);
            });
          });
        }
      }
      sync_block();
      chunk.add_to(
          state, count, p.value_pad,
          [&](int64_t j, int64_t e) { return T(widened(load(p.v.at<const E>(s.b, s.kv, j) + e))); },
          [&](int) { return T(1); });
      sync_block();
    }
    sync_block();
  });
}

// The sums over all segments, relative to the largest log scale, in the last slot: a thread per entry. Slots before it
// stay as they are, since nobody reads them; the first one is empty for queries that read none.
template <class T>
SB_KERNEL state_totals(ForwardParams p) {
  const int64_t size = p.slot_size, columns = p.value_pad + 1;
  for_each_element(p.batch * p.kv_heads * size, [&](int64_t at) {
    const int64_t head = at / size, x = at % size, cluster = p.has_clusters() ? x / columns : 0;
    if (is_unwanted(p, head)) return;
    T top = T(kLowestLog), sum = T(0);
    for (int64_t slot = 1; slot < p.state_slots; ++slot)
      top = larger(top, load(static_cast<const T*>(segment_log_of<T>(p, head, slot, cluster))));
    for (int64_t slot = 1; slot < p.state_slots; ++slot) {
      const T of_segment = load(static_cast<const T*>(segment_log_of<T>(p, head, slot, cluster)));
      if (of_segment > T(kNoKeyLog)) sum += load(state_of<T>(p, head, slot) + x) * exp2_of(of_segment - top);
    }
    store(state_of<T>(p, head, p.state_slots - 1) + x, sum);
    if (p.has_clusters() && x % columns == 0) store(static_cast<T*>(p.cluster_log) + head * p.rank + cluster, top);
    if (x > 0) return;
    T* log = static_cast<T*>(p.state_log) + head * p.state_slots;
    store(log, T(kLowestLog)), store(log + p.state_slots - 1, p.has_clusters() ? T(0) : top);
  });
}

// Prefix sums relative to the largest kappa so far: a thread per entry walks the segments in order, and loads some
// ahead of their sums.
template <class T>
SB_KERNEL state_prefixes(ForwardParams p) {
  constexpr int kAhead = 8;
  const int64_t size = p.slot_size;
  for_each_element(p.batch * p.kv_heads * size, [&](int64_t at) {
    const int64_t head = at / size, x = at % size;
    if (is_unwanted(p, head)) return;
    T sum = T(0), log = T(kLowestLog);
    for (int64_t first = 0; first < p.state_slots; first += kAhead) {
      T part[kAhead], of_segment[kAhead];
      for (int i = 0; i < kAhead; ++i) {
        const int64_t slot = first + i;
        const bool has_keys = slot > 0 && slot < p.state_slots;
        of_segment[i] = has_keys ? load(static_cast<const T*>(segment_log_of<T>(p, head, slot, 0))) : T(kLowestLog);
        part[i] = has_keys ? load(state_of<T>(p, head, slot) + x) : T(0);
      }
      for (int i = 0; i < kAhead && first + i < p.state_slots; ++i) {
        if (of_segment[i] > T(kNoKeyLog)) {
          const T top = larger(log, of_segment[i]);
          sum = sum * exp2_of(log - top) + part[i] * exp2_of(of_segment[i] - top);
          log = top;
        }
        store(state_of<T>(p, head, first + i) + x, sum);
        if (x == 0) store(static_cast<T*>(p.state_log) + head * p.state_slots + first + i, log);
      }
    }
  });
}

}  // namespace sb::cuda

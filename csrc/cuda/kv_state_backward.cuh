// Gradients of the states (docs/algorithm.md, section 6), of the representatives, and of what keys take from theirs:
// sums over segments of query slots, then over segments and heads, in a fixed order.
#pragma once
#include "attention_backward.cuh"

namespace sb::cuda {

// The slots that read state slot `segment`, or kSegment of them without a causal edge.
SB_DEVICE void segment_of_slots(const BackwardParams& p, const RowRange& range, int64_t segment, int64_t& begin,
                                int64_t& end) {
  begin = segment * kSegment, end = begin + kSegment;
  if (p.is_causal) begin = first_slot_reading(p, range, segment), end = first_slot_reading(p, range, segment + 1);
  const int64_t slots = slots_of_row(p, range);
  end = end > slots ? slots : end;
}

// dH = sum of a F(x) dO^T and dhz = -sum of a delta F(x): a block per head, segment and kFeatureTile features, as
// feature_segments.
template <class E, class T>
SB_KERNEL query_segments(BackwardParams p) {
  typedef AccType<E> M;
  const int64_t tiles = ceil_div(p.features, kFeatureTile), columns = p.value_pad + 1;
  const auto features = shared_array<T>(0), delta = shared_array<T>(kFeatureTile * kChunk * int64_t(sizeof(T)));
  const auto query_of = shared_array<int32_t>((kFeatureTile + 1) * kChunk * int64_t(sizeof(T)));
  const ChunkOfFeatures<T> chunk{features, query_of};
  const int thread = thread_index();
  for_each_task(p.batch * p.q_heads * p.query_segments * tiles, [&](int64_t task) {
    const int64_t tile = task % tiles, at = task / tiles, segment = at % p.query_segments, row = at / p.query_segments,
                  b = row / p.q_heads, h = row % p.q_heads, head = b * p.kv_heads + p.kv_head(h);
    if (is_unwanted(p, head)) return;
    const int64_t first = tile * kFeatureTile,
                  count = first + kFeatureTile < p.features ? kFeatureTile : p.features - first;
    const RowRange range = load(p.rows + b);
    T* d_state = static_cast<T*>(p.d_kv_state) + at * p.slot_size + first * columns;
    for (int64_t x = thread; x < count * columns; x += kStateThreads) store(d_state + x, T(0));
    int64_t begin = 0, end = 0;
    segment_of_slots(p, range, segment, begin, end);
    for (; begin < end; begin += kChunk) {
      if (thread < kChunk) {
        const int64_t slot = begin + thread;
        const bool counts = slot < end && kind_of(p, b, h, slot) == SlotKind::kState;
        SlotRecord<T> record{T(0), T(0), T(0), T(0), T(0)};
        if (counts) record = load(record_of<T>(p, b, h, slot));
        const int64_t query = counts ? query_of_slot(p, range, b, h, slot) : -1;
        query_of.set(thread, int32_t(query)), delta.set(thread, record.delta + record.correction);
        const auto put = [&](int64_t f, T value) {
          if (f >= first && f < first + count) features.set((f - first) * kChunk + thread, value);
        };
        if (counts && p.has_clusters()) {
          const E* q = p.q.template at<const E>(b, h, query);
          for (int64_t c = first; c < first + count; ++c) {
            const M* representative = static_cast<const M*>(p.given_representatives) + (head * p.rank + c) * p.head_dim;
            const T largest = load(static_cast<const T*>(p.cluster_log) + head * p.rank + c);
            const T sum = sum_of_terms(p.head_dim, [&](int64_t e) {
              return T(widened(load(q + e))) * T(p.scale * kLog2e) * T(load(representative + e));
            });
            put(c, largest > T(kNoKeyLog) ? exp2_of(sum + largest - record.log) * record.inverse : T(0));
          }
        } else if (counts) {
          const MapRow<M, T> x(p.x_map, b, h, query);
          visit_low_rank(p.low_rank,
                         [&](auto kernel) SB_INLINE_LAMBDA { kernel.expand(p.rank, record.state_weight, x, put); });
        }
      }
      sync_block();
      chunk.add_to(
          d_state, count, p.value_pad,
          [&](int64_t query, int64_t e) { return T(widened(load(p.d_out.template at<const E>(b, h, query) + e))); },
          [&](int i) { return -delta.get(i); });
      sync_block();
    }
  });
}

// Sums over the query heads of a key/value head, into the first of them: of later segments, or of all of them, into
// segment 0, without a causal edge. A thread per entry of a state.
template <class T>
SB_KERNEL query_suffixes(BackwardParams p) {
  const int64_t size = p.slot_size, group = p.q_heads / p.kv_heads;
  for_each_element(p.batch * p.kv_heads * size, [&](int64_t at) {
    const int64_t head = at / size, x = at % size, b = head / p.kv_heads,
                  first = b * p.q_heads + head % p.kv_heads * group;
    if (is_unwanted(p, head)) return;
    const auto entry = [&](int64_t h, int64_t segment) {
      return static_cast<T*>(p.d_kv_state) + ((first + h) * p.query_segments + segment) * size + x;
    };
    const auto log_of = [&](int64_t slot) { return log_of_state<T>(p, head, slot); };
    T sum = T(0);
    for (int64_t segment = p.query_segments - 1; segment >= 0; --segment) {
      if (p.is_causal && segment + 1 < p.query_segments) sum *= exp2_of(log_of(segment) - log_of(segment + 1));
      for (int64_t h = 0; h < group; ++h) sum += load(entry(h, segment));
      if (p.is_causal || segment == 0) store(entry(0, segment), sum);
    }
  });
}

// -------------------- representatives

// db_c = scale sum of dE_ic q_i over a segment of slots: a block per head and segment.
template <class E, class T>
SB_KERNEL representative_segments(BackwardParams p) {
  const int64_t segments = ceil_div(p.q_tokens, kSegment), size = p.rank * p.head_dim;
  for_each_task(p.batch * p.q_heads * segments, [&](int64_t task) {
    const int64_t row = task / segments, b = row / p.q_heads, h = row % p.q_heads;
    if (is_unwanted(p, b * p.kv_heads + p.kv_head(h))) return;
    const RowRange range = load(p.rows + b);
    const int64_t slots = slots_of_row(p, range), begin = task % segments * kSegment,
                  end = begin + kSegment < slots ? begin + kSegment : slots;
    const T* d_exponent = static_cast<const T*>(p.d_exponent) + row * p.q_tokens * p.rank;
    for (int64_t x = thread_index(); x < size; x += block_threads()) {
      const int64_t c = x / p.head_dim, e = x % p.head_dim;
      T sum = T(0);
      for (int64_t slot = begin; slot < end; ++slot) {
        if (kind_of(p, b, h, slot) == SlotKind::kNone) continue;
        const E* q = p.q.template at<const E>(b, h, query_of_slot(p, range, b, h, slot));
        sum += load(d_exponent + slot * p.rank + c) * T(widened(load(q + e)));
      }
      store(static_cast<T*>(p.d_representative_parts) + task * size + x, sum * T(p.scale));
    }
  });
}

// Their sums over segments and the heads of a group; that of flagged queries is added. A thread per entry.
template <class M, class T>
SB_KERNEL representative_sums(BackwardParams p) {
  const int64_t segments = ceil_div(p.q_tokens, kSegment), size = p.rank * p.head_dim, group = p.q_heads / p.kv_heads;
  for_each_element(p.batch * p.kv_heads * size, [&](int64_t at) {
    const int64_t head = at / size;
    if (is_unwanted(p, head)) return;
    T sum = T(0);
    for (int64_t i = 0; i < group * segments; ++i)  // query heads of a group are neighbours, and so are their segments
      sum += load(static_cast<const T*>(p.d_representative_parts) + (head * group * segments + i) * size + at % size);
    M* to = static_cast<M*>(p.d_representatives) + at;
    store(to, p.only_flagged ? M(T(load(to)) + sum) : M(sum));
  });
}

// In place of db_c, what each key of cluster c takes from it by its exp(kappa): (db_c - a sum of dkappa) / sum of
// exp(kappa). A warp per cluster.
template <class M, class T>
SB_KERNEL share_representatives(BackwardParams p) {
  const int64_t clusters = p.batch * p.kv_heads * p.rank, warps = kStateThreads / kWarp;
  for_each_task(ceil_div(clusters, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index(), head = at / p.rank, c = at % p.rank, b = head / p.kv_heads;
    if (at >= clusters) return;
    const RowRange range = load(p.rows + b);
    const T largest = load(static_cast<const T*>(p.cluster_log) + at);
    double mass = 0, moment = 0;
    for (int64_t j = range.k_first + lane_index(); j < range.k_end; j += kWarp) {
      if ((p.k_mask && load(p.k_mask + b * p.k_tokens + j)) || cluster_of(p, head, j) != c) continue;
      mass += double(exp2_of(log_mass_of<M, T>(p, head, j) - largest));
      moment += double(load(static_cast<const M*>(p.dy_sum) + head * p.k_tokens + j));
    }
    mass = warp_sum(mass), moment = warp_sum(moment);
    if (mass == 0) return;
    for (int64_t e = lane_index(); e < p.head_dim; e += kWarp) {
      M* d = static_cast<M*>(p.d_representatives) + at * p.head_dim + e;
      const M a = load(static_cast<const M*>(p.query_mean) + head * p.head_dim + e);
      store(d, M((double(load(d)) - moment * double(a)) / mass));
    }
  });
}

}  // namespace sb::cuda

// Sums of states and of their gradients on tensor cores, for tokens of 16 bits.
#pragma once
#include "feature_products.cuh"
#include "kv_state_backward.cuh"

namespace sb::cuda {

static_assert(kStateThreads == kProductThreads);

// As feature_segments, where no state holds keys out.
template <class E, int D>
SB_KERNEL SB_THREADS_AT_MOST(kProductThreads) feature_products(ForwardParams p) {
  const SummedFeatures sums = SummedFeatures::of_state(p);
  for_each_task(p.batch * p.kv_heads * (p.state_slots - 1) * ProductTask<D>::blocks(sums), [&](int64_t i) {
    const ProductTask<D> task(sums, i);
    const Segment s(p, task.row);
    const EnteringKeys keys(p, s);
    const float top = largest_kappa<float>(p, s, keys, shared_array<float>(0));
    if (thread_index() == 0 && task.first == 0 && task.column == 0)
      store(segment_log_of<float>(p, s.head, s.slot + 1, 0), top);
    const auto map = [&](int64_t j) { return MapRow<float, float>(p.y_map, s.b, s.kv, j); };
    FeatureProducts<E, D> products(sums, task.first, task.column);
    products.add(
        keys.count(),
        [&](int64_t i) {
          const int64_t j = keys.key_at(i);
          return SummedToken{j, j < 0 ? 0.0f : exp2_of(map(j).log() - top), 1.0f};
        },
        map, [&](int64_t j) { return p.v.at<const E>(s.b, s.kv, j); });
    products.store_sums(state_of<float>(p, s.head, s.slot + 1));
  });
}

// As query_segments, of features of maps.
template <class E, int D>
SB_KERNEL SB_THREADS_AT_MOST(kProductThreads) query_products(BackwardParams p) {
  const SummedFeatures sums = SummedFeatures::of_state(p);
  for_each_task(p.batch * p.q_heads * p.query_segments * ProductTask<D>::blocks(sums), [&](int64_t i) {
    const ProductTask<D> task(sums, i);
    const int64_t row = task.row / p.query_segments, b = row / p.q_heads, h = row % p.q_heads;
    const RowRange range = load(p.rows + b);
    int64_t begin = 0, end = 0;
    segment_of_slots(p, range, task.row % p.query_segments, begin, end);
    FeatureProducts<E, D> products(sums, task.first, task.column);
    products.add(
        end - begin,
        [&](int64_t i) {
          if (kind_of(p, b, h, begin + i) != SlotKind::kState) return SummedToken{-1, 0, 0};
          const auto record = load(record_of<float>(p, b, h, begin + i));
          return SummedToken{query_of_slot(p, range, b, h, begin + i), record.state_weight,
                             -(record.delta + record.correction)};
        },
        [&](int64_t query) { return MapRow<float, float>(p.x_map, b, h, query); },
        [&](int64_t query) { return p.d_out.template at<const E>(b, h, query); });
    products.store_sums(static_cast<float*>(p.d_kv_state) + task.row * p.slot_size);
  });
}

// What a slot's query takes from the state of each cluster.
struct ClusterWeights {
  const float *scores, *largest;
  float scale, log, inverse;
  SB_DEVICE float operator()(int64_t c) const {
    const float top = load(largest + c);
    return top > float(kNoKeyLog) ? exp2_of(load(scores + c) * scale + top - log) * inverse : 0.0f;
  }
};

// As query_segments, with clusters, from the products of queries and representatives.
template <class E, int D>
SB_KERNEL SB_THREADS_AT_MOST(kProductThreads) cluster_query_products(BackwardParams p) {
  const SummedFeatures sums = SummedFeatures::of_given(p.rank, p.value_pad, p.value_pad + 1);
  for_each_task(p.batch * p.q_heads * p.query_segments * ProductTask<D>::blocks(sums), [&](int64_t i) {
    const ProductTask<D> task(sums, i);
    const int64_t row = task.row / p.query_segments, b = row / p.q_heads, h = row % p.q_heads,
                  head = b * p.kv_heads + p.kv_head(h);
    const RowRange range = load(p.rows + b);
    int64_t begin = 0, end = 0;
    segment_of_slots(p, range, task.row % p.query_segments, begin, end);
    const auto query_at = [&](int64_t slot) { return query_of_slot(p, range, b, h, slot); };
    FeatureProducts<E, D> products(sums, task.first, task.column);
    products.add(
        end - begin,
        [&](int64_t i) {
          const int64_t slot = begin + i;
          if (kind_of(p, b, h, slot) != SlotKind::kState) return SummedToken{-1, 0, 0};
          const auto record = load(record_of<float>(p, b, h, slot));
          return SummedToken{slot, 1.0f, -(record.delta + record.correction)};
        },
        [&](int64_t slot) {
          const auto record = load(record_of<float>(p, b, h, slot));
          return ClusterWeights{p.cluster_scores + (row * p.q_tokens + query_at(slot)) * p.rank,
                                static_cast<const float*>(p.cluster_log) + head * p.rank, float(p.scale * kLog2e),
                                record.log, record.inverse};
        },
        [&](int64_t slot) { return p.d_out.template at<const E>(b, h, query_at(slot)); });
    products.store_sums(static_cast<float*>(p.d_kv_state) + task.row * p.slot_size);
  });
}

// As representative_segments.
template <class E, int D>
SB_KERNEL SB_THREADS_AT_MOST(kProductThreads) representative_products(BackwardParams p) {
  const SummedFeatures sums = SummedFeatures::of_given(p.rank, p.head_dim, p.head_dim);
  const int64_t segments = ceil_div(p.q_tokens, kSegment);
  for_each_task(p.batch * p.q_heads * segments * ProductTask<D>::blocks(sums), [&](int64_t i) {
    const ProductTask<D> task(sums, i);
    const int64_t row = task.row / segments, b = row / p.q_heads, h = row % p.q_heads,
                  begin = task.row % segments * kSegment;
    const RowRange range = load(p.rows + b);
    const int64_t slots = slots_of_row(p, range), end = begin + kSegment < slots ? begin + kSegment : slots;
    const float* d_exponent = static_cast<const float*>(p.d_exponent) + row * p.q_tokens * p.rank;
    const auto slot_of = [&](int64_t i) { return begin + i; };
    FeatureProducts<E, D> products(sums, task.first, task.column);
    products.add(
        end - begin,
        [&](int64_t i) {
          const bool counts = kind_of(p, b, h, slot_of(i)) != SlotKind::kNone;
          return SummedToken{counts ? slot_of(i) : -1, counts ? float(p.scale) : 0.0f, 0.0f};
        },
        [&](int64_t slot) { return [=](int64_t c) { return load(d_exponent + slot * p.rank + c); }; },
        [&](int64_t slot) { return p.q.template at<const E>(b, h, query_of_slot(p, range, b, h, slot)); });
    products.store_sums(static_cast<float*>(p.d_representative_parts) + task.row * p.rank * p.head_dim);
  });
}

}  // namespace sb::cuda

// What the backward pass of queries and that of keys share: the gradients of one pair (docs/algorithm.md, section 6).
#pragma once
#include "attention_query.cuh"
#include "kv_state.cuh"

namespace sb::cuda {

template <class T>
SB_DEVICE SlotRecord<T>* record_of(const BackwardParams& p, int64_t b, int64_t h, int64_t slot) {
  return static_cast<SlotRecord<T>*>(p.records) + (b * p.q_heads + h) * p.q_tokens + slot;
}
SB_DEVICE SlotKind kind_of(const BackwardParams& p, int64_t b, int64_t h, int64_t slot) {
  return load(p.kinds + (b * p.q_heads + h) * p.q_tokens + slot);
}

// The state slot that a query slot reads, and the first slot that reads `state_slot` or a later one.
SB_DEVICE int64_t state_of_slot(const BackwardParams& p, const RowRange& range, int64_t slot) {
  return kv_state_of_edge(p, edge_of_slot(p, range, slot - slot % p.slots_per_state));
}
SB_DEVICE int64_t first_slot_reading(const BackwardParams& p, const RowRange& range, int64_t state_slot) {
  return pad_to(first_slot_seeing(p, range, state_slot * kChunk), p.slots_per_state);
}

// A query slot and a key that it sees. `is_in_state`: the state holds the key, so a list takes its L back.
template <class T>
struct Pair {
  bool is_listed = true, is_in_state = false;
  T score = T(0), value = T(0);  // of a listed key, to base 2; dO.v
  LowRankTerm<T> low_rank{T(0), T(0), T(0)};
  T kappa_ref = T(0);
};

// Of the weight, w; of scale q.k, ds; and of x.y, dt, or with clusters of the exponent of L.
template <class T>
struct PairGradients {
  T w, ds, dt;
};

template <class T>
SB_DEVICE PairGradients<T> gradients_of_pair(const ForwardParams& p, const SlotRecord<T>& of, const Pair<T>& pair) {
  const T g = (pair.value - of.delta) - of.correction;
  PairGradients<T> result{T(0), T(0), T(0)};
  if (pair.is_listed) {
    result.w = exp2_of(pair.score - of.log) * of.inverse;
    result.ds = result.w * g;
    if (!pair.is_in_state) return result;
  }
  const LowRankTerm<T>& term = pair.low_rank;
  T weight = pair.is_in_state && !p.has_clusters() ? of.state_weight * exp2_of(term.key - pair.kappa_ref)
                                                   : exp2_of((term.query - of.log) + term.key) * of.inverse;
  if (pair.is_listed) weight = -weight;
  result.w += weight * kernel_value(p, term.product);
  result.dt = weight * kernel_slope(p, term.product) * g;
  return result;
}

// Adds the sum of dt_i z_i over the pairs of a step to dz, and that of dt_i to its last column.
template <class T, class Row>
SB_DEVICE void add_map_rows(const ForwardParams& p, const Shared<T>& dz, const Shared<T>& dt,
                            const Shared<int32_t>& token, const Row& row_of) {
  for (int64_t a = lane_index(); a <= p.rank; a += kWarp) {
    T sum = T(0);
    for (int i = 0; i < kWarp; ++i) {
      const T of_pair = dt.get(i);
      if (of_pair != T(0)) sum += a < p.rank ? of_pair * row_of(token.get(i))(a) : of_pair;
    }
    dz.set(a, dz.get(a) + sum);
  }
}

// The gradient by a log scale, from that by the coordinates z in shared memory (LowRankKernel::log_gradient).
template <class M, class T>
SB_DEVICE T log_gradient_of(const ForwardParams& p, const MapRow<M, T>& z, const Shared<T>& dz) {
  T sum = T(0);
  for (int64_t a = lane_index(); a < p.rank; a += kWarp) sum += z(a) * dz.get(a);
  return visit_low_rank(p.low_rank, [&](auto kernel) SB_INLINE_LAMBDA {
    const bool has_last = decltype(kernel)::gradient_rows(1) > 1;
    return decltype(kernel)::log_gradient(warp_sum(sum), has_last ? dz.get(p.rank) : T(0));
  });
}

// Adds weight F'(z)^T g to dz, both in shared memory: a lane by itself where a feature meets two coordinates.
template <class M, class T>
SB_DEVICE void chain_features(const ForwardParams& p, T weight, const MapRow<M, T>& z, const Shared<T>& g,
                              const Shared<T>& dz) {
  const auto of_feature = [&](int64_t f) { return g.get(f); };
  const auto now = [&](int64_t a) { return dz.get(a); };
  const auto put = [&](int64_t a, T value) { dz.set(a, value); };
  sync_warp();
  if (p.low_rank != LowRank::kQuadratic)
    for (int64_t f = lane_index(); f < p.rank; f += kWarp)
      FeatureKernel::chain_feature(f, weight, of_feature, now, put);
  else if (lane_index() == 0)
    QuadraticKernel::chain(p.rank, weight, z, of_feature, now, put);
  sync_warp();
}

// The projection's row of output `o` for a head, which made its maps.
template <class M>
SB_DEVICE const M* weight_row(const ForwardParams& p, const MapWeight& weight, int64_t b, int64_t h, int64_t heads,
                              int64_t o) {
  const int64_t head = h * weight.heads / heads;
  return static_cast<const M*>(weight.data) + b * weight.batch + (head * (p.rank + 1) + o) * p.head_dim;
}

// Arrays of shared memory, one behind the other.
class Carver {
 public:
  SB_DEVICE explicit Carver(int64_t offset) : at(offset) {}
  template <class V>
  SB_DEVICE Shared<V> take(int64_t values) {
    const auto array = shared_array<V>(at);
    at += pad_to(values * int64_t(sizeof(V)), 8);
    return array;
  }

 private:
  int64_t at;
};
template <class V>
SB_HD int64_t bytes_of(int64_t values) {
  return pad_to(values * int64_t(sizeof(V)), 8);
}

}  // namespace sb::cuda

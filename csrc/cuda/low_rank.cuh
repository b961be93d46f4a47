// The low-rank part of a pair: coordinates, log scales and clusters as the operators take them, read in place; and the
// states that are stored.
#pragma once
#include "../math/low_rank_kernels.h"
#include "device.h"

namespace sb::cuda {

// Coordinates and log scale of one token, limited; T may be wider than the map.
template <class M, class T>
struct MapRow {
  const M* data;
  int64_t step, log_column;
  T limit, log_limit, log_factor;
  SB_DEVICE MapRow(const MapView& map, int64_t b, int64_t h, int64_t i)
      : data(static_cast<const M*>(map.data) + b * map.batch + h * map.head + i * map.row),
        step(map.step),
        log_column(map.log_column),
        limit(T(map.coordinate_limit)),
        log_limit(T(map.log_limit)),
        log_factor(T(map.log_factor)) {}
  SB_DEVICE T operator()(int64_t a) const { return limited(T(load(data + a * step)), limit); }
  SB_DEVICE T log() const { return limited(T(load(data + log_column * step)) * log_factor, log_limit); }

 private:
  static SB_DEVICE T limited(T value, T limit) {
    return value > limit ? limit : value < -limit ? -limit : value;  // NaN stays NaN
  }
};

template <class M, class T>
SB_DEVICE T product_of_maps(const ForwardParams& p, const MapRow<M, T>& x, const MapRow<M, T>& y) {
  return sum_of_terms(p.rank, [&](int64_t a) { return x(a) * y(a); });
}
// K(t) and K'(t); with clusters L is all in its exponent.
template <class T>
SB_DEVICE T kernel_value(const ForwardParams& p, T t) {
  return p.has_clusters() ? T(1) : p.low_rank == LowRank::kQuadratic ? QuadraticKernel::value(t) : t;
}
template <class T>
SB_DEVICE T kernel_slope(const ForwardParams& p, T t) {
  return p.low_rank == LowRank::kQuadratic ? QuadraticKernel::slope(t) : T(1);
}

// The cluster of a key, inside the range whatever the caller gave.
SB_DEVICE int64_t cluster_of(const ForwardParams& p, int64_t head, int64_t j) {
  const int32_t c = load(p.cluster + head * p.k_tokens + j);
  return c < 0 ? 0 : c >= p.rank ? p.rank - 1 : c;
}

// The log mass of a key in base 2.
template <class M, class T>
SB_DEVICE T log_mass_of(const ForwardParams& p, int64_t head, int64_t j) {
  const T log = T(load(static_cast<const M*>(p.log_mass) + head * p.k_tokens + j)) * T(kLog2e);
  const T limit = T(p.cluster_limit);
  return log > limit ? limit : log < -limit ? -limit : log;
}

// The largest log mass of a cluster, very low for none; and the exponent of a pair with its representative, from the
// score in base 2.
SB_DEVICE float log_of_cluster(const ForwardParams& p, int64_t head, int64_t c) {
  return c < p.rank ? load(static_cast<const float*>(p.cluster_log) + head * p.rank + c) : float(kLowestLog);
}
SB_DEVICE float exponent_of_cluster(float score, float log) {
  return log > float(kNoKeyLog) ? score + log : float(kLowestLog);
}

// A stored state.
template <class T>
SB_DEVICE T* state_of(const ForwardParams& p, int64_t head, int64_t slot) {
  return static_cast<T*>(p.kv_state) + (head * p.state_slots + slot) * p.slot_size;
}
// The log scale of what a query reads by a slot.
template <class T>
SB_DEVICE T log_of_state(const ForwardParams& p, int64_t head, int64_t state_slot) {
  return load(static_cast<const T*>(p.state_log) + head * p.state_slots + p.stored_state(state_slot));
}

}  // namespace sb::cuda

// Feature expansion F(z) of the low-rank kernels and its chain rule (math/low_rank_kernels.h), on kLanes tokens at a
// time held as [coordinate][token].
#pragma once
#include "../../math/low_rank_kernels.h"
#include "vec.h"

namespace sb::SB_ISA {

// Log scales in base 2 of the tokens of one head.
template <class T>
struct LogScales {
  const T* p;
  int64_t stride;
  SB_INLINE T operator()(int64_t i) const { return p[i * stride]; }
};
template <class T>
SB_INLINE LogScales<T> log_scales(const StridedTensor& rows, int64_t b, int64_t h) {
  return {rows.at<const T>(b, h, 0), rows.row};
}

// Weights (rank + 1, head_pad) of the projection that made the map of head h of `heads`; null where it is not given.
template <class T>
SB_INLINE const T* weight_of_head(const AttentionParams& p, const MapWeight& w, int64_t b, int64_t h, int64_t heads) {
  if (!w.data) return nullptr;
  return static_cast<const T*>(w.data) + b * w.batch + h * w.heads / heads * (p.rank + 1) * p.head_pad;
}

// N lanes of [row][kLanes] from `lane` on, by row.
template <class T, int N, int kLanes>
struct LaneRows {
  const T* p;
  SB_INLINE auto operator()(int64_t row) const { return load<T, N>(p + row * kLanes); }
};
template <class T, int N, int kLanes>
struct LaneStores {
  T* p;
  SB_INLINE void operator()(int64_t row, Vector<T, N> v) const { store<T, N>(p + row * kLanes, v); }
};

// F[f][lane] = weight[lane] F_f(z).
template <class T, int kLanes>
SB_INLINE void expand_features(LowRank kind, int64_t rank, const T* z, const T* weight, T* F) {
  constexpr int N = kLaneWidth<T, kLanes>;
  visit_low_rank(kind, [&](auto kernel) SB_INLINE_LAMBDA {
    for (int lane = 0; lane < kLanes; lane += N)
      kernel.expand(rank, load<T, N>(weight + lane), LaneRows<T, N, kLanes>{z + lane},
                    LaneStores<T, N, kLanes>{F + lane});
  });
}

// Adds weight dF/dz^T g to dz [gradient_rows][lane].
template <class T, int kLanes>
SB_INLINE void chain_features(LowRank kind, int64_t rank, const T* z, const T* weight, const T* g, T* dz) {
  constexpr int N = kLaneWidth<T, kLanes>;
  visit_low_rank(kind, [&](auto kernel) SB_INLINE_LAMBDA {
    for (int lane = 0; lane < kLanes; lane += N)
      kernel.chain(rank, load<T, N>(weight + lane), LaneRows<T, N, kLanes>{z + lane}, LaneRows<T, N, kLanes>{g + lane},
                   LaneRows<T, N, kLanes>{dz + lane}, LaneStores<T, N, kLanes>{dz + lane});
  });
}

// The derivative by rho or kappa from z and dz: sum of dL L over the other side.
template <class T, int kLanes>
SB_INLINE void log_gradient(LowRank kind, int64_t rank, const T* z, const T* dz, T* d_log) {
  constexpr int N = kLaneWidth<T, kLanes>;
  for (int lane = 0; lane < kLanes; lane += N) {
    Vector<T, N> sum{};
    for (int64_t a = 0; a < rank; ++a) sum += load<T, N>(z + a * kLanes + lane) * load<T, N>(dz + a * kLanes + lane);
    visit_low_rank(kind, [&](auto kernel) SB_INLINE_LAMBDA {
      store<T, N>(d_log + lane, kernel.log_gradient(sum, load<T, N>(dz + rank * kLanes + lane)));
    });
  }
}

// K and K' of a kind known at run time. Every kind is evaluated and one selected: a branch in its place slows the
// forward pass down.
struct RuntimeKernel {
  bool is_quadratic;
  SB_INLINE explicit RuntimeKernel(LowRank kind) : is_quadratic(kind == LowRank::kQuadratic) {}
  SB_INLINE auto value(auto t) const {
    const auto quadratic = QuadraticKernel::value(t);
    return is_quadratic ? quadratic : FeatureKernel::value(t);
  }
  SB_INLINE auto slope(auto t) const {
    const auto quadratic = QuadraticKernel::slope(t);
    return is_quadratic ? quadratic : FeatureKernel::slope(t);
  }
  SB_INLINE auto root(auto t) const {
    const auto quadratic = QuadraticKernel::root(t);
    return is_quadratic ? quadratic : FeatureKernel::root(t);
  }
};

}  // namespace sb::SB_ISA

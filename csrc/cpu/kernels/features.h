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

// The centre of a state, null where it is 0.
template <class T>
SB_INLINE const T* centre_of_slot(const AttentionParams& p, int64_t b, int64_t kv, int64_t slot) {
  if (!p.centre) return nullptr;
  const int64_t row = (b * p.kv_heads + kv) * p.centre_slots + (p.centre_slots > 1 ? slot : 0);
  const T* centre = static_cast<const T*>(p.centre) + row * p.map_pad;
  return centre[p.rank] == T(0) ? nullptr : centre;
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

// Coordinates y [rank][lane] as those about the centre.
template <class T, int kLanes>
SB_INLINE void subtract_centre(int64_t rank, const T* centre, T* y) {
  constexpr int N = kLaneWidth<T, kLanes>;
  for (int64_t a = 0; a < rank; ++a)
    for (int lane = 0; lane < kLanes; lane += N)
      store<T, N>(y + a * kLanes + lane, load<T, N>(y + a * kLanes + lane) - centre[a]);
}

// alpha[lane] = root(x.centre), and F(x), which is scaled by any weight, as the features that F(y - centre) meets.
template <class T, int kLanes>
SB_INLINE void centre_features(LowRank kind, int64_t rank, const T* x, const T* centre, T* alpha, T* F) {
  constexpr int N = kLaneWidth<T, kLanes>;
  for (int lane = 0; lane < kLanes; lane += N) {
    Vector<T, N> t{};
    for (int64_t a = 0; a < rank; ++a) t += load<T, N>(x + a * kLanes + lane) * centre[a];
    visit_low_rank(kind, [&](auto kernel) SB_INLINE_LAMBDA {
      const auto root = kernel.root(t);
      store<T, N>(alpha + lane, root);
      kernel.centre(rank, root, LaneRows<T, N, kLanes>{F + lane}, LaneStores<T, N, kLanes>{F + lane});
    });
  }
}

// chain_features of what centre_features made; overwrites g.
template <class T, int kLanes>
SB_INLINE void chain_centred_features(LowRank kind, int64_t rank, const T* x, const T* centre, const T* alpha,
                                      const T* weight, T* g, T* dx) {
  constexpr int N = kLaneWidth<T, kLanes>;
  typedef Vector<T, N> V;
  for (int lane = 0; lane < kLanes; lane += N) {
    const V root = load<T, N>(alpha + lane);
    visit_low_rank(kind, [&](auto kernel) SB_INLINE_LAMBDA {
      const V d_root = kernel.uncentre(rank, root, LaneRows<T, N, kLanes>{x + lane}, LaneRows<T, N, kLanes>{g + lane},
                                       LaneStores<T, N, kLanes>{g + lane});
      // Of t = x.centre. What it adds to x.dx is no part of the derivative by rho.
      const V dt = load<T, N>(weight + lane) * d_root * T(0.5);
      for (int64_t a = 0; a < rank; ++a)
        store<T, N>(dx + a * kLanes + lane, load<T, N>(dx + a * kLanes + lane) + dt * centre[a]);
      store<T, N>(dx + rank * kLanes + lane, load<T, N>(dx + rank * kLanes + lane) - dt * (root - T(1)));
    });
  }
  chain_features<T, kLanes>(kind, rank, x, weight, g, dx);
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

// Low-rank kernels L_ij = exp(rho_i + kappa_j) K(t), t = x_i.y_j, and their feature expansions F with
// F(x).F(y) = K(x.y) (docs/algorithm.md, section 2).
//
// A kind of kernel is one type with these members, and one line in visit_low_rank:
//   kDegree, root(t), slope(t)   K(t) = root(t)^kDegree, K'(t) = slope(t); value(t) is K(t)
//   features(rank)               width of F
//   map_width(rank)              width of a row of coordinates in memory, padded
//   gradient_rows(rank)          rows that the products of dL/dt and the other side's coordinates fill
//   norm_of_features(s)          |F(z)|, from s = |z|^2
//   kHasSigns                    whether the terms of F(x).F(y) have both signs
//   expand, chain, log_gradient  F(z), its chain rule, and the derivative by the log scale
//   centre, uncentre             F(x) to the features that F(z) meets about a centre c of y = c + z, and back
//   move_centre                  F(z - delta) from F(z)
// V is what one thread computes with: a scalar, or a vector of tokens. GCC compiles templates for the instruction set
// that is selected where they stand, so kernels.h, which comes before the selection, does not include this file.
#pragma once
#include "../params.h"

namespace sb {

// The type of one lane of V.
template <class V>
auto lane_of(V v) {
  if constexpr (requires { v[0]; })
    return v[0] + v[0];
  else
    return v;
}
template <class V>
using LaneOf = decltype(lane_of(V{}));

template <class V>
SB_HD V square_root(V v) {
  if constexpr (requires { v[0]; }) {
    for (int i = 0; i < int(sizeof(V) / sizeof(v[0])); ++i) v[i] = LaneOf<V>(__builtin_sqrt(double(v[i])));
    return v;
  } else {
    return V(__builtin_sqrt(double(v)));
  }
}

// K(t) = (1 + t / 2)^2 with F(z) = [1, z_a, z_a^2 / 2, sqrt(1/2) z_a z_b (a < b)].
struct QuadraticKernel {
  static constexpr int kDegree = 2;
  template <class V>
  static SB_HD V root(V t) {
    return t * LaneOf<V>(0.5) + LaneOf<V>(1);
  }
  static SB_HD auto slope(auto t) { return root(t); }
  static SB_HD auto value(auto t) { return root(t) * root(t); }
  static constexpr bool kHasSigns = true;
  static SB_HD auto norm_of_features(auto s) { return root(s); }

  static SB_HD constexpr int64_t features(int64_t rank) { return (rank + 1) * (rank + 2) / 2; }
  static SB_HD constexpr int64_t map_width(int64_t rank) { return packed_width(rank); }
  // The packed column of ones collects the sum of dL/dt.
  static SB_HD constexpr int64_t gradient_rows(int64_t rank) { return rank + 1; }

  // Calls store(f, weight F_f(z)) for every feature; z(a) is coordinate a.
  template <class V, class Z, class Store>
  static SB_HD void expand(int64_t rank, V weight, const Z& z, const Store& store) {
    typedef LaneOf<V> T;
    store(0, weight);
    int64_t pair = rank + 1;
    for (int64_t a = 0; a < rank; ++a) {
      const V wa = weight * z(a);
      store(a + 1, wa);
      store(pair++, wa * z(a) * T(0.5));
      const V wa2 = wa * T(kRootHalf);
      for (int64_t b = a + 1; b < rank; ++b, ++pair) store(pair, wa2 * z(b));
    }
  }

  // Adds weight dF/dz^T g to the rows 0 .. rank - 1 of dz. Row `rank` collects g_0 + z.g_1 / 2: with it
  // log_gradient is the same formula for the state and for listed keys.
  template <class V, class Z, class G, class Load, class Store>
  static SB_HD void chain(int64_t rank, V weight, const Z& z, const G& g, const Load& dz, const Store& store) {
    typedef LaneOf<V> T;
    V half = V{};
    int64_t pair = rank + 1;
    for (int64_t a = 0; a < rank; ++a) {
      const V za = z(a), wa = weight * T(kRootHalf) * za, linear = g(a + 1);
      half += za * linear;
      V da = dz(a) + weight * (linear + za * g(pair++));
      for (int64_t b = a + 1; b < rank; ++b, ++pair) {
        const V gab = g(pair);
        da += weight * T(kRootHalf) * z(b) * gab;
        store(b, dz(b) + wa * gab);
      }
      store(a, da);
    }
    store(rank, dz(rank) + weight * (g(0) + half * T(0.5)));
  }

  // F_to(z - delta) is the sum of factor F_from(z) over the calls of visit(to, from, factor); delta(a) is coordinate a.
  template <class Delta, class Visit>
  static SB_HD void move_centre(int64_t rank, const Delta& delta, const Visit& visit) {
    typedef decltype(delta(0)) T;
    constexpr T kRoot = T(kRootHalf);
    visit(0, 0, T(1));
    int64_t pair = rank + 1;
    for (int64_t a = 0; a < rank; ++a) {
      const T da = delta(a);
      visit(a + 1, a + 1, T(1)), visit(a + 1, 0, -da);
      visit(pair, pair, T(1)), visit(pair, a + 1, -da), visit(pair, 0, da * da * T(0.5));
      ++pair;
      for (int64_t b = a + 1; b < rank; ++b, ++pair) {
        visit(pair, pair, T(1)), visit(pair, 0, kRoot * da * delta(b));
        visit(pair, b + 1, -kRoot * da), visit(pair, a + 1, -kRoot * delta(b));
      }
    }
  }

  // Sum of dL L over the other side: `sum` is z.dz, `last` the row of dz behind the coordinates.
  template <class V>
  static SB_HD V log_gradient(V sum, V last) {
    return last + sum * LaneOf<V>(0.5);
  }

  // K(x.(c + z)) = (alpha + x.z / 2)^2 with alpha = root(x.c): F(x) with its constant times alpha^2 and its linear
  // features times alpha, in place.
  template <class V, class Load, class Store>
  static SB_HD void centre(int64_t rank, V alpha, const Load& F, const Store& store) {
    store(0, F(0) * (alpha * alpha));
    for (int64_t a = 0; a < rank; ++a) store(a + 1, F(a + 1) * alpha);
  }
  // Turns the gradient g by those features into that by F(x), in place, and returns that by alpha.
  template <class V, class X, class Load, class Store>
  static SB_HD V uncentre(int64_t rank, V alpha, const X& x, const Load& g, const Store& store) {
    V d_alpha = (alpha + alpha) * g(0);
    store(0, g(0) * (alpha * alpha));
    for (int64_t a = 0; a < rank; ++a) {
      d_alpha += x(a) * g(a + 1);
      store(a + 1, g(a + 1) * alpha);
    }
    return d_alpha;
  }

 private:
  static constexpr double kRootHalf = 0.70710678118654752440;
};

// K(t) = t of general non-negative features: F(z) = z. So it is for the centroid kernel, whose features are the weights
// of the clusters, and of a key one-hot its cluster (csrc/cpu/kernels/cluster_weights.h).
struct FeatureKernel {
  static constexpr int kDegree = 1;
  static SB_HD auto root(auto t) { return t; }
  template <class V>
  static SB_HD V slope(V) {
    return V{} + LaneOf<V>(1);
  }
  static SB_HD auto value(auto t) { return t; }
  static constexpr bool kHasSigns = false;
  static SB_HD auto norm_of_features(auto s) { return square_root(s); }

  static SB_HD constexpr int64_t features(int64_t rank) { return rank; }
  static SB_HD constexpr int64_t map_width(int64_t rank) { return pad_to(rank, kPad); }
  static SB_HD constexpr int64_t gradient_rows(int64_t rank) { return rank; }

  template <class V, class Z, class Store>
  static SB_HD void expand(int64_t rank, V weight, const Z& z, const Store& store) {
    for (int64_t f = 0; f < rank; ++f) store(f, weight * z(f));
  }
  template <class V, class Z, class G, class Load, class Store>
  static SB_HD void chain(int64_t rank, V weight, const Z&, const G& g, const Load& dz, const Store& store) {
    for (int64_t f = 0; f < rank; ++f) chain_feature(f, weight, g, dz, store);
  }
  // The same of one feature, which no other one meets.
  template <class V, class G, class Load, class Store>
  static SB_HD void chain_feature(int64_t f, V weight, const G& g, const Load& dz, const Store& store) {
    store(f, dz(f) + weight * g(f));
  }
  static SB_HD auto log_gradient(auto sum, auto) { return sum; }
  // Nothing cancels in a sum of non-negative terms, so that no state needs a centre.
  static SB_HD void centre(int64_t, auto, const auto&, const auto&) {}
  static SB_HD void move_centre(int64_t, const auto&, const auto&) {}
  template <class V>
  static SB_HD V uncentre(int64_t, V, const auto&, const auto&, const auto&) {
    return V{};
  }
};

// Calls visit with the kernel's type. LowRank::kNone counts as general features, of which there are none.
template <class Visit>
SB_HD auto visit_low_rank(LowRank kind, const Visit& visit) {
  return kind == LowRank::kQuadratic ? visit(QuadraticKernel{}) : visit(FeatureKernel{});
}

// Width of F, of a padded row of coordinates, and rows of their gradient, for a kind known at run time.
SB_HD int64_t feature_count(LowRank kind, int64_t rank) {
  return visit_low_rank(kind, [&](auto kernel) SB_INLINE_LAMBDA { return kernel.features(rank); });
}
SB_HD int64_t map_width(LowRank kind, int64_t rank) {
  return visit_low_rank(kind, [&](auto kernel) SB_INLINE_LAMBDA { return kernel.map_width(rank); });
}
SB_HD int64_t gradient_rows(LowRank kind, int64_t rank) {
  return visit_low_rank(kind, [&](auto kernel) SB_INLINE_LAMBDA { return kernel.gradient_rows(rank); });
}

}  // namespace sb

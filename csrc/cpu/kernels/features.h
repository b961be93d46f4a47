// Feature expansion F(z) of the low-rank kernels and its chain rule, on `kLanes` tokens at a time held as
// [coordinate][token].

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

// F[f][lane] = weight[lane] F_f(z). Quadratic: F = [1, z_a, z_a^2 / 2, sqrt(1/2) z_a z_b (a < b)], so that F(x).F(y) =
// (1 + x.y / 2)^2.
template <class T, int kLanes>
SB_INLINE void expand_features(LowRank kind, int64_t rank, const T* z, const T* weight, T* F) {
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>;
  typedef typename Vec<T, N>::type V;
  for (int lane = 0; lane < kLanes; lane += N) {
    const V w = load<T, N>(weight + lane);
    if (kind == LowRank::kFeatures) {
      for (int64_t f = 0; f < rank; ++f) store<T, N>(F + f * kLanes + lane, w * load<T, N>(z + f * kLanes + lane));
      continue;
    }
    store<T, N>(F + lane, w);
    T* pair = F + (rank + 1) * kLanes + lane;
    for (int64_t a = 0; a < rank; ++a) {
      const V wa = w * load<T, N>(z + a * kLanes + lane);
      store<T, N>(F + (a + 1) * kLanes + lane, wa);
      store<T, N>(pair, wa * load<T, N>(z + a * kLanes + lane) * T(0.5));
      pair += kLanes;
      const V wa2 = wa * T(0.70710678118654752440);
      for (int64_t b = a + 1; b < rank; ++b, pair += kLanes) store<T, N>(pair, wa2 * load<T, N>(z + b * kLanes + lane));
    }
  }
}

// Adds weight * dF/dz^T g to dz (rows 0 .. rank-1). For the quadratic kernel row `rank` collects g_0 + z.g_1 / 2: with
// it the derivative by the log scale, sum_f F_f g_f, is row `rank` + z.dz / 2, the same formula that holds for the
// pairs (see finish_log_gradient).
template <class T, int kLanes>
SB_INLINE void chain_features(LowRank kind, int64_t rank, const T* z, const T* weight, const T* g, T* dz) {
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>;
  typedef typename Vec<T, N>::type V;
  for (int lane = 0; lane < kLanes; lane += N) {
    const V w = load<T, N>(weight + lane);
    if (kind == LowRank::kFeatures) {
      for (int64_t f = 0; f < rank; ++f)
        store<T, N>(dz + f * kLanes + lane, load<T, N>(dz + f * kLanes + lane) + w * load<T, N>(g + f * kLanes + lane));
      continue;
    }
    V half = V{};
    const T* pair = g + (rank + 1) * kLanes + lane;
    for (int64_t a = 0; a < rank; ++a) {
      const V za = load<T, N>(z + a * kLanes + lane);
      const V wa = w * T(0.70710678118654752440) * za;
      const V linear = load<T, N>(g + (a + 1) * kLanes + lane);
      half += za * linear;
      V da = load<T, N>(dz + a * kLanes + lane) + w * (linear + za * load<T, N>(pair));
      pair += kLanes;
      for (int64_t b = a + 1; b < rank; ++b, pair += kLanes) {
        const V gab = load<T, N>(pair);
        da += w * T(0.70710678118654752440) * load<T, N>(z + b * kLanes + lane) * gab;
        store<T, N>(dz + b * kLanes + lane, load<T, N>(dz + b * kLanes + lane) + wa * gab);
      }
      store<T, N>(dz + a * kLanes + lane, da);
    }
    T* log_row = dz + rank * kLanes + lane;
    store<T, N>(log_row, load<T, N>(log_row) + w * (load<T, N>(g + lane) + half * T(0.5)));
  }
}

// The derivative by rho or kappa from z and dz: sum over pairs of dL L, where L depends on z through t = x.y as (1 +
// t/2)^2 or t.
template <class T, int kLanes>
SB_INLINE void finish_log_gradient(LowRank kind, int64_t rank, const T* z, const T* dz, T* d_log) {
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>;
  typedef typename Vec<T, N>::type V;
  const bool quadratic = kind == LowRank::kQuadratic;
  for (int lane = 0; lane < kLanes; lane += N) {
    V sum = V{};
    for (int64_t a = 0; a < rank; ++a) sum += load<T, N>(z + a * kLanes + lane) * load<T, N>(dz + a * kLanes + lane);
    store<T, N>(d_log + lane, quadratic ? load<T, N>(dz + rank * kLanes + lane) + sum * T(0.5) : sum);
  }
}

// Calls visit(step, first lane, vector of lanes) for the steps of `kLanes` rows of elements, ascending in every lane.
template <class E, int kLanes, class Visit>
SB_INLINE void for_each_step(const E* const* rows, int64_t width, const Visit& visit) {
  typedef StepOf<E> S;
  constexpr int N = kLanes < kWidth<S> ? kLanes : kWidth<S>;
  typedef typename Vec<S, N>::type V;
  const int64_t steps = steps_of<E>(width);
  int64_t e = 0;
  for (; e + N <= steps; e += N)
    for (int lane = 0; lane < kLanes; lane += N) {
      V square[N];
      SB_EACH (i, N) square[i] = load<S, N>(reinterpret_cast<const S*>(rows[lane + i]) + e);
      transpose_square<S, N>(square);
      SB_EACH (i, N) visit(e + i, lane, square[i]);
    }
  for (; e < steps; ++e)
    for (int lane = 0; lane < kLanes; lane += N) {
      V one;
      SB_EACH (i, N) one[i] = step_at<E>(rows[lane + i], e);
      visit(e, lane, one);
    }
}
// [step][lane] from `kLanes` rows of elements, without a change of bits.
template <class E, int kLanes>
SB_INLINE void transpose_steps(const E* const* rows, int64_t width, StepOf<E>* out) {
  typedef StepOf<E> S;
  constexpr int N = kLanes < kWidth<S> ? kLanes : kWidth<S>;
  for_each_step<E, kLanes>(rows, width, [&](int64_t e, int lane, typename Vec<S, N>::type v)
                                            __attribute__((always_inline)) { store<S, N>(out + e * kLanes + lane, v); });
}
// out[lane] = rows[lane] . lanes, in the order of the products that have their operands in lanes.
template <class E, int kLanes>
SB_INLINE void dot_of_lanes(const E* const* rows, int64_t width, const StepOf<E>* lanes, SumOf<E>* out) {
  typedef SumOf<E> T;
  typedef StepOf<E> S;
  constexpr int N = kLanes < kWidth<S> ? kLanes : kWidth<S>;
  typename Vec<T, N>::type sum[kLanes / N]{};
  for_each_step<E, kLanes>(rows, width, [&](int64_t e, int lane, typename Vec<S, N>::type v)
                                            __attribute__((always_inline)) {
                                              auto& s = sum[lane / N];
                                              s = multiply_add<T, S, N>(s, v, load<S, N>(lanes + e * kLanes + lane));
                                            });
  SB_EACH (v, kLanes / N) store<T, N>(out + v * N, sum[v]);
}
// [coordinate][lane] from `kLanes` rows, times `factor`. Rows are read up to the next multiple of a vector.
template <class T, int kLanes>
SB_INLINE void transpose_rows(const T* const* rows, int64_t width, T factor, T* out) {
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>;
  static_assert(kPad % N == 0, "rows are padded to whole squares");
  for (int64_t e = 0; e < width; e += N)
    for (int lane = 0; lane < kLanes; lane += N) {
      typename Vec<T, N>::type square[N];
      SB_EACH (i, N) square[i] = load<T, N>(rows[lane + i] + e) * factor;
      transpose_square<T, N>(square);
      T* to = out + e * kLanes + lane;
      if (e + N <= width) {
        SB_EACH (i, N) store<T, N>(to + i * kLanes, square[i]);
      } else {
        SB_EACH (i, N)
          if (e + i < width) store<T, N>(to + i * kLanes, square[i]);
      }
    }
}
// [element][lane] as sums are, from what transpose_steps left: that itself, or widened into `wide`.
template <class E, int kLanes>
SB_INLINE const SumOf<E>* widen_steps(const StepOf<E>* steps, int64_t width, SumOf<E>* wide) {
  if constexpr (kPaired<E>) {
    constexpr int N = kLanes < kWidth<float> ? kLanes : kWidth<float>;
    typedef typename Vec<float, N>::type V;
    for (int64_t e = 0; e < steps_of<E>(width); ++e)
      for (int lane = 0; lane < kLanes; lane += N) {
        const auto words = load<Word, N>(steps + e * kLanes + lane);
        store<float, N>(wide + 2 * e * kLanes + lane, (V)(words << 16));
        store<float, N>(wide + (2 * e + 1) * kLanes + lane, (V)(words & 0xffff0000u));
      }
    return wide;
  } else {
    return steps;
  }
}

// Projections of Quadratic(statistics="input") of one key/value head (docs/algorithm.md, section 2): sums over segments
// of tokens, covariances of samples, and the directions in which both vary most. What few samples decide is computed in
// float64.
#pragma once
#include "../../math/input_statistics.h"
#include "arena.h"
#include "gathered_rows.h"

namespace sb::SB_ISA {

constexpr int64_t kRowsTogether =
    64;  // tokens whose sum is one short chain, and which stay in the first level of cache

// The rows of `n` tokens from `first` that are not ignored; returns how many.
template <class T>
SB_INLINE int64_t taken_rows(const T* rows, int64_t stride, const uint8_t* ignored, int64_t first, int64_t n,
                             const T** taken) {
  int64_t count = 0;
  for (int64_t i = first; i < first + n; ++i)
    if (!(ignored && ignored[i])) taken[count++] = rows + i * stride;
  return count;
}

// sum (width) of the rows that are not ignored.
template <class T>
void sum_tokens(const T* rows, int64_t stride, const uint8_t* ignored, int64_t n, int64_t width, T* sum) {
  constexpr int N = kWidth<T>;
  for (int64_t e = 0; e < width; e += N) store<T, N>(sum + e, Vector<T, N>{});
  T ones[kRowsTogether];
  for (int64_t i = 0; i < kRowsTogether; ++i) ones[i] = T(1);
  for (int64_t first = 0; first < n; first += kRowsTogether) {
    const T* taken[kRowsTogether];
    const int64_t count =
        taken_rows(rows, stride, ignored, first, n - first < kRowsTogether ? n - first : kRowsTogether, taken);
    add_rows<T>(count, ones, PointedRows<const T>{taken}, width, sum);
  }
}

// Of the rows k that are not ignored: sum (width) of exp(a.k - top) k, top the largest a.k, and mass that of the
// weights.
template <class T>
void sum_weighted_tokens(const T* rows, int64_t stride, const uint8_t* ignored, int64_t n, int64_t width, const T* a,
                         T* sum, T* top, T* mass) {
  constexpr int N = kWidth<T>;
  for (int64_t e = 0; e < width; e += N) store<T, N>(sum + e, Vector<T, N>{});
  *top = -T(__builtin_inf()), *mass = T(0);
  for (int64_t first = 0; first < n; first += kRowsTogether) {
    const T* taken[kRowsTogether];
    alignas(64) T weight[kRowsTogether];
    const int64_t count =
        taken_rows(rows, stride, ignored, first, n - first < kRowsTogether ? n - first : kRowsTogether, taken);
    if (count == 0) continue;
    dot_rows<T>(count, PointedRows<const T>{taken}, a, width, weight);
    T most = *top;
    for (int64_t i = 0; i < count; ++i) most = weight[i] > most ? weight[i] : most;
    if (most > *top) {
      const T factor = *mass == T(0) ? T(0) : exp2s<T>((*top - most) * T(kLog2e));
      for (int64_t e = 0; e < width; e += N) store<T, N>(sum + e, load<T, N>(sum + e) * factor);
      *mass *= factor, *top = most;
    }
    for (int64_t i = 0; i < count; ++i) weight[i] = (weight[i] - *top) * T(kLog2e);
    for (int64_t i = count; i < pad_to(count, N); ++i) weight[i] = T(0);
    for (int64_t i = 0; i < count; i += N) store<T, N>(weight + i, exp2v<N>(load<T, N>(weight + i)));
    *mass += sum_short(weight, count);
    add_rows<T>(count, weight, PointedRows<const T>{taken}, width, sum);
  }
}

// covariance (width, width) of n rows, times `scale`; `mean` null: all count alike, else by exp(mean.row). Scratch:
// covariance_bytes.
template <class T>
struct CovarianceScratch {
  double *wide, *weight, *mean, *part;  // (kRowsTogether, width), (n), (width) twice
  int64_t bytes;
  SB_INLINE CovarianceScratch(int64_t n, int64_t width, void* memory) {
    Arena arena{static_cast<char*>(memory), 0};
    wide = arena.take<double>(kRowsTogether * width), weight = arena.take<double>(pad_to(n, kPad));
    mean = arena.take<double>(width), part = arena.take<double>(width);
    bytes = arena.used;
  }
};

template <class T>
int64_t sampled_covariance(const T* rows, int64_t n, int64_t width, double scale, const double* query_mean,
                           double* covariance, void* memory) {
  constexpr int N = kWidth<double>;
  const CovarianceScratch<T> s(n, width, memory);
  if (!memory) return s.bytes;
  const auto for_each_part = [&](const auto& visit) {
    for (int64_t first = 0; first < n; first += kRowsTogether) {
      const int64_t count = n - first < kRowsTogether ? n - first : kRowsTogether;
      for (int64_t i = 0; i < count * width; ++i) s.wide[i] = double(rows[first * width + i]);
      visit(first, count, DenseRows<const double>{s.wide, width});
    }
  };

  // 1. What each counts.
  if (query_mean) {
    double top = -__builtin_inf(), total = 0;
    for_each_part([&](int64_t first, int64_t count, const auto& wide) {
      dot_rows<double>(count, wide, query_mean, width, s.weight + first);
    });
    for (int64_t i = 0; i < n; ++i) top = s.weight[i] > top ? s.weight[i] : top;
    for (int64_t i = 0; i < n; ++i) s.weight[i] = (s.weight[i] - top) * kLog2e;
    for (int64_t i = n; i < pad_to(n, N); ++i) s.weight[i] = 0;
    for (int64_t i = 0; i < n; i += N) store<double, N>(s.weight + i, exp2v<N>(load<double, N>(s.weight + i)));
    for (int64_t i = 0; i < n; ++i) total += s.weight[i];
    for (int64_t i = 0; i < n; ++i) s.weight[i] /= total;
  } else {
    for (int64_t i = 0; i < n; ++i) s.weight[i] = 1 / double(n);
  }

  // 2. The mean, and squares about it.
  for (int64_t e = 0; e < width; ++e) s.mean[e] = 0;
  for_each_part([&](int64_t first, int64_t count, const auto& wide) {
    add_rows<double>(count, s.weight + first, wide, width, s.mean);
  });
  for (int64_t i = 0; i < n; ++i) s.weight[i] = scale * __builtin_sqrt(s.weight[i]);
  for (int64_t i = 0; i < width * width; i += N) store<double, N>(covariance + i, Vector<double, N>{});
  for_each_part([&](int64_t first, int64_t count, const auto& wide) {
    for (int64_t i = 0; i < count; ++i) {
      double* const row = s.wide + i * width;
      const auto weight = splat<double, N>(s.weight[first + i]);
      for (int64_t e = 0; e < width; e += N)
        store<double, N>(row + e, (load<double, N>(row + e) - load<double, N>(s.mean + e)) * weight);
    }
    for (int64_t row = 0; row < width; row += kPad)  // the upper triangle alone, kPad rows at a time
      gemm_from<double, N, true>(row, kPad, width, count, Strided<double>{s.wide + row, 1, width}, wide,
                                 DenseRows<double>{covariance + row * width, width});
  });
  for (int64_t row = kPad; row < width; ++row)
    for (int64_t column = 0; column < row / kPad * kPad; ++column)
      covariance[row * width + column] = covariance[column * width + row];
  return 0;
}

// -------------------- directions

template <class T>
struct DirectionsScratch {
  double *w, *v, *next, *root, *dots;  // (rank, width) three times, (rank, rank), (rank)
  int64_t bytes;
  SB_INLINE DirectionsScratch(int64_t rank, int64_t width, void* memory) {
    Arena arena{static_cast<char*>(memory), 0};
    w = arena.take<double>(rank * width), v = arena.take<double>(rank * width);
    next = arena.take<double>(rank * width), root = arena.take<double>(rank * rank);
    dots = arena.take<double>(pad_to(rank, kPad));
    bytes = arena.used;
  }
};

// Orthonormal rows in place of w (rank, width): each loses what it has of the rows before it, twice, since once leaves
// roundings as large as what is left.
inline void orthonormalise_rows(int64_t rank, int64_t width, double* w, double* dots) {
  constexpr int N = kWidth<double>;
  for (int64_t t = 0; t < rank; ++t) {
    double* const row = w + t * width;
    const DenseRows<const double> before{w, width};
    for (int pass = 0; pass < 2 && t > 0; ++pass) {
      dot_rows<double>(t, before, row, width, dots);
      for (int64_t i = 0; i < t; ++i) dots[i] = -dots[i];
      add_rows<double>(t, dots, before, width, row);
    }
    Vector<double, N> square{};
    for (int64_t e = 0; e < width; e += N) square += load<double, N>(row + e) * load<double, N>(row + e);
    const auto unit = splat<double, N>(1 / __builtin_sqrt(sum_lanes<double, N>(square)));
    for (int64_t e = 0; e < width; e += N) store<double, N>(row + e, load<double, N>(row + e) * unit);
  }
}

// Puts covariances over the mean of their eigenvalues and adds the floor. False where either does not vary; `mean` are
// the means of the tokens.
template <class T>
bool floor_covariance(int64_t d, int64_t width, const T* mean, double* covariance) {
  double average = 0, square = 0;
  for (int64_t e = 0; e < d; ++e) average += covariance[e * width + e], square += double(mean[e]) * double(mean[e]);
  average /= double(d), square /= double(d);
  if (average <= kNoVariance * (average + square) && average < __builtin_inf()) return false;  // NaN goes on
  const double factor = 1 / average;
  for (int64_t i = 0; i < width * width; ++i) covariance[i] *= factor;
  for (int64_t e = 0; e < d; ++e) covariance[e * width + e] += kCovarianceFloor;
  return true;
}

// Pq and Pk (rank, width), rounded to float32: W, a basis of the `rank` directions of largest Ck Cq, V = Cq W, and with
// W^T V = R R^T the rows of R^-1 W^T and R^-1 V^T. Overwrites the covariances (width, width).
template <class T>
int64_t sampled_directions(const DirectionsParams& p, const T* query_mean, const T* key_mean, double* cq, double* ck,
                           float* pq, float* pk, void* memory) {
  const int64_t rank = p.rank, d = p.head_dim, width = p.width;
  constexpr int N = kWidth<double>;
  const DirectionsScratch<T> s(rank, width, memory);
  if (!memory) return s.bytes;
  if (!floor_covariance(d, width, query_mean, cq) || !floor_covariance(d, width, key_mean, ck)) {
    for (int64_t i = 0; i < rank * width; ++i) pq[i] = pk[i] = 0;
    return 0;
  }
  for (int64_t i = 0; i < rank * width; i += N) store<double, N>(s.w + i, load<double, N>(p.start + i));
  const auto times = [&](const double* covariance, const double* from, double* to) {
    gemm<double, N, false>(rank, width, d, Strided<double>{from, width, 1}, DenseRows<const double>{covariance, width},
                           DenseRows<double>{to, width});
  };
  for (int step = 0; step < kIterations; ++step) {
    times(cq, s.w, s.v), times(ck, s.v, s.w);
    orthonormalise_rows(rank, width, s.w, s.dots);
  }
  times(cq, s.w, s.v);
  for (int64_t t = 0; t < rank; ++t) {
    dot_rows<double>(t + 1, DenseRows<const double>{s.v, width}, s.w + t * width, width, s.dots);
    double* const row = s.root + t * rank;  // of R
    for (int64_t i = 0; i <= t; ++i) {
      const double* const other = s.root + i * rank;
      double left = s.dots[i];
      for (int64_t j = 0; j < i; ++j) left -= row[j] * other[j];
      row[i] = i < t ? left / other[i] : __builtin_sqrt(left);
    }
  }
  double* const both[] = {s.w, s.v};
  for (double* const rows : both)
    for (int64_t t = 0; t < rank; ++t) {
      const double* const row = s.root + t * rank;
      double* const solved = rows + t * width;
      for (int64_t i = 0; i < t; ++i) s.dots[i] = -row[i];
      add_rows<double>(t, s.dots, DenseRows<const double>{rows, width}, width, solved);
      for (int64_t e = 0; e < width; ++e) solved[e] /= row[t];
    }
  for (int64_t i = 0; i < rank * width; ++i) pq[i] = float(s.w[i]), pk[i] = float(s.v[i]);
  return 0;
}

}  // namespace sb::SB_ISA

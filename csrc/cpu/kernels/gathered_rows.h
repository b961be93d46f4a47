// Listed rows in memory, their products with one row or a few, and sums over lists.
#pragma once
#include "gemm.h"

namespace sb::SB_ISA {

// out[i] = rows(i).one for n rows, lanes along the width, as many rows at once as there are lanes.
template <class E, class R>
SB_INLINE void dot_rows(int64_t n, const R& rows, const E* one, int64_t width, AccType<E>* out) {
  typedef AccType<E> T;
  typedef StepOf<E> S;
  constexpr int N = kWidth<T>, kElements = N * Element<E>::kPerStep;
  typedef Vector<T, N> V;
  const int64_t whole = width / kElements * kElements;
  const auto steps = [](const E* row) SB_INLINE_LAMBDA { return load<S, N>(reinterpret_cast<const S*>(row)); };
  int64_t i = 0;
  for (; i + N <= n; i += N) {
    V acc[N] = {};
    for (int64_t e = 0; e < whole; e += kElements) {
      const auto o = steps(one + e);
      SB_EACH (r, N) acc[r] = multiply_add<T, S, N>(acc[r], o, steps(rows(i + r) + e));
    }
    for (int64_t e = whole; e < width; e += N) {  // half a register of bfloat16
      const V o = load_wide<N>(one + e);
      SB_EACH (r, N) acc[r] += o * load_wide<N>(rows(i + r) + e);
    }
    fold_rows<T, N>(acc);
    store<T, N>(out + i, acc[0]);
  }
  for (; i < n; ++i) {
    V acc = {};
    for (int64_t e = 0; e < whole; e += kElements) acc = multiply_add<T, S, N>(acc, steps(one + e), steps(rows(i) + e));
    for (int64_t e = whole; e < width; e += N) acc += load_wide<N>(one + e) * load_wide<N>(rows(i) + e);
    out[i] = sum_lanes<T, N>(acc);
  }
}

// a.b of rows of `width` elements, a multiple of 8, summed in double.
template <class T>
SB_INLINE double dot_in_double(const T* a, const T* b, int64_t width) {
  double sum[8] = {};
  for (int64_t e = 0; e < width; e += 8)
    SB_EACH (i, 8) sum[i] += double(a[e + i]) * double(b[e + i]);
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// out[column] = sum_k weight[k] row_k[column], one output row, with as many accumulators as the columns allow; where
// those are few, even and odd k are separate chains.
template <class E, class R>
SB_INLINE void combine_rows(int64_t n, const AccType<E>* weight, const R& rows, int64_t columns, AccType<E>* out) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  if (columns == 4 * N) {
    Vector<T, N> even[4] = {}, odd[4] = {};
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) {
      const E *a = rows(k), *b = rows(k + 1);
      SB_EACH (v, 4) {
        even[v] += weight[k] * load_wide<N>(a + v * N);
        odd[v] += weight[k + 1] * load_wide<N>(b + v * N);
      }
    }
    if (k < n)
      SB_EACH (v, 4) even[v] += weight[k] * load_wide<N>(rows(k) + v * N);
    SB_EACH (v, 4) store<T, N>(out + v * N, even[v] + odd[v]);
    return;
  }
  const Strided<T> a{weight, 0, 1};
  const DenseRows<T> c{out, 0};
  int64_t column = 0;
  for (; column + 8 * N <= columns; column += 8 * N) micro<T, N, 1, 8, false>(0, column, n, a, rows, c);
  for (; column + 4 * N <= columns; column += 4 * N) micro<T, N, 1, 4, false>(0, column, n, a, rows, c);
  for (; column < columns; column += N) micro<T, N, 1, 1, false>(0, column, n, a, rows, c);
}

// out += sum_k weight[k] row_k.
template <class T, class R>
SB_INLINE void add_rows(int64_t n, const T* weight, const R& rows, int64_t columns, T* out) {
  constexpr int N = kWidth<T>;
  const Strided<T> a{weight, 0, 1};
  const DenseRows<T> c{out, 0};
  int64_t column = 0;
  for (; column + 4 * N <= columns; column += 4 * N) micro<T, N, 1, 4, true>(0, column, n, a, rows, c);
  for (; column < columns; column += N) micro<T, N, 1, 1, true>(0, column, n, a, rows, c);
}

// Listed keys as rows of k, v, y or their gradients.
template <class E>
SB_INLINE ListedRows<const E> listed(const StridedTensor& rows, int64_t b, int64_t head, const int32_t* key) {
  return {rows.at<const E>(b, head, 0), rows.row, key};
}
template <class T>
SB_INLINE ListedRows<T> listed_target(const StridedTensor& rows, int64_t b, int64_t head, const int32_t* key) {
  return {rows.at<T>(b, head, 0), rows.row, key};
}

// Prefetches a row: hardware prefetchers cannot follow a list. The arguments are those of __builtin_prefetch.
template <int kForWriting = 0, int kLocality = 3, class E>
SB_INLINE void fetch_row(const E* row, int64_t columns) {
  for (int64_t e = 0; e < columns; e += int64_t(64 / sizeof(E))) __builtin_prefetch(row + e, kForWriting, kLocality);
}

// n rows in steps along n, for a product over them.
template <class E, class R>
SB_INLINE auto rows_in_steps(const R& rows, [[maybe_unused]] int64_t n, [[maybe_unused]] const E* zero_row) {
  if constexpr (kPaired<E>)
    return InterleavedRows<R>{rows, n, zero_row};
  else
    return rows;
}

// C = W rows, of a few dense rows of weights and n listed rows. W is [step][lane], in rows of `stride` lanes.
template <class E, bool kAccumulate, class R, class C>
SB_INLINE void combine_listed(int64_t lanes, int64_t columns, int64_t n, const StepOf<E>* W, int64_t stride,
                              const R& rows, const E* zero_row, const C& c) {
  typedef AccType<E> T;
  gemm<T, kWidth<T>, kAccumulate>(lanes, columns, steps_of<E>(n), Strided<StepOf<E>>{W, 1, stride},
                                  rows_in_steps<E>(rows, n, zero_row), c);
}

// The same where the listed rows are scattered, kScatteredRows at a time: they stay in the first level of cache while
// their columns pass, and the next ones are prefetched if they are far.
template <class E, class R, class C>
SB_INLINE void combine_scattered(int64_t lanes, int64_t columns, int64_t n, const StepOf<E>* W, int64_t stride,
                                 const R& rows, bool far, const E* zero_row, const C& c) {
  const auto to = [&](int64_t k) { return k < n ? k : n; };
  for (int64_t k = 0; k < n || k == 0; k += kScatteredRows) {
    for (int64_t i = to(k + kScatteredRows); far && i < to(k + 2 * kScatteredRows); ++i) fetch_row(rows(i), columns);
    if (k == 0)
      combine_listed<E, false>(lanes, columns, to(kScatteredRows), W, stride, rows, zero_row, c);
    else
      combine_listed<E, true>(lanes, columns, to(k + kScatteredRows) - k, W + steps_of<E>(k) * stride, stride,
                              rows.from(k), zero_row, c);
  }
}

// First entry of key[begin, end) that is not below `bound`.
SB_INLINE int64_t lower_bound_key(const int32_t* key, int64_t begin, int64_t end, int64_t bound) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (key[middle] < bound)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// Sums of weights are taken in chains of at most this many terms (docs/algorithm.md, section 5).
constexpr int64_t kShortChain = 8;
// A sum over lanes in short chains.
template <class T>
SB_INLINE T sum_short(const T* p, int64_t n) {
  constexpr int N = kWidth<T>;
  Vector<T, N> sum{};
  int64_t i = 0;
  for (; i + N <= n; i += N) sum += load<T, N>(p + i);
  T tail = T(0);
  for (; i < n; ++i) tail += p[i];
  return tail + sum_lanes<T, N>(sum);
}

}  // namespace sb::SB_ISA

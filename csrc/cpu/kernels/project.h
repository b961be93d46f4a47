// Projections of tokens and their gradients.
#pragma once
#include "gathered_rows.h"

namespace sb::SB_ISA {

// z = W t + offset into rows (tokens, outputs_pad). The order of every output's sum is its own: a row's bits do not
// depend on its neighbours.
template <class T>
void project(const ProjectParams& p, const ProjectWeights<T>& w, const T* tokens, int64_t row_stride, T* rows) {
  constexpr int N = kWidth<T>, kHalf = N > 8 ? 8 : N;
  const int64_t whole = p.lanes / N * N;
  for (int64_t first = 0; first < p.tokens; first += kProjectRows) {
    const int64_t n = p.tokens - first < kProjectRows ? p.tokens - first : kProjectRows;
    for (int64_t i = first + kProjectRows; i < first + 2 * kProjectRows && i < p.tokens; ++i)
      fetch_row(tokens + i * row_stride, p.head_dim);
    T* to = rows + first * p.outputs_pad;
    for (int64_t o = 0; o < p.outputs_pad; o += N) {
      const auto offset = load<T, N>(w.offset + o);
      for (int64_t i = 0; i < n; ++i) store<T, N>(to + i * p.outputs_pad + o, offset);
    }
    const Strided<T> a{tokens + first * row_stride, row_stride, 1};
    const DenseRows<const T> b{w.of_lanes, p.lanes};
    const DenseRows<T> c{to, p.outputs_pad};
    gemm<T, N, true>(n, whole, p.head_dim, a, b, c);
    if (whole < p.lanes) gemm_from<T, kHalf, true>(whole, n, p.lanes, p.head_dim, a, b, c);
    const auto most = splat<T, N>(w.limits.coordinate);
    for (int64_t at = 0; at < n * p.outputs_pad; at += N) {
      const auto z = load<T, N>(to + at);
      store<T, N>(to + at, z > most ? most : z < -most ? -most : z);  // NaN stays NaN
    }
    for (int64_t o = 0; o + 1 < p.dots; ++o) {
      T dot[kProjectRows];
      dot_rows<T>(n, DenseRows<const T>{tokens + first * row_stride, row_stride}, w.rows + o * p.head_pad, p.head_pad,
                  dot);
      const int64_t column = w.columns[o];
      const T start = w.offset[column], limit = w.limits.coordinate;
      for (int64_t i = 0; i < n; ++i) {
        const T z = start + dot[i];
        to[i * p.outputs_pad + column] = z > limit ? limit : z < -limit ? -limit : z;
      }
    }
    // The log scale's error is the relative error of all the token's weights. It is rounded as in a map that is not
    // packed, where its factor comes later.
    const T* last = w.rows + (p.dots - 1) * p.head_pad;
    const int64_t column = w.columns[p.dots - 1];
    const T limit = w.limits.log;
    for (int64_t i = 0; i < n; ++i) {
      const double dot = dot_in_double(tokens + (first + i) * row_stride, last, p.head_pad);
      const T z = T(double(w.offset[column]) + dot) * w.last_factor;
      to[i * p.outputs_pad + column] = z > limit ? limit : z < -limit ? -limit : z;
    }
  }
}

// grad (tokens, outputs), weight (outputs, head_pad); d_weight (outputs, head_pad) and d_bias (outputs) receive the sum
// over these tokens, the bias in double: it has one number for all of them. Rows whose gradient is zero are left out of
// it: padded rows may hold NaN.
template <class T>
void project_backward(const ProjectParams& p, const T* grad, const T* tokens, int64_t row_stride, const T* weight,
                      const T* zero_row, T* d_tokens, int64_t d_row_stride, T* d_weight, double* d_bias) {
  gemm<T, kWidth<T>, false>(p.tokens, p.head_pad, p.outputs, Strided<T>{grad, p.outputs, 1},
                            DenseRows<const T>{weight, p.head_pad}, DenseRows<T>{d_tokens, d_row_stride});
  for (int64_t i = 0; i < p.outputs * p.head_pad; ++i) d_weight[i] = T(0);
  for (int64_t o = 0; o < p.outputs; ++o) d_bias[o] = 0;
  for (int64_t first = 0; first < p.tokens; first += kProjectBackwardRows) {
    const int64_t n = p.tokens - first < kProjectBackwardRows ? p.tokens - first : kProjectBackwardRows;
    const T* rows[kProjectBackwardRows];
    for (int64_t i = 0; i < n; ++i) {
      const T* g = grad + (first + i) * p.outputs;
      bool any = false;
      for (int64_t o = 0; o < p.outputs; ++o) any |= g[o] != T(0), d_bias[o] += g[o];
      rows[i] = any ? tokens + (first + i) * row_stride : zero_row;
    }
    gemm<T, kWidth<T>, true>(p.outputs, p.head_pad, n, Strided<T>{grad + first * p.outputs, 1, p.outputs},
                             PointedRows<const T>{rows}, DenseRows<T>{d_weight, p.head_pad});
  }
}

}  // namespace sb::SB_ISA

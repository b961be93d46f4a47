// Matrix products C[row][lane] (+)= sum_k A(row, k) B(k)[lane] with one micro-kernel (docs/algorithm.md, section 7).
// Every product is one chain of multiply-adds in ascending k, whatever the tiling: results do not depend on how rows
// are grouped. An accumulating product is added to C at its end: a sum over many tiles is a chain of short chains,
// which rounds far less than one long chain.
#pragma once
#include "element_types.h"

namespace sb::SB_ISA {

template <class T>
struct Strided {  // A(row, k) = p[row * row_stride + k * k_stride]
  const T* p;
  int64_t row_stride, k_stride;
  SB_INLINE T operator()(int64_t row, int64_t k) const { return p[row * row_stride + k * k_stride]; }
};
template <class T>
struct PointedRows {  // B(k) or C(row): rows anywhere
  T* const* p;
  SB_INLINE T* operator()(int64_t i) const { return p[i]; }
};
template <class T>
struct DenseRows {  // B(k) or C(row): rows of one matrix
  T* p;
  int64_t stride;
  SB_INLINE T* operator()(int64_t i) const { return p + i * stride; }
};
template <class T>
struct ListedRows {  // B(k) or C(row): the rows of one matrix that a list names
  T* p;
  int64_t stride;
  const int32_t* list;
  SB_INLINE T* operator()(int64_t i) const { return p + list[i] * stride; }
  SB_INLINE ListedRows from(int64_t first) const { return {p, stride, list + first}; }
};
template <class R>
struct DownRows {  // A(row, k) = element `row` of R(k)
  R rows;
  SB_INLINE auto operator()(int64_t row, int64_t k) const { return rows(k)[row]; }
};
template <class E, class R>
struct AcrossSteps {  // A(row, k) = step k of R(row), a row of E
  R rows;
  SB_INLINE StepOf<E> operator()(int64_t row, int64_t k) const { return step_at<E>(rows(row), k); }
};
template <class R>
struct InterleavedRows {  // B(k) = Words of rows 2k and 2k + 1 of n rows of bfloat16, zeros past the last
  R rows;
  int64_t n;
  const Bfloat16* zero_row;
};

// Lanes column .. column + N - 1 of B(k), in steps S; rows of bfloat16 in float32.
template <class S, int N, class B>
SB_INLINE Vector<S, N> lanes_of(const B& b, int64_t k, int64_t column) {
  return load_wide<N>(b(k) + column);
}
template <class S, int N, class R>
SB_INLINE Vector<S, N> lanes_of(const InterleavedRows<R>& b, int64_t k, int64_t column) {
  const Bfloat16* high = 2 * k + 1 < b.n ? b.rows(2 * k + 1) : b.zero_row;
  return interleave<N>(load_halves<N>(b.rows(2 * k) + column), load_halves<N>(high + column));
}

template <class T, int N, int MR, int NV, bool kAccumulate, class A, class B, class C>
SB_INLINE void micro(int64_t row, int64_t column, int64_t depth, const A& a, const B& b, const C& c) {
  typedef decltype(a(row, 0)) S;  // T or Word
  Vector<T, N> acc[MR][NV];
  SB_EACH (i, MR)
    SB_EACH (v, NV) acc[i][v] = Vector<T, N>{};
  SB_PRAGMA(GCC unroll 4)  // fewer mispredicted loop ends
  for (int64_t k = 0; k < depth; ++k) {
    Vector<S, N> rhs[NV];
    SB_EACH (v, NV) rhs[v] = lanes_of<S, N>(b, k, column + v * N);
    SB_EACH (i, MR) {
      const auto lhs = splat<S, N>(a(row + i, k));
      SB_EACH (v, NV) acc[i][v] = multiply_add<T, S, N>(acc[i][v], lhs, rhs[v]);
    }
  }
  SB_EACH (i, MR)
    SB_EACH (v, NV) {
      T* to = c(row + i) + column + v * N;
      if constexpr (kAccumulate) acc[i][v] += load<T, N>(to);
      store<T, N>(to, acc[i][v]);
    }
}

// Tiles of MR rows, then smaller ones for the remainder. A few rows of one or two vectors take as long as a tile that
// hides the latency of their sums: the last tile then overlaps rows already computed, with the same results.
template <class T, int N, int MR, int NV, bool kAccumulate, class A, class B, class C>
SB_INLINE void gemm_rows(int64_t row, int64_t rows, int64_t column, int64_t depth, const A& a, const B& b, const C& c) {
  for (; row + MR <= rows; row += MR) micro<T, N, MR, NV, kAccumulate>(row, column, depth, a, b, c);
  if (row == rows) return;
  if constexpr (!kAccumulate && NV <= 2 && MR > 4) {
    if (rows - row <= 4 && rows >= 4) return micro<T, N, 4, NV, false>(rows - 4, column, depth, a, b, c);
    if (rows >= MR) return micro<T, N, MR, NV, false>(rows - MR, column, depth, a, b, c);
  }
  if constexpr (MR > 1) gemm_rows<T, N, (MR > 4 ? 4 : MR / 2), NV, kAccumulate>(row, rows, column, depth, a, b, c);
}

// Columns [column, columns), both multiples of N. Twelve accumulators, or sixteen of AVX-512's 32 registers, hide the
// latency of a multiply-add and leave registers for the operands. Tiles of sixteen rows and one vector read every line
// of B once, so a row outside the first level of cache is waited for once.
template <class T, int N, bool kAccumulate, class A, class B, class C>
SB_INLINE void gemm_from(int64_t column, int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b,
                         const C& c) {
  if constexpr (SB_VECTOR_BYTES == 64)
    if (rows % 16 == 0 && columns > N)
      for (; column < columns; column += N) gemm_rows<T, N, 16, 1, kAccumulate>(0, rows, column, depth, a, b, c);
  if constexpr (SB_VECTOR_BYTES == 64)
    for (; column + 4 * N <= columns; column += 4 * N)
      gemm_rows<T, N, 4, 4, kAccumulate>(0, rows, column, depth, a, b, c);
  for (; column + 2 * N <= columns; column += 2 * N)
    gemm_rows<T, N, 6, 2, kAccumulate>(0, rows, column, depth, a, b, c);
  for (; column < columns; column += N) gemm_rows<T, N, 8, 1, kAccumulate>(0, rows, column, depth, a, b, c);
}
template <class T, int N, bool kAccumulate, class A, class B, class C>
SB_INLINE void gemm(int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b, const C& c) {
  gemm_from<T, N, kAccumulate>(0, rows, columns, depth, a, b, c);
}

}  // namespace sb::SB_ISA

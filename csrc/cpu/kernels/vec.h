// Vectors on GCC/Clang extensions: one source for every instruction set.
#pragma once
#include "isa.h"

namespace sb::SB_ISA {

// Vec<T, N>: N lanes of T, an unaligned view of it, and integers of the same width (the type of a comparison).
template <class T, int N>
struct Vec;
#define SB_DEFINE_VEC(T, INT, N)                                                                    \
  template <>                                                                                       \
  struct Vec<T, N> {                                                                                \
    typedef T type __attribute__((vector_size(N * sizeof(T))));                                     \
    typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias)); \
    typedef INT ints __attribute__((vector_size(N * sizeof(T))));                                   \
  };
SB_DEFINE_VEC(float, int32_t, 4)
SB_DEFINE_VEC(float, int32_t, 8)
SB_DEFINE_VEC(float, int32_t, 16)
SB_DEFINE_VEC(uint32_t, int32_t, 4)
SB_DEFINE_VEC(uint32_t, int32_t, 8)
SB_DEFINE_VEC(uint32_t, int32_t, 16)
SB_DEFINE_VEC(double, int64_t, 1)
SB_DEFINE_VEC(double, int64_t, 2)
SB_DEFINE_VEC(double, int64_t, 4)
SB_DEFINE_VEC(double, int64_t, 8)
#undef SB_DEFINE_VEC

// Compile-time conditions as arguments of a generic lambda.
template <bool kValue>
struct Constant {
  constexpr operator bool() const { return kValue; }
};
typedef Constant<true> Yes;
typedef Constant<false> No;

// Lanes of the widest register.
template <class T>
inline constexpr int kWidth = SB_VECTOR_BYTES / int(sizeof(T));
// Lanes of the vectors that hold kLanes values.
template <class T, int kLanes>
inline constexpr int kLaneWidth = kLanes < kWidth<T> ? kLanes : kWidth<T>;

template <class T, int N>
SB_INLINE typename Vec<T, N>::type load(const T* p) {
  return *reinterpret_cast<const typename Vec<T, N>::unaligned*>(p);
}
template <class T, int N>
SB_INLINE void store(T* p, typename Vec<T, N>::type v) {
  *reinterpret_cast<typename Vec<T, N>::unaligned*>(p) = v;
}
template <class T, int N>
SB_INLINE typename Vec<T, N>::type splat(T s) {
  return s - typename Vec<T, N>::type{};
}

template <class V>
SB_INLINE V max_lanes(V a, V b) {
  return a > b ? a : b;
}

// 2^x, relative error 1e-7 (float) and 1e-16 (double). Results below the smallest normal number are exactly zero, and
// those above the largest power of two are that power; the exponents of weights are never positive, so neither changes
// a weight that matters. x = n + f with n an integer and |f| <= 1/2: adding 1.5 * 2^mantissa rounds x to n and leaves n
// in the low bits, ready to be added to the exponent.
template <int N>
SB_INLINE typename Vec<float, N>::type exp2_fraction(typename Vec<float, N>::type f) {
  // Minimax in relative error on [-1/2, 1/2], degree 6: 2e-9 before rounding.
  typename Vec<float, N>::type p = f * 1.5345810860642288e-4f + 1.33999312098676e-3f;
  p = p * f + 9.61848896135406e-3f;
  p = p * f + 5.550328776994022e-2f;
  p = p * f + 2.40226468905949e-1f;
  p = p * f + 6.931472057372501e-1f;
  return p * f + 1.0f;
}
template <int N>
SB_INLINE typename Vec<float, N>::type exp2v(typename Vec<float, N>::type x) {
  typedef typename Vec<float, N>::type V;
  typedef typename Vec<float, N>::ints I;
#if SB_VECTOR_BYTES == 64
  if constexpr (N >= 8) {  // rounding and scaling by a power of two are single instructions
    V n, y;
    if constexpr (N == 16)
      n = __builtin_ia32_rndscaleps_mask(x, 0, x, 0xffff, 4);
    else
      n = __builtin_ia32_rndscaleps_256_mask(x, 0, x, 0xff);
    const V fraction = exp2_fraction<N>(x - n);
    if constexpr (N == 16)
      y = __builtin_ia32_scalefps512_mask(fraction, n, x, 0xffff, 4);
    else
      y = __builtin_ia32_scalefps256_mask(fraction, n, x, 0xff);
    return x < -126.0f ? V{} : y;
  }
#endif
  const V tiny = splat<float, N>(-126.0f), huge = splat<float, N>(127.0f);
  V clamped = x < tiny ? tiny : x;
  clamped = clamped > huge ? huge : clamped;
  const V shifted = clamped + 12582912.0f;
  const V f = clamped - (shifted - 12582912.0f);
  const V y = (V)((I)exp2_fraction<N>(f) + ((I)shifted << 23));
  return x < tiny ? V{} : y;
}
template <int N>
SB_INLINE typename Vec<double, N>::type exp2v(typename Vec<double, N>::type x) {
  typedef typename Vec<double, N>::type V;
  typedef typename Vec<double, N>::ints I;
  const V tiny = splat<double, N>(-1022.0), huge = splat<double, N>(1023.0);
  V clamped = x < tiny ? tiny : x;
  clamped = clamped > huge ? huge : clamped;
  const V shifted = clamped + 6755399441055744.0;
  const V f = (clamped - (shifted - 6755399441055744.0)) * kLn2;
  // Taylor series of exp on |f| <= ln(2)/2: the first term left out is 4e-18.
  V p = f * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * f + 1.0 / 39916800.0;
  p = p * f + 1.0 / 3628800.0;
  p = p * f + 1.0 / 362880.0;
  p = p * f + 1.0 / 40320.0;
  p = p * f + 1.0 / 5040.0;
  p = p * f + 1.0 / 720.0;
  p = p * f + 1.0 / 120.0;
  p = p * f + 1.0 / 24.0;
  p = p * f + 1.0 / 6.0;
  p = p * f + 0.5;
  p = p * f + 1.0;
  p = p * f + 1.0;
  const V y = (V)((I)p + ((I)shifted << 52));
  return x < tiny ? V{} : y;
}

// log2 of positive normal numbers to about 1e-12; infinity and NaN pass through.
template <int N>
SB_INLINE typename Vec<double, N>::type log2v(typename Vec<double, N>::type x) {
  typedef typename Vec<double, N>::type V;
  typedef typename Vec<double, N>::ints I;
  // x = m 2^n with m in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) are subtracted before the exponent is read.
  const I n = ((I)x - int64_t(0x3fe6a09e667f3bcd)) >> 52;
  const V m = (V)((I)x - (n << 52)), s = (m - 1.0) / (m + 1.0), s2 = s * s;
  V p = s2 * (1.0 / 13) + 1.0 / 11;
  p = p * s2 + 1.0 / 9;
  p = p * s2 + 1.0 / 7;
  p = p * s2 + 1.0 / 5;
  p = p * s2 + 1.0 / 3;
  p = p * s2 + 1.0;
  const V y = __builtin_convertvector(n, V) + p * s * (2 * kLog2e);
  return x < __builtin_inf() ? y : x;
}

// a / divisor from inverse = 1 / divisor, rounded like a division except for rare last bits: a fused multiply-add forms
// the remainder of the product, which corrects it. Without fused multiply-adds it is a division. Infinity passes
// through.
template <class T, int N>
SB_INLINE typename Vec<T, N>::type divide(typename Vec<T, N>::type a, T divisor, [[maybe_unused]] T inverse) {
#if SB_VECTOR_BYTES == 16
  return a / divisor;
#else
  const typename Vec<T, N>::type product = a * inverse, rest = a - product * divisor;
  return rest - rest == T(0) ? product + rest * inverse : product;
#endif
}
template <class T>
SB_INLINE T exp2s(T x) {
  constexpr int N = 16 / int(sizeof(T));
  return exp2v<N>(splat<T, N>(x))[0];
}

// 0, 1, ... kCount - 1 as template arguments, for shuffles.
template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct CountIndices : CountIndices<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct CountIndices<0, kIndex...> {
  typedef Indices<kIndex...> type;
};

// Swaps the odd blocks of kStep lanes of a with the even blocks of b.
template <class T, int N, int kStep, int... i>
SB_INLINE void exchange_blocks(typename Vec<T, N>::type& a, typename Vec<T, N>::type& b, Indices<i...>) {
  const auto first = a, second = b;
#if defined(__clang__)
  a = __builtin_shufflevector(first, second, (i & kStep ? N + i - kStep : i)...);
  b = __builtin_shufflevector(first, second, (i & kStep ? N + i : i + kStep)...);
#else
  typedef typename Vec<T, N>::ints I;
  a = __builtin_shuffle(first, second, I{(i & kStep ? N + i - kStep : i)...});
  b = __builtin_shuffle(first, second, I{(i & kStep ? N + i : i + kStep)...});
#endif
}

// The sum of the lanes, always in the same order: halves folded onto each other.
template <class T, int N, int kStep, int... i>
SB_INLINE typename Vec<T, N>::type rotate_lanes(typename Vec<T, N>::type v, Indices<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((i + kStep) % N)...);
#else
  typedef typename Vec<T, N>::ints I;
  return __builtin_shuffle(v, I{(i + kStep) % N...});
#endif
}
template <class T, int N, int kStep = N / 2>
SB_INLINE T sum_lanes(typename Vec<T, N>::type v) {
  if constexpr (kStep == 0)
    return v[0];
  else
    return sum_lanes<T, N, kStep / 2>(v + rotate_lanes<T, N, kStep>(v, typename CountIndices<N>::type{}));
}

// The sums of the lanes of N vectors in rows[0], each in the order of sum_lanes: two vectors folded into the halves of
// one, then the halves' halves.
template <class T, int N, int kStep, int... i>
SB_INLINE typename Vec<T, N>::type fold_pair(typename Vec<T, N>::type a, typename Vec<T, N>::type b, Indices<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (i & kStep ? N + i : i)...) +
         __builtin_shufflevector(a, b, (i & kStep ? N + i - kStep : i + kStep)...);
#else
  typedef typename Vec<T, N>::ints I;
  return __builtin_shuffle(a, b, I{(i & kStep ? N + i : i)...}) +
         __builtin_shuffle(a, b, I{(i & kStep ? N + i - kStep : i + kStep)...});
#endif
}
template <class T, int N, int kStep = N / 2>
SB_INLINE void fold_rows(typename Vec<T, N>::type* rows) {
  if constexpr (kStep > 0) {
    SB_EACH (r, kStep) rows[r] = fold_pair<T, N, kStep>(rows[r], rows[r + kStep], typename CountIndices<N>::type{});
    fold_rows<T, N, kStep / 2>(rows);
  }
}

// Transposes a square of N vectors in registers: log2(N) rounds exchange blocks of 1, 2, 4, ... lanes.
template <class T, int N, int kStep = 1>
SB_INLINE void transpose_square(typename Vec<T, N>::type* rows) {
  if constexpr (kStep < N) {
    SB_EACH (i, N)
      if (!(i & kStep)) exchange_blocks<T, N, kStep>(rows[i], rows[i + kStep], typename CountIndices<N>::type{});
    transpose_square<T, N, kStep * 2>(rows);
  }
}

}  // namespace sb::SB_ISA

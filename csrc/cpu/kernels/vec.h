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
template <class T, int N>
using Vector = typename Vec<T, N>::type;
template <class T, int N>
using Ints = typename Vec<T, N>::ints;

// Lanes of a and b by number, those of b after those of a. GCC knows the first form from version 12 on.
#if defined(__clang__)
#define SB_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SB_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
#endif

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
SB_INLINE Vector<T, N> load(const T* p) {
  return *reinterpret_cast<const typename Vec<T, N>::unaligned*>(p);
}
template <class T, int N>
SB_INLINE void store(T* p, Vector<T, N> v) {
  *reinterpret_cast<typename Vec<T, N>::unaligned*>(p) = v;
}
template <class T, int N>
SB_INLINE Vector<T, N> splat(T s) {
  return s - Vector<T, N>{};
}

// The lowest finite number: the maximum of nothing.
template <class T>
inline constexpr T kLowest = sizeof(T) == sizeof(double) ? T(-0x1.fffffffffffffp1023) : T(-0x1.fffffep127f);

template <class V>
SB_INLINE V max_lanes(V a, V b) {
  return a > b ? a : b;
}

// 2^x, relative error 1e-7 (float) and 1e-16 (double). Results below the smallest normal number are exactly zero, and
// those above the largest power of two are that power; the exponents of weights are never positive, so neither changes
// a weight that matters. x = n + f with n an integer and |f| <= 1/2: adding 1.5 * 2^mantissa rounds x to n and leaves n
// in the low bits, ready to be added to the exponent. NaN stays NaN, though its bits may add up to a number.
template <int N>
SB_INLINE Vector<float, N> exp2_fraction(Vector<float, N> f) {
  // Minimax in relative error on [-1/2, 1/2], degree 6: 2e-9 before rounding.
  Vector<float, N> p = f * 1.5345810860642288e-4f + 1.33999312098676e-3f;
  p = p * f + 9.61848896135406e-3f;
  p = p * f + 5.550328776994022e-2f;
  p = p * f + 2.40226468905949e-1f;
  p = p * f + 6.931472057372501e-1f;
  return p * f + 1.0f;
}
template <int N>
SB_INLINE Vector<float, N> exp2v(Vector<float, N> x) {
  typedef Vector<float, N> V;
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
  const V y = (V)((Ints<float, N>)exp2_fraction<N>(f) + ((Ints<float, N>)shifted << 23));
  return x < tiny ? V{} : x == x ? y : x;
}
template <int N>
SB_INLINE Vector<double, N> exp2v(Vector<double, N> x) {
  typedef Vector<double, N> V;
  const V tiny = splat<double, N>(-1022.0), huge = splat<double, N>(1023.0);
  V clamped = x < tiny ? tiny : x;
  clamped = clamped > huge ? huge : clamped;
  const V shifted = clamped + 6755399441055744.0;
  const V f = (clamped - (shifted - 6755399441055744.0)) * kLn2;
  // Taylor series of exp on |f| <= ln(2)/2: the first term left out is 4e-18.
  constexpr double kFactorial[] = {479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1};
  V p = f * (1.0 / 6227020800.0) + 1.0 / kFactorial[0];
  SB_EACH (i, 12) p = p * f + 1.0 / kFactorial[i + 1];
  const V y = (V)((Ints<double, N>)p + ((Ints<double, N>)shifted << 52));
  return x < tiny ? V{} : x == x ? y : x;
}

// log2 of positive normal numbers to about 1e-12; infinity and NaN pass through.
template <int N>
SB_INLINE Vector<double, N> log2v(Vector<double, N> x) {
  typedef Vector<double, N> V;
  typedef Ints<double, N> I;
  // x = m 2^n with m in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) are subtracted before the exponent is read.
  const I n = ((I)x - int64_t(0x3fe6a09e667f3bcd)) >> 52;
  const V m = (V)((I)x - (n << 52)), s = (m - 1.0) / (m + 1.0), s2 = s * s;
  V p = s2 * (1.0 / 13) + 1.0 / 11;
  SB_EACH (i, 5) p = p * s2 + 1.0 / (9 - 2 * i);
  const V y = __builtin_convertvector(n, V) + p * s * (2 * kLog2e);
  return x < __builtin_inf() ? y : x;
}

// log2 of each lane in double, by the library where the kernel itself computes in double.
template <class T, int kLanes>
SB_INLINE void log2_lanes(const T* x, T* y) {
  if constexpr (sizeof(T) == sizeof(double)) {
    for (int lane = 0; lane < kLanes; ++lane) y[lane] = __builtin_log2(x[lane]);
  } else {
    constexpr int N = kLaneWidth<double, kLanes>;
    for (int lane = 0; lane < kLanes; lane += N) {
      Vector<double, N> v;
      SB_EACH (i, N) v[i] = double(x[lane + i]);
      v = log2v<N>(v);
      SB_EACH (i, N) y[lane + i] = T(v[i]);
    }
  }
}

// a / divisor from inverse = 1 / divisor, rounded like a division except for rare last bits: a fused multiply-add forms
// the remainder of the product, which corrects it. Without fused multiply-adds it is a division. Infinity passes
// through.
template <class T, int N>
SB_INLINE Vector<T, N> divide(Vector<T, N> a, T divisor, [[maybe_unused]] T inverse) {
#if SB_VECTOR_BYTES == 16
  return a / divisor;
#else
  const Vector<T, N> product = a * inverse, rest = a - product * divisor;
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
SB_INLINE void exchange_blocks(Vector<T, N>& a, Vector<T, N>& b, Indices<i...>) {
  const auto first = a, second = b;
  a = SB_SHUFFLE(first, second, (i & kStep ? N + i - kStep : i)...);
  b = SB_SHUFFLE(first, second, (i & kStep ? N + i : i + kStep)...);
}

// The sum of the lanes, always in the same order: halves folded onto each other.
template <class T, int N, int kStep, int... i>
SB_INLINE Vector<T, N> rotate_lanes(Vector<T, N> v, Indices<i...>) {
  return SB_SHUFFLE(v, v, ((i + kStep) % N)...);
}
template <class T, int N, int kStep = N / 2>
SB_INLINE T sum_lanes(Vector<T, N> v) {
  if constexpr (kStep == 0)
    return v[0];
  else
    return sum_lanes<T, N, kStep / 2>(v + rotate_lanes<T, N, kStep>(v, typename CountIndices<N>::type{}));
}

// The sums of the lanes of N vectors in rows[0], each in the order of sum_lanes: two vectors folded into the halves of
// one, then the halves' halves.
template <class T, int N, int kStep, int... i>
SB_INLINE Vector<T, N> fold_pair(Vector<T, N> a, Vector<T, N> b, Indices<i...>) {
  return SB_SHUFFLE(a, b, (i & kStep ? N + i : i)...) + SB_SHUFFLE(a, b, (i & kStep ? N + i - kStep : i + kStep)...);
}
template <class T, int N, int kStep = N / 2>
SB_INLINE void fold_rows(Vector<T, N>* rows) {
  if constexpr (kStep > 0) {
    SB_EACH (r, kStep) rows[r] = fold_pair<T, N, kStep>(rows[r], rows[r + kStep], typename CountIndices<N>::type{});
    fold_rows<T, N, kStep / 2>(rows);
  }
}

// Transposes a square of N vectors in registers: log2(N) rounds exchange blocks of 1, 2, 4, ... lanes.
template <class T, int N, int kStep = 1>
SB_INLINE void transpose_square(Vector<T, N>* rows) {
  if constexpr (kStep < N) {
    SB_EACH (i, N)
      if (!(i & kStep)) exchange_blocks<T, N, kStep>(rows[i], rows[i + kStep], typename CountIndices<N>::type{});
    transpose_square<T, N, kStep * 2>(rows);
  }
}

}  // namespace sb::SB_ISA

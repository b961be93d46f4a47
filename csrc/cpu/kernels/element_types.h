// Element types E of the rows of q, k, v, o and dO, and how products contract them in steps: float and double one
// element at a time, bfloat16 two at a time, a Word, by dot instructions (docs/algorithm.md, section 7).
#pragma once
#if defined(SB_BFLOAT16)
#include <immintrin.h>
#endif

#include "convert.h"

namespace sb::SB_ISA {

typedef uint32_t Word;
typedef Word UnalignedWord __attribute__((aligned(2), may_alias));

template <class E>
struct Element {
  typedef E Step;
  static constexpr int kPerStep = 1;
};
template <>
struct Element<Bfloat16> {
  typedef Word Step;
  static constexpr int kPerStep = 2;
};
template <class E>
using StepOf = typename Element<E>::Step;
// Whether a step is two elements.
template <class E>
inline constexpr bool kPaired = Element<E>::kPerStep == 2;

// Steps of n elements; an odd number is zero-padded.
template <class E>
SB_INLINE int64_t steps_of(int64_t n) {
  return (n + Element<E>::kPerStep - 1) / Element<E>::kPerStep;
}

template <class E>
SB_INLINE StepOf<E> step_at(const E* row, int64_t k) {
  if constexpr (kPaired<E>)
    return reinterpret_cast<const UnalignedWord*>(row)[k];
  else
    return row[k];
}

// acc + a.b of one step.
template <class S>
inline constexpr bool kIsWord = false;
template <>
inline constexpr bool kIsWord<Word> = true;
template <class T, class S, int N>
SB_INLINE Vector<T, N> multiply_add(Vector<T, N> acc, Vector<S, N> a, Vector<S, N> b) {
#if defined(SB_BFLOAT16)
  if constexpr (kIsWord<S>) {
    if constexpr (N == 16)
      return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
    else
      return _mm256_dpbf16_ps(acc, (__m256bh)a, (__m256bh)b);
  } else
#endif
    return acc + a * b;
}

// N float32 rounded to bfloat16, to nearest with ties to even.
template <int N>
SB_INLINE Halves<N> narrow_halves(Vector<float, N> v) {
#if defined(SB_BFLOAT16)
  if constexpr (N == 16)
    return (Halves<N>)_mm512_cvtneps_pbh(v);
  else
    return (Halves<N>)_mm256_cvtneps_pbh(v);
#else
  return Bfloat16Lanes::narrow<N>(v);
#endif
}

// Word i holds element i of `low` and of `high`.
template <int N>
SB_INLINE Vector<Word, N> interleave(Halves<N> low, Halves<N> high) {
  return extend_halves<N>(low) | (extend_halves<N>(high) << 16);
}

// interleave for two vectors of float32, which are rounded.
template <int N, int... i>
SB_INLINE Halves<2 * N> alternate_halves(Halves<2 * N> v, Indices<i...>) {
  return SB_SHUFFLE(v, v, (i / 2 + i % 2 * N)...);
}
template <int N>
SB_INLINE Vector<Word, N> interleave_narrow(Vector<float, N> low, Vector<float, N> high) {
#if defined(SB_BFLOAT16)
  if constexpr (N == 16)
    return (Vector<Word, N>)alternate_halves<N>((Halves<2 * N>)_mm512_cvtne2ps_pbh(high, low),
                                                typename CountIndices<2 * N>::type{});
  else
    return (Vector<Word, N>)alternate_halves<N>((Halves<2 * N>)_mm256_cvtne2ps_pbh(high, low),
                                                typename CountIndices<2 * N>::type{});
#else
  return interleave<N>(Bfloat16Lanes::narrow<N>(low), Bfloat16Lanes::narrow<N>(high));
#endif
}

// N elements of a row in the accumulation type, and back.
template <int N, class E>
SB_INLINE Vector<AccType<E>, N> load_wide(const E* p) {
  if constexpr (kPaired<E>)
    return Bfloat16Lanes::widen<N>(load_halves<N>(p));
  else
    return load<E, N>(p);
}
template <class E, int N>
SB_INLINE void store_narrow(E* p, Vector<AccType<E>, N> v) {
  if constexpr (kPaired<E>)
    store_halves<N>(p, narrow_halves<N>(v));
  else
    store<E, N>(p, v);
}

template <class E>
SB_INLINE AccType<E> widen_one(E x) {
  if constexpr (kPaired<E>) {
    const union {
      Word bits;
      float value;
    } wide = {Word(x.bits) << 16};
    return wide.value;
  } else {
    return x;
  }
}
// A row in the accumulation type: the row itself, or a copy in `wide`.
template <class E>
SB_INLINE const AccType<E>* widen_row_of(const E* row, int64_t width, AccType<E>* wide) {
  if constexpr (kPaired<E>) {
    constexpr int N = kWidth<float>;
    for (int64_t e = 0; e < width; e += N) store<float, N>(wide + e, load_wide<N>(row + e));
    return wide;
  } else {
    return row;
  }
}
// [n][kLanes] weights in steps along n: the weights themselves, or Words of two rows in `steps`.
template <class E, int kLanes>
SB_INLINE const StepOf<E>* weight_steps(int64_t n, const AccType<E>* weight, StepOf<E>* steps) {
  if constexpr (kPaired<E>) {
    constexpr int N = kLaneWidth<float, kLanes>;
    for (int64_t i = 0; i < n; i += 2)
      for (int v = 0; v < kLanes; v += N) {
        const auto low = load<float, N>(weight + i * kLanes + v);
        Vector<float, N> high{};
        if (i + 1 < n) high = load<float, N>(weight + (i + 1) * kLanes + v);
        store<Word, N>(steps + i / 2 * kLanes + v, interleave_narrow<N>(low, high));
      }
    return steps;
  } else {
    return weight;
  }
}

}  // namespace sb::SB_ISA

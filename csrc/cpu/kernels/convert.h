// Rows of bfloat16 and float16 to float32 and back, rounded to nearest with ties to even; NaN stays NaN. Where the
// instruction set has no float16 conversion the launcher converts element by element.
#pragma once
#include "vec.h"

namespace sb::SB_ISA {

typedef uint16_t HalfBits;

template <int N>
struct HalfVec {
  typedef HalfBits type __attribute__((vector_size(N * sizeof(HalfBits))));
  typedef HalfBits unaligned __attribute__((vector_size(N * sizeof(HalfBits)), aligned(sizeof(HalfBits)), may_alias));
  typedef uint32_t bits __attribute__((vector_size(N * sizeof(uint32_t))));
};
template <int N>
using Halves = typename HalfVec<N>::type;
template <int N>
SB_INLINE Halves<N> load_halves(const void* p) {
  return *static_cast<const typename HalfVec<N>::unaligned*>(p);
}
template <int N>
SB_INLINE void store_halves(void* p, Halves<N> v) {
  *static_cast<typename HalfVec<N>::unaligned*>(p) = v;
}

// 16-bit lanes, zero-extended to 32 bits.
template <int N>
SB_INLINE typename HalfVec<N>::bits extend_halves(Halves<N> v) {
#if SB_VECTOR_BYTES == 64 && !defined(__clang__)
  typedef short Shorts __attribute__((vector_size(32)));  // one instruction; GCC 12 emits five for the conversion below
  if constexpr (N == 16)
    return (typename HalfVec<N>::bits)__builtin_ia32_pmovzxwd512_mask((Shorts)v, (Ints<float, N>){}, 0xffff);
#endif
  return __builtin_convertvector(v, typename HalfVec<N>::bits);
}

struct Bfloat16Lanes {
  template <int N>
  static SB_INLINE Vector<float, N> widen(Halves<N> v) {
    return (Vector<float, N>)(extend_halves<N>(v) << 16);
  }
  template <int N>
  static SB_INLINE Halves<N> narrow(Vector<float, N> v) {
    typedef typename HalfVec<N>::bits U;
    const U u = (U)v, rounded = u + 0x7fffu + ((u >> 16) & 1u), nan = U{} + 0x7fc00000u;
    const U bits = v == v ? rounded : nan;
    return __builtin_convertvector(bits >> 16, Halves<N>);
  }
};

#if SB_VECTOR_BYTES >= 32
struct Float16Lanes {
  typedef short Shorts __attribute__((vector_size(SB_VECTOR_BYTES / 2)));
  template <int N>
  static SB_INLINE Vector<float, N> widen(Halves<N> v) {
#if SB_VECTOR_BYTES == 64
    return __builtin_ia32_vcvtph2ps512_mask((Shorts)v, Vector<float, N>{}, 0xffff, 4);
#else
    return __builtin_ia32_vcvtph2ps256((Shorts)v);
#endif
  }
  template <int N>
  static SB_INLINE Halves<N> narrow(Vector<float, N> v) {
#if SB_VECTOR_BYTES == 64
    return (Halves<N>)__builtin_ia32_vcvtps2ph512_mask(v, 0, Shorts{}, 0xffff);
#else
    return (Halves<N>)__builtin_ia32_vcvtps2ph256(v, 0);
#endif
  }
};
#endif

// n elements: whole vectors, then the remainder in a zero-filled one.
template <class Lanes>
void widen_row(const void* source, int64_t n, float* to) {
  const HalfBits* from = static_cast<const HalfBits*>(source);
  constexpr int N = kWidth<float>;
  int64_t i = 0;
  for (; i + N <= n; i += N) store<float, N>(to + i, Lanes::template widen<N>(load_halves<N>(from + i)));
  if (i == n) return;
  Halves<N> rest{};
  for (int64_t k = i; k < n; ++k) rest[k - i] = from[k];
  const auto wide = Lanes::template widen<N>(rest);
  for (int64_t k = i; k < n; ++k) to[k] = wide[k - i];
}
template <class Lanes>
void narrow_row(const float* from, int64_t n, void* target) {
  HalfBits* to = static_cast<HalfBits*>(target);
  constexpr int N = kWidth<float>;
  int64_t i = 0;
  for (; i + N <= n; i += N) store_halves<N>(to + i, Lanes::template narrow<N>(load<float, N>(from + i)));
  if (i == n) return;
  Vector<float, N> rest{};
  for (int64_t k = i; k < n; ++k) rest[k - i] = from[k];
  const auto narrow = Lanes::template narrow<N>(rest);
  for (int64_t k = i; k < n; ++k) to[k] = narrow[k - i];
}

constexpr HalfConversion convert_bfloat16() { return {&widen_row<Bfloat16Lanes>, &narrow_row<Bfloat16Lanes>}; }
constexpr HalfConversion convert_float16() {
#if SB_VECTOR_BYTES >= 32
  return {&widen_row<Float16Lanes>, &narrow_row<Float16Lanes>};
#else
  return {};
#endif
}

}  // namespace sb::SB_ISA

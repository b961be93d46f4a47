// What kernels know of the device: threads, barriers, shuffles, shared and global memory, element types. A CUDA
// compiler sees the machine's own; with SB_EMULATOR a C++ compiler sees csrc/emulator, which runs the same kernels on
// the host and checks every access. Kernels reach memory through load, store and Shared alone.
#pragma once
#include "params.h"

#if defined(SB_EMULATOR)
#include <cmath>
#include <cstring>

#include "../emulator/emulator.h"
#define SB_DEVICE inline
#define SB_KERNEL inline void
#define SB_NO_UNROLL
#define SB_PLACE , emulator::Place place = emulator::Place::here()
#define SB_ONLY_PLACE emulator::Place place = emulator::Place::here()
#else
#include <cuda_runtime.h>
#define SB_DEVICE __device__ __forceinline__
#define SB_KERNEL __global__ void
#define SB_NO_UNROLL _Pragma("unroll 1")
#define SB_PLACE
#define SB_ONLY_PLACE
#endif

namespace sb::cuda {

inline constexpr int kWarp = 32;

// -------------------- threads, barriers, shuffles

#if defined(SB_EMULATOR)
SB_DEVICE int thread_index() { return emulator::thread_index(); }
SB_DEVICE int block_threads() { return emulator::block_threads(); }
SB_DEVICE int64_t block_index() { return emulator::block_index(); }
SB_DEVICE int64_t grid_blocks() { return emulator::grid_blocks(); }
SB_DEVICE void sync_block(SB_ONLY_PLACE) { emulator::sync_block(place); }
// Also orders the warp's accesses to shared memory; a shuffle does not.
SB_DEVICE void sync_warp(SB_ONLY_PLACE) { emulator::sync_warp(place); }
template <class V>
SB_DEVICE V shuffle_xor(V value, int mask SB_PLACE) {
  return emulator::exchanged(value, mask, place);
}
template <class V>
SB_DEVICE V shuffle_from(V value, int lane SB_PLACE) {
  return emulator::exchanged_from(value, lane, place);
}
// Of lane i of this lane's eight.
template <class V>
SB_DEVICE V shuffle_in_eight(V value, int i SB_PLACE) {
  return emulator::exchanged_from(value, emulator::thread_index() % kWarp / 8 * 8 + i, place);
}
// Bit l: whether lane l says yes.
SB_DEVICE uint32_t ballot(bool yes SB_PLACE) { return emulator::ballot(yes, place); }
SB_DEVICE int bits_set(uint32_t bits) { return __builtin_popcount(bits); }
#else
SB_DEVICE int thread_index() { return int(threadIdx.x); }
SB_DEVICE int block_threads() { return int(blockDim.x); }
SB_DEVICE int64_t block_index() { return blockIdx.x; }
SB_DEVICE int64_t grid_blocks() { return gridDim.x; }
SB_DEVICE void sync_block() { __syncthreads(); }
SB_DEVICE void sync_warp() { __syncwarp(); }
template <class V>
SB_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class V>
SB_DEVICE V shuffle_from(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class V>
SB_DEVICE V shuffle_in_eight(V value, int i) {
  return __shfl_sync(0xffffffffu, value, i, 8);
}
SB_DEVICE uint32_t ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }
SB_DEVICE int bits_set(uint32_t bits) { return __popc(bits); }
#endif

SB_DEVICE int lane_index() { return thread_index() % kWarp; }
SB_DEVICE int warp_index() { return thread_index() / kWarp; }

SB_DEVICE float larger(float a, float b) {
#if defined(SB_EMULATOR)
  return std::fmax(a, b);  // as the device's, takes the number where one of them is NaN
#else
  return fmaxf(a, b);
#endif
}
SB_DEVICE double larger(double a, double b) {
#if defined(SB_EMULATOR)
  return std::fmax(a, b);
#else
  return fmax(a, b);
#endif
}

#if defined(SB_EMULATOR)
#define SB_PASS_PLACE , place
#else
#define SB_PASS_PLACE
#endif

// Over the lanes of a warp; every lane gets the same bits.
template <class V>
SB_DEVICE V warp_sum(V value SB_PLACE) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask SB_PASS_PLACE);
  return value;
}
template <class V>
SB_DEVICE V warp_max(V value SB_PLACE) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask SB_PASS_PLACE));
  return value;
}
// Over four neighbouring lanes, which have the parts of a row in a product on tensor cores.
SB_DEVICE float quad_sum(float value SB_PLACE) {
  value += shuffle_xor(value, 1 SB_PASS_PLACE);
  return value + shuffle_xor(value, 2 SB_PASS_PLACE);
}
SB_DEVICE float quad_max(float value SB_PLACE) {
  value = larger(value, shuffle_xor(value, 1 SB_PASS_PLACE));
  return larger(value, shuffle_xor(value, 2 SB_PASS_PLACE));
}

// warp_sum of integers, by one instruction.
SB_DEVICE int32_t warp_total(int32_t value SB_PLACE) {
#if defined(SB_EMULATOR)
  return warp_sum(value, place);
#else
  return __reduce_add_sync(0xffffffffu, value);
#endif
}

// Calls body(i) for the tasks of this block. Grids are as large as the device allows, tasks may be more.
template <class Body>
SB_DEVICE void for_each_task(int64_t tasks, const Body& body) {
  for (int64_t i = block_index(); i < tasks; i += grid_blocks()) body(i);
}
// The same for the tasks of this thread, where every thread takes one.
template <class Body>
SB_DEVICE void for_each_element(int64_t elements, const Body& body) {
  const int64_t step = grid_blocks() * block_threads();
  for (int64_t i = block_index() * block_threads() + thread_index(); i < elements; i += step) body(i);
}

// -------------------- memory

template <class V>
SB_DEVICE V load(const V* p SB_PLACE) {
#if defined(SB_EMULATOR)
  emulator::global_access(p, sizeof(V), alignof(V), nullptr, place);
#endif
  return *p;
}
template <class V>
SB_DEVICE void store(V* p, V value SB_PLACE) {
#if defined(SB_EMULATOR)
  emulator::global_access(p, sizeof(V), alignof(V), &value, place);
#endif
  *p = value;
}

// The same pointer, of which the compiler does not know where it came from: what is added to it in a loop then is one
// instruction, and not parts of the address anew.
template <class V>
SB_DEVICE V* as_it_is(V* p) {
#if !defined(SB_EMULATOR)
  asm("" : "+l"(p));
#endif
  return p;
}

// An array in the block's shared memory, from `offset` bytes on.
#if defined(SB_EMULATOR)
template <class V>
struct Shared {
  int64_t offset;
  V get(int64_t i SB_PLACE) const {
    V value;
    std::memcpy(&value, emulator::shared_access(offset + i * int64_t(sizeof(V)), sizeof(V), false, place), sizeof(V));
    return value;
  }
  void set(int64_t i, V value SB_PLACE) const {
    std::memcpy(emulator::shared_access(offset + i * int64_t(sizeof(V)), sizeof(V), true, place), &value, sizeof(V));
  }
};
template <class V>
Shared<V> shared_array(int64_t offset) {
  return {offset};
}
#else
extern __shared__ __align__(128) unsigned char sb_shared_memory[];
template <class V>
struct Shared {
  V* data;
  SB_DEVICE V get(int64_t i) const { return data[i]; }
  SB_DEVICE void set(int64_t i, V value) const { data[i] = value; }
};
template <class V>
SB_DEVICE Shared<V> shared_array(int64_t offset) {
  return {reinterpret_cast<V*>(sb_shared_memory + offset)};
}
#endif

// -------------------- element types

template <class To, class From>
SB_DEVICE To same_bits(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  memcpy(&to, &from, sizeof(To));
  return to;
}

SB_DEVICE float widened(float v) { return v; }
SB_DEVICE double widened(double v) { return v; }
SB_DEVICE float widened(Bfloat16 v) { return same_bits<float>(uint32_t(v.bits) << 16); }
SB_DEVICE float widened(Half v) {
#if defined(SB_EMULATOR)
  return float(same_bits<_Float16>(v.bits));
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#endif
}

template <class E>
struct Narrow;
template <>
struct Narrow<float> {
  static SB_DEVICE float of(double v) { return float(v); }
};
template <>
struct Narrow<double> {
  static SB_DEVICE double of(double v) { return v; }
};
template <>
struct Narrow<Bfloat16> {  // to nearest, halves to even
  static SB_DEVICE Bfloat16 of(float v) {
    const uint32_t bits = same_bits<uint32_t>(v);
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};  // NaN
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <>
struct Narrow<Half> {
  static SB_DEVICE Half of(float v) {
#if defined(SB_EMULATOR)
    return {same_bits<uint16_t>(_Float16(v))};
#else
    Half narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
    return narrow;
#endif
  }
};

// -------------------- sums

// term(0) + .. + term(n - 1) in four chains: short chains round little. All products of rows are added up this way, so
// that two of the same rows are the same.
template <class Term>
SB_DEVICE auto sum_of_terms(int64_t n, const Term& term) {
  constexpr int kChains = 4;
  decltype(term(0)) sum[kChains]{};
  int64_t i = 0;
  SB_NO_UNROLL  // four terms are enough at once, and kernels have little room
      for (; i + kChains <= n; i += kChains) for (int c = 0; c < kChains; ++c) sum[c] += term(i + c);
  for (; i < n; ++i) sum[0] += term(i);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// a / b of a number from 0 to below 2^31 - 1 and a positive one. A division of 64 bits is a call, around which all that
// is alive takes as many registers again.
SB_DEVICE int32_t quotient(int64_t a, int64_t b) {
  return int32_t(uint32_t(a) / uint32_t(b < INT32_MAX ? b : INT32_MAX));
}

// -------------------- functions of one number

// Results below the smallest normal number are zero.
SB_DEVICE float exp2_of(float v) {
#if defined(SB_EMULATOR)
  const float power = std::exp2(v);
  return power < 0x1p-126f ? 0.0f : power;
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
#endif
}
SB_DEVICE double exp2_of(double v) {
#if defined(SB_EMULATOR)
  return std::exp2(v);
#else
  return exp2(v);
#endif
}
SB_DEVICE float log2_of(float v) {
#if defined(SB_EMULATOR)
  return std::log2(v);
#else
  return log2f(v);
#endif
}
// By the device's own instruction, to 2^-22; minus infinity where exp2_of has 0.
SB_DEVICE float quick_log2_of(float v) {
#if defined(SB_EMULATOR)
  return v < 0x1p-126f ? -float(INFINITY) : std::log2(v);
#else
  float log;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(v));
  return log;
#endif
}
SB_DEVICE double log2_of(double v) {
#if defined(SB_EMULATOR)
  return std::log2(v);
#else
  return log2(v);
#endif
}

SB_DEVICE double square_root(double v) {
#if defined(SB_EMULATOR)
  return std::sqrt(v);
#else
  return sqrt(v);
#endif
}

}  // namespace sb::cuda

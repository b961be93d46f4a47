// Tensor cores and what feeds them: 16 x 16 by 16 x 8 products of 16-bit numbers with sums in float32, matrices of
// shared memory in the layout that they take, and copies from global to shared memory that run beside the threads.
// Beside device.h the only access to the machine.
//
// Lane l of a warp holds, with g = l / 4 and t = l % 4: of the left operand the pairs at (row, column) (g, 2t),
// (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); of the right one those at (rows 2t and 2t + 1, column g) and (rows 2t + 8
// and 2t + 9, column g); of the sums those at (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
//
// Of float32 a product has a depth of 8, and takes the upper 19 bits of a number (TF32). Of the left operand a lane
// holds the numbers at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), of the right one those at (t, g), (t + 4, g).
#pragma once
#include "device.h"

#if defined(SB_EMULATOR)
#include "../emulator/matrix.h"
#define SB_UNROLL
#define SB_UNROLL_BY_2
#define SB_UNROLL_COPIES
#define SB_UNROLL_STEPS
#define SB_THREADS_AT_MOST(threads)
#define SB_THREADS_AND_BLOCKS(threads, blocks)
#else
// Of the loop behind it, whose arrays then lie in registers.
#define SB_UNROLL _Pragma("unroll")
#define SB_UNROLL_BY_2 _Pragma("unroll 2")
#define SB_UNROLL_COPIES _Pragma("unroll kCopiesAtOnce")
#define SB_UNROLL_STEPS _Pragma("unroll kStepsAtOnce")
// With a least number of blocks, or the compiler guesses one, and spills registers for it.
#define SB_THREADS_AT_MOST(threads) __launch_bounds__(threads, 1)
// For kernels whose registers suffice for more blocks on a multiprocessor.
#define SB_THREADS_AND_BLOCKS(threads, blocks) __launch_bounds__(threads, blocks)
#endif

namespace sb::cuda {

// Bytes of one asynchronous copy, and of a row of a matrix in shared memory.
inline constexpr int64_t kCopyBytes = 16;

struct Tf32 {};

#if defined(SB_EMULATOR)
// Where copies go that are named by their address; addresses differ as offsets do.
SB_DEVICE uint32_t shared_address(int64_t offset) { return uint32_t(offset); }
// Copies kCopyBytes to shared memory from byte `offset` on, or zeros; they are there once a wait is over, for other
// threads behind a barrier.
SB_DEVICE void copy_async(int64_t offset, const void* from, bool is_there SB_PLACE) {
  emulator::copy_async(offset, from, is_there, kCopyBytes, place);
}
// The same of 4 bytes.
SB_DEVICE void copy_word_async(int64_t offset, const void* from, bool is_there SB_PLACE) {
  emulator::copy_async(offset, from, is_there, 4, place);
}
// That of kCopyBytes to an address, if `is_wanted`; zeros if no bit of `is_there` is set.
SB_DEVICE void copy_async_if(bool is_wanted, uint32_t address, const void* from, uint32_t is_there SB_PLACE) {
  if (is_wanted) emulator::copy_async(address, from, is_there != 0, kCopyBytes, place);
}
// Closes a group of copies.
SB_DEVICE void commit_copies() { emulator::commit_copies(); }
// Waits until at most kOpen of this thread's groups are under way.
template <int kOpen>
SB_DEVICE void wait_copies(SB_ONLY_PLACE) {
  emulator::wait_copies(kOpen, place);
}
// Four 8 x 8 matrices; lane l names the row l % 8 of matrix l / 8 by its offset. Each arrives as the right operand of a
// product takes it, or transposed.
SB_DEVICE void load_matrices(int64_t offset, uint32_t (&to)[4] SB_PLACE) {
  emulator::load_matrices(offset, to, false, place);
}
SB_DEVICE void load_transposed(int64_t offset, uint32_t (&to)[4] SB_PLACE) {
  emulator::load_matrices(offset, to, true, place);
}
// sum += left right.
SB_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1,
                            Bfloat16 SB_PLACE) {
  emulator::multiply_add(sum, left, right_0, right_1, true, place);
}
SB_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1,
                            Half SB_PLACE) {
  emulator::multiply_add(sum, left, right_0, right_1, false, place);
}
SB_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1,
                            Tf32 SB_PLACE) {
  emulator::multiply_add_tf32(sum, left, right_0, right_1, place);
}
template <class E>
SB_DEVICE uint32_t packed(float low, float high, E) {
  return uint32_t(Narrow<E>::of(high).bits) << 16 | Narrow<E>::of(low).bits;
}
#else
SB_DEVICE uint32_t shared_address(int64_t offset) {
  return uint32_t(__cvta_generic_to_shared(sb_shared_memory)) + uint32_t(offset);
}
SB_DEVICE void copy_async(int64_t offset, const void* from, bool is_there) {
  asm volatile(
      "{\n"
      ".reg .pred %%is_ignored;\n"
      "setp.eq.u32 %%is_ignored, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, %%is_ignored;\n"
      "}" ::"r"(shared_address(offset)),
      "l"(__cvta_generic_to_global(from)), "r"(uint32_t(is_there))
      : "memory");
}
SB_DEVICE void copy_word_async(int64_t offset, const void* from, bool is_there) {
  asm volatile(
      "{\n"
      ".reg .pred %%is_ignored;\n"
      "setp.eq.u32 %%is_ignored, %2, 0;\n"
      "cp.async.ca.shared.global [%0], [%1], 4, %%is_ignored;\n"
      "}" ::"r"(shared_address(offset)),
      "l"(__cvta_generic_to_global(from)), "r"(uint32_t(is_there))
      : "memory");
}
SB_DEVICE void copy_async_if(bool is_wanted, uint32_t address, const void* from, uint32_t is_there) {
  asm volatile(
      "{\n"
      ".reg .pred %%is_wanted, %%is_ignored;\n"
      "setp.ne.u32 %%is_wanted, %3, 0;\n"
      "setp.eq.u32 %%is_ignored, %2, 0;\n"
      "@%%is_wanted cp.async.cg.shared.global [%0], [%1], 16, %%is_ignored;\n"
      "}" ::"r"(address),
      "l"(__cvta_generic_to_global(from)), "r"(is_there), "r"(uint32_t(is_wanted))
      : "memory");
}
SB_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kOpen>
SB_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}
SB_DEVICE void load_matrices(int64_t offset, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(offset))
               : "memory");
}
SB_DEVICE void load_transposed(int64_t offset, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(offset))
               : "memory");
}
SB_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1, Bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}
SB_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1, Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}
SB_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1, Tf32) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}
// Two numbers rounded to 16 bits, the first in the lower half.
SB_DEVICE uint32_t packed(float low, float high, Bfloat16) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
SB_DEVICE uint32_t packed(float low, float high, Half) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
#endif

// The two numbers of a pair.
template <class E>
SB_DEVICE float low_of(uint32_t pair, E) {
  return widened(E{uint16_t(pair & 0xffff)});
}
template <class E>
SB_DEVICE float high_of(uint32_t pair, E) {
  return widened(E{uint16_t(pair >> 16)});
}

// Pairs whose sum is (low, high) to kParts times the digits of E.
template <int kParts, class E>
SB_DEVICE void split(float low, float high, uint32_t (&parts)[kParts], E e) {
  SB_UNROLL
  for (int i = 0; i < kParts; ++i) {
    parts[i] = packed(low, high, e);
    low -= low_of(parts[i], e), high -= high_of(parts[i], e);
  }
}

// This lane's words of the right operand whose entry at (row, column) is entry(row, column), of rows from `row` and
// columns from `column` on: in two parts of bfloat16, whose sum is as exact as float32.
template <class Entry>
SB_DEVICE FourWords right_words(int64_t row, int64_t column, const Entry& entry) {
  row += lane_index() % 4 * 2, column += lane_index() / 4;
  FourWords words;
  SB_UNROLL
  for (int half = 0; half < 2; ++half) {
    uint32_t parts[2];
    split(entry(row + 8 * half, column), entry(row + 8 * half + 1, column), parts, Bfloat16{});
    words.at[half] = parts[0], words.at[2 + half] = parts[1];
  }
  return words;
}

// Two parts of a float32 for products of TF32: the first is rounded, halves away from zero, and what the device reads
// of both is the number to 2^-23. Not by cvt.rna, which takes four instructions to leave what is infinite as it is:
// here its second part is no number.
SB_DEVICE void split(float v, uint32_t& high, uint32_t& low) {
  constexpr uint32_t kLost = 13;
  high = (same_bits<uint32_t>(v) + (1u << (kLost - 1))) & ~((1u << kLost) - 1);
  low = same_bits<uint32_t>(v - same_bits<float>(high));
}

// The power of two that brings `most`, the largest of some numbers, near the largest float16: of the numbers times it,
// two parts hold what a float32 holds of the largest. `back`: its inverse.
SB_DEVICE float scale_to_half(float most, float& back) {
  constexpr uint32_t kTop = 14, kBias = 127;  // to below 2^(kTop + 1)
  uint32_t exponent = same_bits<uint32_t>(most) >> 23;
  if (exponent <= kTop) exponent = kTop + 1;
  back = same_bits<float>((exponent - kTop) << 23);
  return same_bits<float>((2 * kBias + kTop - exponent) << 23);
}

}  // namespace sb::cuda

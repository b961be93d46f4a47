// What tiles of 16 query slots or of 16 keys share: matrices of 16-bit numbers in shared memory, and products with
// operands that right_operand has laid out.
#pragma once
#include "key_list.cuh"
#include "low_rank.cuh"
#include "matrix.h"

namespace sb::cuda {

inline constexpr int kStage = 16;  // keys of a stage

// Byte of the chunk of 16 bytes `chunk` in row `row` of a matrix in shared memory. Eight rows of one chunk lie in eight
// different groups of banks.
template <int kRowBytes>
SB_HD int swizzled(int row, int chunk) {
  static_assert(kRowBytes % 128 == 0 || kRowBytes == 64);
  if (kRowBytes == 64) return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// The chunk `chunks` further, where the number of that at `byte` has none of its bits, of a matrix that begins at a
// multiple of 128 bytes and has rows of as many.
SB_HD int further_chunk(int byte, int chunks) { return (byte ^ chunks % 8 << 4) + chunks / 8 * 128; }

// The least whole number above the exponent to base 2 of a positive number; very low for 0.
SB_DEVICE float exponent_above(float v) { return float(int32_t(same_bits<uint32_t>(v) >> 23) - 126); }

// Powers of two that keep numbers inside of float16.
struct Scale {
  // Puts numbers up to `largest` just below 2^12.
  SB_DEVICE static float of(float largest) {
    const auto exponent = int32_t(same_bits<uint32_t>(largest) >> 23);
    return same_bits<float>(uint32_t(265 - exponent < 252 ? 265 - exponent : 252) << 23);
  }
  SB_DEVICE static float inverse(float scale) { return same_bits<float>((254u << 23) - same_bits<uint32_t>(scale)); }
};

// Columns [16 step, 16 step + 16) of a matrix of 16 rows in shared memory as a left operand.
template <int kRowBytes>
SB_DEVICE void load_left(int64_t from, int step, uint32_t (&to)[4]) {
  load_matrices(from + swizzled<kRowBytes>(lane_index() % 16, 2 * step + lane_index() / 16), to);
}

// sum[n] += the 16 rows at `from` times columns [8 n, 8 n + 8) of a right operand in two parts, for as many of its
// `columns` as there are: this lane's words of rows [16 step, 16 step + 16) are right(step, n). Tokens are exact in one
// part of bfloat16, or in two if they are float16. kStepsAtOnce: of SB_UNROLL_STEPS.
template <class E, int D, int kStepsAtOnce, int kCount, class Right>
SB_DEVICE void add_product_of_tokens(int64_t from, int64_t steps, int64_t columns, const Right& right,
                                     float (&sum)[kCount][4]) {
  constexpr bool kIsHalf = std::is_same_v<E, Half>;
  SB_UNROLL_STEPS
  for (int k = 0; k < D / 16; ++k) {
    if (k >= steps) continue;
    uint32_t tokens[4], high[4], low[4];
    load_left<2 * D>(from, k, tokens);
    SB_UNROLL
    for (int i = 0; i < 4; ++i) {
      high[i] = tokens[i];
      if (!kIsHalf) continue;
      uint32_t parts[2];
      split(low_of(tokens[i], E{}), high_of(tokens[i], E{}), parts, Bfloat16{});
      high[i] = parts[0], low[i] = parts[1];
    }
    SB_UNROLL
    for (int n = 0; n < kCount; ++n) {
      if (n >= columns) continue;
      const FourWords words = right(k, n);
      if (kIsHalf) multiply_add(sum[n], low, words.at[0], words.at[1], Bfloat16{});
      multiply_add(sum[n], high, words.at[2], words.at[3], Bfloat16{});
      multiply_add(sum[n], high, words.at[0], words.at[1], Bfloat16{});
    }
  }
}
// The same from column 8 first on, of an operand that right_operand laid out.
template <class E, int D, int kCount>
SB_DEVICE void add_product_of_tokens(int64_t from, int64_t steps, const FourWords* operand, int64_t columns,
                                     int64_t first, float (&sum)[kCount][4]) {
  add_product_of_tokens<E, D, D / 16>(
      from, steps, columns - first,
      [&](int k, int n) { return load(operand + ((k * columns + first) + n) * kWarp + lane_index()); }, sum);
}

// sum[n] += `scale` times columns [16 step, 16 step + 16) of 16 rows of `width` numbers, times columns [8 n, 8 n + 8)
// of that step of an operand, of which there are `columns`: this lane's words are right(n).
template <int kCount, class Right>
SB_DEVICE void add_product_of_numbers(const Shared<float>& rows, int64_t width, int64_t step, float scale,
                                      int64_t columns, const Right& right, float (&sum)[kCount][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  uint32_t high[4], low[4];
  SB_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t at = (g + i % 2 * 8) * width + step * 16 + 2 * t + i / 2 * 8;
    uint32_t parts[2];
    split(rows.get(at) * scale, rows.get(at + 1) * scale, parts, Bfloat16{});
    high[i] = parts[0], low[i] = parts[1];
  }
  SB_UNROLL
  for (int n = 0; n < kCount; ++n) {
    if (n >= columns) continue;
    const FourWords words = right(n);
    multiply_add(sum[n], low, words.at[0], words.at[1], Bfloat16{});
    multiply_add(sum[n], high, words.at[2], words.at[3], Bfloat16{});
    multiply_add(sum[n], high, words.at[0], words.at[1], Bfloat16{});
  }
}
template <int kCount>
SB_DEVICE void add_product_of_numbers(const Shared<float>& rows, int64_t width, int64_t step, float scale,
                                      const FourWords* operand, int64_t columns, float (&sum)[kCount][4]) {
  const FourWords* row = operand + step * columns * kWarp + lane_index();
  add_product_of_numbers(rows, width, step, scale, columns, [&](int n) { return load(row + n * kWarp); }, sum);
}

}  // namespace sb::cuda

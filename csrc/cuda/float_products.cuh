// Products of float32 on tensor cores that are as exact as float32: both sides are two parts of TF32 (matrix.h), and a
// product is the sum of three, high high + high low + low high.
//
// The depth of a product has no order, so long as both sides agree on it: a lane takes four neighbouring columns of two
// rows, 16 bytes, for two products, and rows 2t and 2t + 1 of what stands by rows, so that sums of products are a left
// operand as they lie. Lane l = 4 g + t sums the columns [32 i + 8 t, 32 i + 8 t + 8) of rows g and g + 8: its sum of
// chunk 4 i + j belongs to columns 32 i + 4 (2 t) + j and 32 i + 4 (2 t + 1) + j.
#pragma once
#include "matrix.h"

namespace sb::cuda {

// A left operand of 16 rows and a depth of 8.
struct LeftParts {
  uint32_t high[4], low[4];
  // Of slots t and t + 4 in rows g and g + 8.
  SB_DEVICE LeftParts(float first_0, float first_1, float second_0, float second_1) {
    split(first_0, high[0], low[0]), split(first_1, high[1], low[1]);
    split(second_0, high[2], low[2]), split(second_1, high[3], low[3]);
  }
};
// sum += left right, the small products into `small`.
SB_DEVICE void add_product(float (&sum)[4], float (&small)[4], const LeftParts& left, float right_0, float right_1) {
  uint32_t high[2], low[2];
  split(right_0, high[0], low[0]), split(right_1, high[1], low[1]);
  multiply_add(small, left.low, high[0], high[1], Tf32{});
  multiply_add(small, left.high, low[0], low[1], Tf32{});
  multiply_add(sum, left.high, high[0], high[1], Tf32{});
}

// Of sums [c][i] and [c][2 + i].
SB_DEVICE int column_of_float_sum(int c, int i) { return c / 4 * 32 + 4 * (lane_index() % 4 * 2 + i) + c % 4; }

SB_DEVICE void load_four_numbers(int offset, float (&to)[4]) {
  const FourWords words = shared_array<FourWords>(offset).get(0);
  SB_UNROLL
  for (int i = 0; i < 4; ++i) to[i] = same_bits<float>(words.at[i]);
}
// Columns of row g + 8 r, of as many as `width`, which is a multiple of 8.
template <int kChunks>
SB_DEVICE void store_float_sums(const float (&sum)[kChunks][4], int r, float* to, int64_t width) {
  SB_UNROLL
  for (int c = 0; c < kChunks; c += 4) SB_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int column = column_of_float_sum(c, i);
    if (column >= width) continue;
    FourWords words;
    SB_UNROLL
    for (int j = 0; j < 4; ++j) words.at[j] = same_bits<uint32_t>(sum[c + j][2 * r + i]);
    store(reinterpret_cast<FourWords*>(to + column), words);
  }
}

}  // namespace sb::cuda

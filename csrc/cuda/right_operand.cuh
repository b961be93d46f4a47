// The right operand of a product from a matrix of every head, in two parts whose sum is as exact as float32.
#pragma once
#include "matrix.h"

namespace sb::cuda {

SB_KERNEL right_operand(OperandParams p) {
  const int64_t size = p.row_steps * p.column_chunks * kWarp;
  for_each_element(p.batch * p.heads * size, [&](int64_t at) {
    const int64_t owner = at / size, step = at / (p.column_chunks * kWarp) % p.row_steps,
                  column = at / kWarp % p.column_chunks * 8 + at % kWarp / 4;
    const float* data = p.data + owner / p.heads * p.of_batch + owner % p.heads * p.given_heads / p.heads * p.of_head;
    const auto entry = [&](int64_t row) {
      return row < p.rows && column < p.columns ? load(data + row * p.of_row + column * p.of_column) : 0.0f;
    };
    FourWords words;
    SB_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = step * 16 + at % 4 * 2 + 8 * half;
      uint32_t parts[2];
      split(entry(row), entry(row + 1), parts, Bfloat16{});
      words.at[half] = parts[0], words.at[2 + half] = parts[1];
    }
    store(p.operand + at, words);
  });
}

}  // namespace sb::cuda

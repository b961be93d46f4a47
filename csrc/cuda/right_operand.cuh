// The right operand of a product from a matrix of every head, in two parts whose sum is as exact as float32.
#pragma once
#include "matrix.h"

namespace sb::cuda {

SB_KERNEL right_operand(OperandParams p) {
  const int64_t size = p.row_steps * p.column_chunks * kWarp;
  for_each_element(p.batch * p.heads * size, [&](int64_t at) {
    const int64_t owner = at / size, step = at / (p.column_chunks * kWarp) % p.row_steps,
                  chunk = at / kWarp % p.column_chunks;
    const float* data = p.data + owner / p.heads * p.of_batch + owner % p.heads * p.given_heads / p.heads * p.of_head;
    const auto entry = [&](int64_t row, int64_t column) {
      return row < p.rows && column < p.columns ? load(data + row * p.of_row + column * p.of_column) : 0.0f;
    };
    store(p.operand + at, right_words(16 * step, 8 * chunk, entry));
  });
}

}  // namespace sb::cuda

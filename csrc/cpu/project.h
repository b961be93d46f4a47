// What the backward pass of attention does with the projections that made its maps.
#pragma once
#include "operands.h"

namespace sb::cpu {

// d_tokens += d_map weight: d_tokens are padded rows of T for `tokens` (B, H, N, d), d_map (B, H, N, outputs) is
// contiguous and of T, weight (1 or B, heads, outputs, d) float32 or float64.
template <class T>
void add_through_map(const Tensor& tokens, const Tensor& d_map, const Tensor& weight, const Rows& d_tokens);

}  // namespace sb::cpu

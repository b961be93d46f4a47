// Coordinates of queries, as the kernels of keys on tensor cores read them.
#pragma once
#include "low_rank.cuh"
#include "matrix.h"

namespace sb::cuda {

// Half of coordinate a of a query, then 1, then zeros.
SB_DEVICE float left_coordinate(const ForwardParams& p, const MapRow<float, float>& x, int64_t a) {
  return a < p.rank ? 0.5f * x(a) : a == p.rank ? 1.0f : 0.0f;
}

// As rows of 16 in two parts.
SB_KERNEL tile_queries(BackwardTileKeysParams p) {
  for_each_element(p.batch * p.q_heads * p.q_tokens, [&](int64_t at) {
    const int64_t row = at / p.q_tokens;
    const MapRow<float, float> x(p.x_map, row / p.q_heads, row % p.q_heads, at % p.q_tokens);
    auto* to = reinterpret_cast<uint32_t*>(p.query_coordinates + at * 32);
    for (int64_t a = 0; a < 16; a += 2) {
      uint32_t parts[2];
      split(left_coordinate(p, x, a), left_coordinate(p, x, a + 1), parts, Bfloat16{});
      store(to + a / 2, parts[0]), store(to + 8 + a / 2, parts[1]);
    }
  });
}

// The same for float32 tokens, whose products split float32 rows.
SB_KERNEL tile_query_rows(BackwardTileKeysParams p) {
  for_each_element(p.batch * p.q_heads * p.q_tokens, [&](int64_t at) {
    const int64_t row = at / p.q_tokens;
    const MapRow<float, float> x(p.x_map, row / p.q_heads, row % p.q_heads, at % p.q_tokens);
    for (int64_t a = 0; a < 16; ++a) store(p.query_rows + at * 16 + a, left_coordinate(p, x, a));
  });
}

}  // namespace sb::cuda

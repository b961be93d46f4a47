// Operands of the forward pass on tensor cores (attention_tile.cuh): states, what listed keys take back from them, and
// representatives, in parts of 16 bits whose sum is as exact as float32.
#pragma once
#include "low_rank.cuh"
#include "matrix.h"

namespace sb::cuda {

inline constexpr int kPartsOfRepresentative = 3;

// The state by rows of 16 features and columns of 8 values, as the right operand of a product, in two parts; and hz. Of
// every slot where prefixes are stored, else of the last.
SB_KERNEL tile_state(TileParams p) {
  const int64_t steps = p.features_padded / 16, columns = p.value_pad + 1, size = steps * p.value_chunks * kWarp;
  for_each_element(p.batch * p.kv_heads * p.operand_slots() * size, [&](int64_t at) {
    const int64_t operand = at / size, step = at / (p.value_chunks * kWarp) % steps,
                  chunk = at / kWarp % p.value_chunks;
    const int g = int(at % kWarp / 4), t = int(at % 4);
    const int64_t slot = p.has_prefixes() ? operand : operand * p.state_slots + p.state_slots - 1;
    const float* state = static_cast<const float*>(p.kv_state) + slot * p.slot_size;
    const auto entry = [&](int64_t f, int64_t column) {
      return f < p.features ? load(state + f * columns + column) : 0.0f;
    };
    FourWords words;
    SB_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t f = step * 16 + 2 * t + 8 * half, column = chunk * 8 + g;
      uint32_t parts[2];
      split(entry(f, column), entry(f + 1, column), parts, Bfloat16{});
      words.at[half] = parts[0], words.at[2 + half] = parts[1];
      if (chunk == 0 && g == 0) SB_UNROLL
      for (int i = 0; i < 2; ++i) store(p.state_sums + operand * p.features_padded + f + i, entry(f + i, p.value_pad));
    }
    store(p.state_operand + at, words);
  });
}

// What a listed key takes back: its log scale, with clusters over that of its own, and of the quadratic kernel its
// coordinates, then 1, as rows of 16 in two parts.
template <LowRank kKind>
SB_KERNEL tile_keys(TileParams p) {
  for_each_element(p.batch * p.kv_heads * p.k_tokens, [&](int64_t at) {
    const int64_t head = at / p.k_tokens, j = at % p.k_tokens;
    if (kKind == LowRank::kCentroid) {
      const float largest = load(static_cast<const float*>(p.cluster_log) + head * p.rank + cluster_of(p, head, j));
      store(p.key_log + at, log_mass_of<float, float>(p, head, j) - largest);
      return;
    }
    const MapRow<float, float> y(p.y_map, head / p.kv_heads, head % p.kv_heads, j);
    store(p.key_log + at, y.log());
    auto* rows = reinterpret_cast<uint32_t*>(p.key_coordinates + at * 32);
    for (int64_t a = 0; a < 16; a += 2) {
      const auto coordinate = [&](int64_t i) { return i < p.rank ? y(i) : i == p.rank ? 1.0f : 0.0f; };
      uint32_t parts[2];
      split(coordinate(a), coordinate(a + 1), parts, Bfloat16{});
      store(rows + a / 2, parts[0]), store(rows + 8 + a / 2, parts[1]);
    }
  });
}

// The same for float32 tokens, whose products split float32 rows.
SB_KERNEL tile_key_rows(TileParams p) {
  for_each_element(p.batch * p.kv_heads * p.k_tokens, [&](int64_t at) {
    const int64_t head = at / p.k_tokens, j = at % p.k_tokens;
    const MapRow<float, float> y(p.y_map, head / p.kv_heads, head % p.kv_heads, j);
    store(p.key_log + at, y.log());
    for (int64_t a = 0; a < 16; ++a) store(p.key_rows + at * 16 + a, a < p.rank ? y(a) : a == p.rank ? 1.0f : 0.0f);
  });
}

// Representatives by columns of 8 clusters and rows of 16 of their entries, as the right operand, in three parts.
template <class E>
SB_KERNEL tile_clusters(TileParams p) {
  const int64_t columns = p.features_padded / 8, size = columns * p.head_steps * kWarp;
  for_each_element(p.batch * p.kv_heads * size, [&](int64_t at) {
    const int64_t head = at / size, c = at / (p.head_steps * kWarp) % columns * 8 + at % kWarp / 4,
                  step = at / kWarp % p.head_steps;
    const float* row = static_cast<const float*>(p.given_representatives) + (head * p.rank + c) * p.head_dim;
    const auto entry = [&](int64_t e) { return c < p.rank && e < p.head_dim ? load(row + e) : 0.0f; };
    FourWords words[2];
    SB_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t e = step * 16 + at % 4 * 2 + 8 * half;
      uint32_t parts[kPartsOfRepresentative];
      split(entry(e), entry(e + 1), parts, E{});
      words[0].at[half] = parts[0], words[0].at[2 + half] = parts[1];
      words[1].at[half] = parts[2], words[1].at[2 + half] = 0;
    }
    SB_UNROLL
    for (int i = 0; i < 2; ++i) store(p.cluster_operand + 2 * at + i, words[i]);
  });
}

}  // namespace sb::cuda

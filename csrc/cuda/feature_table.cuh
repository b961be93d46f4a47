// Features of the quadratic kernel in a tile of queries: coordinates as rows in shared memory, and which of them make a
// feature.
#pragma once
#include "low_rank.cuh"

namespace sb::cuda {

// Columns of a query's row of coordinates in shared memory: up to 15 of them, then 1 behind them, and the log scale.
inline constexpr int kRowOfX = 17, kLogOfX = 16;

// Of a block: which coordinates a feature multiplies, and by what.
inline constexpr int64_t kFeatureTable = kTileFeatures * 8;

// Rows of features in the order of QuadraticKernel::expand: the two coordinates that make one, and its factor;
// coordinate `rank` is 1.
SB_DEVICE void write_feature_table(const TileParams& p) {
  const auto table = shared_array<uint32_t>(0);
  const auto factors = shared_array<float>(kTileFeatures * 4);
  const auto rank = uint32_t(p.rank);
  for (int f = thread_index(); f < kTileFeatures; f += block_threads()) {
    uint32_t a = rank, other = rank;
    float factor = f < p.features ? 1.0f : 0.0f;
    if (f > 0 && f <= p.rank) a = uint32_t(f - 1);
    if (f > p.rank && f < p.features) {
      int64_t pair = f - p.rank - 1;
      a = 0;
      while (pair >= p.rank - int64_t(a)) pair -= p.rank - int64_t(a), ++a;
      other = a + uint32_t(pair);
      factor = pair == 0 ? 0.5f : 0.70710678118654752440f;
    }
    table.set(f, a | other << 8), factors.set(f, factor);
  }
  sync_block();
}

}  // namespace sb::cuda

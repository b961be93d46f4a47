// Constants that make the CPU kernels fast and choose between ways to the same result. Those that define results are
// in params.h and csrc/math.
#pragma once
#include "../math/routing.h"
#include "../params.h"

namespace sb {

// Tasks.
inline constexpr int64_t kSegment = 512;         // keys of one partial state without a causal edge; kChunk with one
inline constexpr int64_t kQueriesPerUnit = 256;  // queries of one task without a causal edge; kChunk with one
inline constexpr int64_t kTokensPerTask = 256;   // tokens of one task of a projection
// A stage leaves its results in a shared cache for the next one: heads go through all stages together until they have
// this many tokens, or are as many as threads.
inline constexpr int64_t kTokensPerWave = 4096;
inline constexpr int64_t kRoundBytes = int64_t(1) << 21;  // kept records of a backward round, about a shared cache
// A round goes on until every thread has a unit, but takes no further one that would make it larger than this.
inline constexpr int64_t kMostRoundBytes = int64_t(1) << 26;

// Complements of no more keys than this are summed key by key: cheaper than the state's features, and exact.
inline constexpr int64_t kByKeyLimit = 64;
// Rows of no more queries than this sum every complement key by key.
inline constexpr int64_t kByKeyQueries = 16;
// Lists are bitmasks in rows of no more keys than this and of more queries than kByKeyQueries.
inline constexpr int64_t kBitmaskKeys = 128;

// Scores are kept from the forward to the backward pass where a query lists no more keys than this: 64 and a block that
// its window touches, about one more row of 64 per query (docs/algorithm.md, section 7).
inline constexpr int64_t kKeptKeys = 80;

// Query tiles and the scatter of the backward pass.
inline constexpr int kBackwardLanes = 16;    // queries of the largest tile
inline constexpr int kScatterBlockKeys = 8;  // keys whose gradients are read and written together

// Gathered rows.
inline constexpr int64_t kScatteredRows = 32;  // rows that stay in the first level of cache while their columns pass
inline constexpr int64_t kNearKeys = 512;      // over so few keys, listed rows stay in the second level of cache

// Projections: rows together, and rows whose weight gradient is one sum.
inline constexpr int64_t kProjectRows = 16, kProjectBackwardRows = 64;

// Routing.
inline constexpr int64_t kRouteLanes = kLeaf;             // tokens of a panel
inline constexpr int64_t kRouteSegment = kLeaf * kSuper;  // keys that one task prepares: a superblock
inline constexpr int kRoutedQueries = 16;                 // queries scored together (per query)
inline constexpr int64_t kSketchPanelFloats = 144;        // of the sketches of kBranch^2 keys

// Query blocks whose lists one task makes.
SB_HD int64_t blocks_per_group(int64_t block_k, int64_t pools) {
  return block_k == 1 ? kGroup / pools : kRoutedQueries;
}

// Queries of one task without a causal edge. With clusters a task also has a gradient of the representatives, so fewer
// tasks keep memory low.
SB_HD int64_t queries_per_unit(const AttentionParams& p) {
  return p.has_clusters() ? 2 * kQueriesPerUnit : kQueriesPerUnit;
}

// Whether a row's lists are bitmasks over all its keys. Never with a causal edge, nor without a low-rank kernel: there
// some queries do not see some keys at all, and zero times what those hold need not be zero.
SB_HD bool uses_bitmask(const AttentionParams& p, const RowRange& row) {
  return p.block_q == 1 && !p.is_causal && p.has_low_rank() && row.k_end - row.k_first <= kBitmaskKeys &&
         row.q_end - row.q_first > kByKeyQueries;
}
// Keys of the largest complement that a row sums key by key. Depends on what is valid in the row alone, so that padding
// changes nothing.
SB_HD int64_t by_key_limit(const AttentionParams& p, const RowRange& row) {
  const bool all = row.q_end - row.q_first <= kByKeyQueries || uses_bitmask(p, row);
  return all ? row.k_end - row.k_first : kByKeyLimit;
}

}  // namespace sb

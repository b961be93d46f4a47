// Sizes that define routing (docs/algorithm.md, section 3); the reference implementation uses the same.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace sb {

// Pooled form: a list of single keys for a block of queries.
inline constexpr int kLeaf = 32;            // keys of a candidate block
inline constexpr int kSuper = 16;           // candidate blocks of a superblock
inline constexpr int kGroup = 4;            // pools, of one query block or more, that share candidate blocks
inline constexpr int kPool = 16;            // queries that the causal form pools
inline constexpr int64_t kLongRow = 16384;  // valid keys from which superblocks are searched first
// Per-query form: a list of blocks for every query.
inline constexpr int kBranch = 8;  // keys of a listed block, and listed blocks of a superblock

// Candidate blocks (pooled) and candidate superblocks (per query) that are kept. Fewer lose accuracy on real attention.
SB_HD int64_t candidate_blocks(int64_t keys) { return keys > 85 ? (3 * keys + 15) / 16 : 16; }
// Per query, candidate superblocks or, by sketches, candidate blocks.
SB_HD int64_t candidates_per_query(int64_t keys, int64_t window) {
  return keys - window > 64 ? (keys - window) / kBranch * 2 : 16;
}
// Two pools know better which: half as many do.
SB_HD int64_t candidate_superblocks(int64_t keys, int64_t window, int64_t pools) {
  return candidates_per_query(keys, window) / pools;
}

// Entries of a list at most, in units of block_k keys: a window touches one block more than it fills.
SB_HD int64_t list_capacity(int64_t keys, int64_t block_k) { return block_k == 1 ? keys : keys / block_k + 1; }

}  // namespace sb

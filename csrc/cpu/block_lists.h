// The lists of key blocks and the windows of a call, as kernels read them.
#pragma once
#include "../arguments.h"
#include "kernels.h"

namespace sb::cpu {

// Holds what the parameters point at, contiguous. Checks the contents of index, count and query_order, since kernels
// read keys and write queries by them.
struct BlockLists {
  BlockLists(const AttentionArguments& a, AttentionParams& p);
  MaybeTensor index, count, span, order;
};

// Bounds of the keys that a query lists: an upper one for the whole call, and a lower one for a batch row without a
// causal edge.
int64_t longest_list(const AttentionParams& p);
int64_t shortest_list(const AttentionParams& p, int64_t b);

}  // namespace sb::cpu

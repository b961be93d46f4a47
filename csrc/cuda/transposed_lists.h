// The memory of transposed lists.
#pragma once
#include "call.h"

namespace sb::cuda {

// Gives `t` room for lists that have at most `capacity` entries, of all blocks of queries of `p`. Parts of the blocks
// are walked at once, as many as cursors stay no more than entries.
TransposedLists with_room(TransposedLists t, const AttentionParams& p, int64_t capacity, bool has_positions,
                          Call& call);

}  // namespace sb::cuda

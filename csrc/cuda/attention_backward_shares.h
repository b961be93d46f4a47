// Which calls' listed blocks go by shares, and what makes these.
#pragma once
#include "call.h"

namespace sb::cuda {

// Decided by types, widths and the form of the lists alone.
bool fits_backward_shares(const AttentionArguments& a);
// Whether tiles of query slots have one list each, which are transposed with the positions of entries; else unions of
// lists are made.
bool has_shared_lists(const AttentionArguments& a);
// Adds the pairs of listed blocks to sums of keys. `has_sums`: whether other kernels have written these before.
void add_shares(const BackwardParams& p, const TileParams& operands, bool has_sums, Element element, Call& call);

}  // namespace sb::cuda

// Which calls the forward pass on tensor cores takes, and the memory of its operands.
#pragma once
#include "call.h"

namespace sb::cuda {

// Decided by types, widths and the form of the lists alone, never by how many tokens there are, so that padding changes
// no bit.
bool fits_tiles(const AttentionArguments& a);
// The same of float32 tokens.
bool fits_float_tiles(const AttentionArguments& a);
// Without the state for the backward pass, which lays it out otherwise.
TileParams tile_params(const ForwardParams& p, const AttentionArguments& a, Call& call, bool has_state);

}  // namespace sb::cuda

// Which calls the backward pass of queries on tensor cores takes, and the memory of its operands.
#pragma once
#include "call.h"

namespace sb::cuda {

// Decided by types, widths and the form of the lists alone, as in the forward pass.
bool fits_backward_tiles(const AttentionArguments& a);
BackwardTileParams backward_tile_params(const BackwardParams& p, const TileParams& operands, Call& call);

}  // namespace sb::cuda

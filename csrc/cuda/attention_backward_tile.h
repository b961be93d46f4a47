// Which calls the backward pass on tensor cores takes, and the memory of its operands.
#pragma once
#include "call.h"

namespace sb::cuda {

// Decided by types, widths and the form of the lists alone, as in the forward pass.
bool fits_backward_tiles(const AttentionArguments& a);
BackwardTileParams backward_tile_params(const BackwardParams& p, const TileParams& operands, Element element,
                                        Call& call);
// Whether keys of such a call go by tiles too: where a window lists them, or a state of features holds them.
bool fits_backward_tiles_of_keys(const AttentionArguments& a);
BackwardTileKeysParams backward_tile_keys_params(const BackwardParams& p, const TileParams& operands, Call& call);

}  // namespace sb::cuda

// Which calls' listed blocks go by shares, and the memory of these.
#pragma once
#include "call.h"

namespace sb::cuda {

// Decided by types, widths and the form of the lists alone.
bool fits_backward_shares(const AttentionArguments& a);
// `has_sums`: whether other kernels have written sums of keys before.
BackwardSharesParams backward_shares_params(const BackwardParams& p, const TileParams& operands, bool has_sums,
                                            Call& call);

}  // namespace sb::cuda

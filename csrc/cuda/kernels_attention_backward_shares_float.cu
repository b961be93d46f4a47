#include "launch_backward_shares.h"

namespace sb::cuda {

void launch_float_attention_backward_shares(const BackwardSharesParams& p, Stream stream) {
  p.is_causal || p.slots_of_entries ? launch_float_shares_kernel<true>(p, stream)
                                    : launch_float_shares_kernel<false>(p, stream);
}

}  // namespace sb::cuda

#include "launch_backward_shares.h"

namespace sb::cuda {

void launch_ragged_attention_backward_shares(const BackwardSharesParams& p, Element element, Stream stream) {
  launch_shares_kernels<true>(p, element, stream);
}

}  // namespace sb::cuda

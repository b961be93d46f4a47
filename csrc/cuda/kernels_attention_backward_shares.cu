#include "launch_backward_shares.h"

namespace sb::cuda {

void launch_attention_backward_shares(const BackwardSharesParams& p, Element element, Stream stream) {
  launch_shares_kernels<false>(p, element, stream);
}

}  // namespace sb::cuda

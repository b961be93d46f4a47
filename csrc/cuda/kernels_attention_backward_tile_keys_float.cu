#include "launch_backward_tile_keys.h"

namespace sb::cuda {

void launch_float_attention_backward_tile_keys(const BackwardTileKeysParams& p, Stream stream) {
  p.has_ragged_stages() ? launch_float_backward_tile_keys_kernel<true>(p, stream)
                        : launch_float_backward_tile_keys_kernel<false>(p, stream);
}

}  // namespace sb::cuda

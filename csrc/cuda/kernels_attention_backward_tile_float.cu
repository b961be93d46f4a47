#include "launch_backward_tile.h"

namespace sb::cuda {

void launch_float_attention_backward_tile(const BackwardTileParams& p, Stream stream) {
  p.is_ragged() ? launch_float_backward_tile_kernel<true>(p, stream)
                : launch_float_backward_tile_kernel<false>(p, stream);
}

}  // namespace sb::cuda

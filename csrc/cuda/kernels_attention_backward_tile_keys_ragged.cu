#include "launch_backward_tile_keys.h"

namespace sb::cuda {

void launch_ragged_attention_backward_tile_keys(const BackwardTileKeysParams& p, Element element, Stream stream) {
  launch_backward_tile_keys_kernel<true>(p, element, stream);
}

}  // namespace sb::cuda

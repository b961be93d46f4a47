#include "launch_backward_tile.h"

namespace sb::cuda {

void launch_attention_backward_tile(const BackwardTileParams& p, Element element, Stream stream) {
  launch_backward_tile_kernel<false>(p, element, stream);
}

}  // namespace sb::cuda

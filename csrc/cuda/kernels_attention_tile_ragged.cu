#include "launch_tile.h"

namespace sb::cuda {

void launch_ragged_attention_tile(const TileParams& p, Element element, Stream stream) {
  launch_tile_kernel<true>(p, element, stream);
}

}  // namespace sb::cuda

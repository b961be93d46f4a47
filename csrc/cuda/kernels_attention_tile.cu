#include "launch_tile.h"

namespace sb::cuda {

void launch_attention_tile(const TileParams& p, Element element, Stream stream) {
  launch_tile_kernel<false>(p, element, stream);
}

}  // namespace sb::cuda

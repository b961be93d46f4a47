#include "launch_tile_float.h"

namespace sb::cuda {

void launch_ragged_float_attention_tile(const TileParams& p, Stream stream) {
  launch_float_tile_kernel<true>(p, stream);
}

}  // namespace sb::cuda

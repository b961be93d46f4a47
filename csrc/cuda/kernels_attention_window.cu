#include "launch_window.h"

namespace sb::cuda {

bool launch_attention_window(const TileParams& p, Element element, Stream stream) {
  return launch_if_shared<false>(p, element, stream);
}

}  // namespace sb::cuda

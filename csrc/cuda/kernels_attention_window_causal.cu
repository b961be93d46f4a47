#include "launch_window.h"

namespace sb::cuda {

bool launch_causal_attention_window(const TileParams& p, Element element, Stream stream) {
  return launch_if_shared<true>(p, element, stream);
}

}  // namespace sb::cuda

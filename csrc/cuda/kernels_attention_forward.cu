#include "attention_forward.cuh"

#include "launch.h"

namespace sb::cuda {

void launch_attention_forward(const ForwardParams& p, Element element, bool is_wide, Stream stream) {
  with_types(element, is_wide, [&](auto* e, auto* t) {
    using E = std::remove_pointer_t<decltype(e)>;
    using T = std::remove_pointer_t<decltype(t)>;
    launch(stream, "attention_forward", ceil_div(p.batch * p.q_heads * p.q_tokens, kForwardWarps),
           kForwardWarps * kWarp, kForwardWarps * ForwardMemory<T>::bytes(p), attention_forward<E, T>, p);
  });
}

}  // namespace sb::cuda

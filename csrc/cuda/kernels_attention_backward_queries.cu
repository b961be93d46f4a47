#include "attention_backward_queries.cuh"

#include "launch.h"

namespace sb::cuda {

void launch_backward_queries(const BackwardParams& p, Element element, bool is_wide, Stream stream) {
  with_types(element, is_wide, [&](auto* e, auto* t) {
    using E = std::remove_pointer_t<decltype(e)>;
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t bytes = BackwardQueryMemory<T>::bytes(p);
    const int warps = warps_for(bytes);
    launch(stream, "attention_backward_queries", ceil_div(p.batch * p.q_heads * p.q_tokens, warps), warps * kWarp,
           warps * bytes, attention_backward_queries<E, T>, p);
  });
}

}  // namespace sb::cuda

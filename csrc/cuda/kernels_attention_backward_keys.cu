#include "attention_backward_keys.cuh"

#include "launch.h"

namespace sb::cuda {

void launch_backward_keys(const BackwardParams& p, Element element, bool is_wide, Stream stream) {
  with_types(element, is_wide, [&](auto* e, auto* t) {
    using E = std::remove_pointer_t<decltype(e)>;
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t bytes = BackwardKeyMemory<T>::bytes(p);
    const int warps = warps_for(bytes);
    launch(stream, "attention_backward_keys", ceil_div(p.batch * p.kv_heads * p.k_tokens, warps), warps * kWarp,
           warps * bytes, attention_backward_keys<E, T>, p);
  });
}

void launch_finish_keys(const BackwardParams& p, Element element, bool is_wide, Stream stream) {
  with_types(element, is_wide, [&](auto* e, auto* t) {
    using E = std::remove_pointer_t<decltype(e)>;
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t columns = p.head_dim > p.value_pad ? p.head_dim : p.value_pad;
    launch(stream, "finish_keys", blocks_for(p.batch * p.kv_heads * p.k_tokens * columns, kFinishThreads),
           kFinishThreads, 0, finish_keys<E, T>, p);
  });
}

}  // namespace sb::cuda

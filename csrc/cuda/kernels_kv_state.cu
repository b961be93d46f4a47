#include "held_keys.cuh"
#include "kv_state.cuh"

#include "launch.h"

namespace sb::cuda {

// States in float64 alone hold keys out.
void launch_held_keys(const ForwardParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    typedef AccType<std::remove_pointer_t<decltype(e)>> M;
    const int64_t heads = p.batch * p.kv_heads;
    launch(stream, "key_weights", blocks_for(heads * p.k_tokens, kStateThreads), kStateThreads, 0, key_weights<M>, p);
    launch(stream, "held_keys", heads, kWarp, HeldKeys::kBytes, held_keys, p);
  });
}

void launch_states(const ForwardParams& p, Element element, bool is_wide, Stream stream) {
  with_types(element, is_wide, [&](auto* e, auto* t) {
    using E = std::remove_pointer_t<decltype(e)>;
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t heads = p.batch * p.kv_heads, segments = heads * (p.state_slots - 1);
    if (p.has_clusters()) {
      const int64_t bytes = SortedKeys::bytes(p.rank) + kSegment * int64_t(sizeof(T));
      launch(stream, "cluster_segments", segments, kStateThreads, bytes, cluster_segments<E, T>, p);
    } else if (sizeof(E) == 2 && sizeof(T) == 4 && p.has_products()) {
      launch_feature_products(p, element, stream);
    } else {
      const int64_t values = kFeatureTile * kChunk + kStateThreads / kWarp,
                    bytes = values * int64_t(sizeof(T)) + kChunk * int64_t(sizeof(int32_t));
      launch(stream, "feature_segments", segments * ceil_div(p.features, kFeatureTile), kStateThreads, bytes,
             feature_segments<E, T>, p);
    }
    const int64_t blocks = blocks_for(heads * p.slot_size, kStateThreads);
    if (p.has_prefixes())
      launch(stream, "state_prefixes", blocks, kStateThreads, 0, state_prefixes<T>, p);
    else
      launch(stream, "state_totals", blocks, kStateThreads, 0, state_totals<T>, p);
  });
}

}  // namespace sb::cuda

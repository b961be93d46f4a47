#include "kv_state.cuh"

#include "launch.h"

namespace sb::cuda {

void launch_states(const ForwardParams& p, Element element, bool is_wide, Stream stream) {
  with_types(element, is_wide, [&](auto* e, auto* t) {
    using E = std::remove_pointer_t<decltype(e)>;
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t heads = p.batch * p.kv_heads, segments = heads * (p.slots - 1);
    if (p.has_clusters()) {
      launch(stream, "cluster_logs", blocks_for(heads * p.rank, kStateThreads), kStateThreads, 0,
             cluster_logs<AccType<E>, T>, p);
      launch(stream, "cluster_segments", segments, kStateThreads, 0, cluster_segments<E, T>, p);
    } else {
      const int64_t values = kFeatureTile * kChunk + kStateThreads / kWarp,
                    bytes = values * int64_t(sizeof(T)) + kChunk * int64_t(sizeof(int32_t));
      launch(stream, "feature_segments", segments * ceil_div(p.features, kFeatureTile), kStateThreads, bytes,
             feature_segments<E, T>, p);
    }
    launch(stream, "state_prefixes", blocks_for(heads * p.slot_size, kStateThreads), kStateThreads, 0,
           state_prefixes<T>, p);
  });
}

}  // namespace sb::cuda

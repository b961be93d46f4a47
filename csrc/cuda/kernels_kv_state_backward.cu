#include "kv_state_backward.cuh"

#include "launch.h"

namespace sb::cuda {

void launch_state_gradients(const BackwardParams& p, Element element, bool is_wide, Stream stream) {
  with_types(element, is_wide, [&](auto* e, auto* t) {
    using E = std::remove_pointer_t<decltype(e)>;
    using T = std::remove_pointer_t<decltype(t)>;
    const bool by_products = sizeof(E) == 2 && sizeof(T) == 4 && p.has_query_products();
    if (by_products) {
      launch_query_products(p, element, stream);
    } else {
      const int64_t blocks = p.batch * p.q_heads * p.query_segments * ceil_div(p.features, kFeatureTile),
                    bytes = (kFeatureTile + 1) * kChunk * int64_t(sizeof(T)) + kChunk * int64_t(sizeof(int32_t));
      launch(stream, "query_segments", blocks, kStateThreads, bytes, query_segments<E, T>, p);
    }
    launch(stream, "query_suffixes", blocks_for(p.batch * p.kv_heads * p.slot_size, kStateThreads), kStateThreads, 0,
           query_suffixes<T>, p);
    if (!p.has_clusters()) return;
    if (by_products)
      launch_representative_products(p, element, stream);
    else
      launch(stream, "representative_segments", p.batch * p.q_heads * ceil_div(p.q_tokens, kSegment), kStateThreads, 0,
             representative_segments<E, T>, p);
    launch(stream, "representative_sums", blocks_for(p.batch * p.kv_heads * p.rank * p.head_dim, kStateThreads),
           kStateThreads, 0, representative_sums<AccType<E>, T>, p);
  });
}

void launch_share_representatives(const BackwardParams& p, Element element, bool is_wide, Stream stream) {
  with_types(element, is_wide, [&](auto* e, auto* t) {
    using E = std::remove_pointer_t<decltype(e)>;
    using T = std::remove_pointer_t<decltype(t)>;
    launch(stream, "share_representatives", ceil_div(p.batch * p.kv_heads * p.rank, kStateThreads / kWarp),
           kStateThreads, 0, share_representatives<AccType<E>, T>, p);
  });
}

}  // namespace sb::cuda

#include "cluster_keys.cuh"

#include "launch.h"

namespace sb::cuda {

void launch_cluster(const ClusteringParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    using T = AccType<E>;
    const int64_t heads = p.batch * p.kv_heads;
    launch(stream, "cluster_queries", heads * p.q_segments, int(pad_to(p.head_dim, kWarp)), 0, cluster_queries<E>, p);
    launch(stream, "cluster_centres", heads, kClusterThreads, CentresMemory<T>::bytes(p), cluster_centres<E>, p);
    launch(stream, "cluster_keys", heads * (p.k_slots - 1), kClusterThreads, KeysMemory<E>::bytes(p), cluster_keys<E>,
           p);
    launch(stream, "cluster_representatives", ceil_div(heads * p.clusters, kClusterWarps), kClusterThreads, 0,
           cluster_representatives<T>, p);
    launch(stream, "cluster_log_masses", blocks_for(heads * p.k_tokens, kClusterThreads), kClusterThreads, 0,
           cluster_log_masses<T>, p);
  });
}

}  // namespace sb::cuda

// A query slot of a row: its query, and what it makes of a key.
#pragma once
#include "key_list.cuh"
#include "low_rank.cuh"

namespace sb::cuda {

// Log weight of the low-rank part, as its share of the query and that of the key; L is exp(query + key) K(product).
template <class T>
struct LowRankTerm {
  T query, key, product;
};

template <class E, class T>
class AttentionQuery {
 public:
  typedef AccType<E> M;

  // Shared memory of a warp: room for the scaled query, and for the exponents of the clusters.
  SB_DEVICE AttentionQuery(const ForwardParams& p, const Shared<T>& q, const Shared<T>& exponent, int64_t b, int64_t h,
                           int64_t slot)
      : p(p),
        q(q),
        exponent(exponent),
        b(b),
        h(h),
        kv(p.kv_head(h)),
        head(b * p.kv_heads + kv),
        lane(lane_index()),
        slot(slot) {}

  // False where the slot has no query, or an ignored one.
  SB_DEVICE bool find(const RowRange& range) {
    if (slot >= slots_of_row(p, range)) return false;
    query = query_of_slot(p, range, b, h, slot), first_key = range.k_first;
    return query >= 0 && query < p.q_tokens && !(p.q_mask && load(p.q_mask + b * p.q_tokens + query));
  }

  SB_DEVICE void read_query() {
    const E* row = p.q.template at<const E>(b, h, query);
    sync_warp();  // the last query is done with it
    for (int64_t e = lane; e < p.head_dim; e += kWarp) q.set(e, T(widened(load(row + e))) * T(p.scale * kLog2e));
    sync_warp();
  }
  // q.row, in base 2.
  template <class R>
  SB_DEVICE T score(const R* row) const {
    return sum_of_terms(p.head_dim, [&](int64_t e) { return q.get(e) * T(widened(load(row + e))); });
  }
  SB_DEVICE T score_of_key(int64_t key) const { return score(p.k.template at<const E>(b, kv, first_key + key)); }

  // q.b_c + the largest log mass of the cluster.
  SB_DEVICE void weigh_clusters() {
    const M* representatives = static_cast<const M*>(p.given_representatives) + head * p.rank * p.head_dim;
    T top = T(kLowestLog);
    for (int64_t c = lane; c < p.rank; c += kWarp) {
      const T largest = load(static_cast<const T*>(p.cluster_log) + head * p.rank + c);
      const T of_cluster = largest > T(kNoKeyLog) ? score(representatives + c * p.head_dim) + largest : T(kLowestLog);
      exponent.set(c, of_cluster);
      top = larger(top, of_cluster);
    }
    top_cluster = warp_max(top);
    sync_warp();
  }
  SB_DEVICE LowRankTerm<T> low_rank_term(int64_t key) const {
    const int64_t j = first_key + key;
    if (p.has_clusters()) {
      const int64_t c = cluster_of(p, head, j);
      const T largest = load(static_cast<const T*>(p.cluster_log) + head * p.rank + c);
      return {exponent.get(c), log_mass_of<M, T>(p, head, j) - largest, T(0)};
    }
    const MapRow<M, T> x(p.x_map, b, h, query), y(p.y_map, b, kv, j);
    return {rho, y.log(), product_of_maps(p, x, y)};
  }

  const ForwardParams& p;
  const Shared<T> q, exponent;
  const int64_t b, h, kv, head;
  const int lane;
  const int64_t slot;
  int64_t query = -1, first_key = 0;
  T rho = T(0), top_cluster = T(0);
};

}  // namespace sb::cuda

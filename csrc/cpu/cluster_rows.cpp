#include "cluster_rows.h"

#include <algorithm>
#include <atomic>

#include "../profile.h"

namespace sb::cpu {

template <class T, class Arguments, class Params>
void ClusterRows::set(const Arguments& a, Params& p) {
  const Stage stage("conversion of clusters");
  index = as_contiguous(*a.cluster_index);
  p.cluster = static_cast<const int32_t*>(index->data_ptr());
  representatives = as_rows<T>(*a.representatives, p.head_pad);
  p.representatives = representatives.rows;

  const int64_t width = pad_to(p.rank, kPad);
  logs = empty({p.batch, p.kv_heads, p.k_tokens, 1}, kScalar<T>);
  largest = empty({p.batch, p.kv_heads, 1, width}, kScalar<T>);
  p.kappa = rows_of(*logs), p.largest = rows_of(*largest);
  const Tensor log_mass = as_dtype(as_contiguous(*a.log_mass), kScalar<T>);
  const T limit = map_limits<T>(LowRank::kCentroid).log;
  std::atomic<bool> is_outside = false;
  parallel_ranges(p.batch * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.kv_heads, kv = row % p.kv_heads;
      const uint8_t* ignored = p.k_mask ? p.k_mask + b * p.k_tokens : nullptr;
      const int32_t* cluster = p.cluster + row * p.k_tokens;
      const T* log = static_cast<const T*>(log_mass.data_ptr()) + row * p.k_tokens;
      T *kappa = p.kappa.template at<T>(b, kv, 0), *top = p.largest.template at<T>(b, kv, 0);
      std::fill_n(top, width, T(-1e30));
      const auto for_each_key = [&](const auto& visit) {
        for (int64_t j = p.rows[b].k_first; j < p.rows[b].k_end; ++j)
          if (!(ignored && ignored[j])) visit(j);
      };
      bool outside = false;
      for_each_key([&](int64_t j) {
        const int32_t c = cluster[j];
        if (c < 0 || c >= p.rank) {
          outside = true;
          return;
        }
        const T scaled = log[j] * T(kLog2e);
        kappa[j] = scaled > limit ? limit : scaled < -limit ? -limit : scaled;  // NaN stays NaN
        if (kappa[j] > top[c]) top[c] = kappa[j];
      });
      if (outside) {
        is_outside = true;
        continue;
      }
      for_each_key([&](int64_t j) { kappa[j] -= top[cluster[j]]; });
    }
  });
  SB_CHECK(!is_outside, "cluster_index must name clusters 0 to ", p.rank - 1,
           " for every key that is not ignored; make the clusters with the key_padding_mask that attention is given");
}

template <class T>
void ClusterRows::set_query_mean(const AttentionArguments& a, AttentionParams& p) {
  mean = zeros({p.batch, p.kv_heads, 1, p.head_pad}, kScalar<T>);
  p.query_mean = rows_of(*mean);
  const Tensor given_mean = as_dtype(as_contiguous(*a.query_mean), kScalar<T>);
  const T* from = static_cast<const T*>(given_mean.data_ptr());
  for (int64_t row = 0; row < p.batch * p.kv_heads; ++row)
    std::copy_n(from + row * p.head_dim, p.head_dim, p.query_mean.template at<T>(0, 0, 0) + row * p.head_pad);
}

template void ClusterRows::set<float>(const AttentionArguments&, AttentionParams&);
template void ClusterRows::set<double>(const AttentionArguments&, AttentionParams&);
template void ClusterRows::set<float>(const RouteArguments&, RouteParams&);
template void ClusterRows::set_query_mean<float>(const AttentionArguments&, AttentionParams&);
template void ClusterRows::set_query_mean<double>(const AttentionArguments&, AttentionParams&);

}  // namespace sb::cpu

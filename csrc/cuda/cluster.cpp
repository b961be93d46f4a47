// Launcher of clustering: rows, then the mean query, centres, keys and representatives of every head.
#include "../error.h"
#include "../math/clustering.h"
#include "../tensor_traits.h"
#include "call.h"
#include "kernels.h"
#include "launchers.h"

namespace sb::cuda {

Clusters cluster(const ClusterArguments& a) {
  Call call(a.query);
  ClusteringParams p{};
  p.batch = a.query.size(0), p.q_heads = a.query.size(1), p.kv_heads = a.key.size(1), p.q_tokens = a.query.size(2);
  p.k_tokens = a.key.size(2), p.head_dim = p.head_pad = a.query.size(3), p.clusters = a.clusters, p.scale = a.scale;
  SB_CHECK(p.head_dim <= kWidest, "cluster: expected query and key at most ", kWidest, " wide on a CUDA device, got ",
           p.head_dim, "; use more heads, or move the tensors to the CPU");
  p.q_segments = ceil_div(p.q_tokens, kSegment), p.k_slots = ceil_div(p.k_tokens, kSegment) + 1;
  p.has_eights = p.head_dim % 8 == 0 && a.key.scalar_type() != ScalarType::Double;
  p.q = call.read_rows(a.query), p.k = p.has_eights ? call.read_aligned_rows(a.key) : call.read_rows(a.key);

  RowsParams r{};
  r.batch = p.batch, r.q_tokens = p.q_tokens, r.k_tokens = p.k_tokens, r.segment = kSegment, r.slots = p.k_slots;
  r.q_range = call.read_contiguous<int32_t>(a.query_range), r.k_range = call.read_contiguous<int32_t>(a.key_range);
  p.q_mask = call.read_contiguous<uint8_t>(a.query_mask);
  p.k_mask = r.k_mask = call.read_contiguous<uint8_t>(a.key_mask);
  static_assert(sizeof(RowRange) == 5 * sizeof(int32_t));
  p.rows = r.rows = static_cast<RowRange*>(call.write(call.empty({p.batch, 5}, ScalarType::Int)));
  p.valid_before = r.valid_before =
      static_cast<int32_t*>(call.write(call.empty({p.batch, p.k_slots}, ScalarType::Int)));

  const ScalarType dtype = accumulation_type(a.query);
  const auto scratch = [&](int64_t tokens, int64_t values) {
    return call.write(call.empty({p.batch, p.kv_heads, tokens, values}, dtype));
  };
  p.query_sums = scratch(p.q_segments, p.head_dim);
  p.query_counts = static_cast<int32_t*>(call.write(call.empty({p.batch, p.kv_heads, p.q_segments}, ScalarType::Int)));
  p.mean = scratch(1, p.head_dim), p.directions = scratch(p.head_dim, kDirections);
  p.centres = scratch(p.clusters, kDirections + 1), p.dots = scratch(1, p.clusters);
  p.sums = scratch((p.k_slots - 1) * p.clusters, p.head_dim);
  p.top = scratch(p.k_slots - 1, p.clusters), p.mass = scratch(p.k_slots - 1, p.clusters);

  const Tensor index = call.empty({p.batch, p.kv_heads, p.k_tokens}, ScalarType::Int),
               representatives = call.empty({p.batch, p.kv_heads, p.clusters, p.head_dim}, dtype),
               log_mass = call.empty({p.batch, p.kv_heads, p.k_tokens}, dtype),
               query_mean = call.empty({p.batch, p.kv_heads, p.head_dim}, dtype);
  p.index = static_cast<int32_t*>(call.write(index)), p.representatives = call.write(representatives);
  p.log_mass = call.write(log_mass), p.query_mean = call.write(query_mean);
  launch_rows(r, call.stream());
  launch_cluster(p, element_of(a.query), call.stream());
  return {index, representatives, log_mass, query_mean};
}

}  // namespace sb::cuda

// Launcher of routing: the key side of a few heads in panels, then groups of queries of these heads in parallel.
#include <algorithm>
#include <cstring>

#include "../math/sketch.h"
#include "../profile.h"
#include "cluster_rows.h"
#include "launchers.h"
#include "map_rows.h"
#include "padding.h"

namespace sb::cpu {
namespace {

// Sets where each level of a head's panels begins, in floats. Returns the size of all of them.
int64_t place_panels(RouteParams& p) {
  const int64_t panel = p.panel_rows * kRouteLanes, of_keys = p.key_rows * kRouteLanes;
  const int64_t segments = ceil_div(p.k_tokens, kRouteSegment), leaves = ceil_div(p.k_tokens, kRouteLanes);
  const auto panels_of = [&](int64_t lanes) { return ceil_div(lanes, kRouteLanes) * panel; };
  if (p.block_k == 1) {
    p.level_offset[1] = leaves * of_keys;
    p.level_offset[2] = p.level_offset[1] + panels_of(segments * kRouteSegment / kRouteLanes);
    return p.level_offset[2] + panels_of(segments);
  }
  const int64_t supers = ceil_div(p.k_tokens, kBranch * kBranch);
  if (p.has_sketches()) return supers * kSketchPanelFloats;
  p.level_offset[1] = supers * p.panel_rows * kBranch * p.pools;
  return p.level_offset[1] + panels_of(supers * p.pools);
}

// What the keys' side works in: a panel, the means of a superblock's groups and of its own, or what sketches are made
// from.
int64_t key_scratch_floats(const RouteParams& p) {
  if (p.has_sketches()) return sketch_width(p.head_dim) * kRouteLanes;
  return p.has_groups() ? (2 * kBranch + 2) * p.head_pad : p.key_rows * kRouteLanes;
}

}  // namespace

std::tuple<Tensor, Tensor> route(const RouteArguments& a) {
  RouteParams p{};
  p.batch = a.query.size(0), p.q_heads = a.query.size(1), p.kv_heads = a.key.size(1), p.q_tokens = a.query.size(2),
  p.k_tokens = a.key.size(2);
  p.head_dim = a.query.size(3), p.head_pad = pad_to(p.head_dim, kPad);
  p.low_rank = a.block_k == 1 ? static_cast<LowRank>(a.low_rank) : LowRank::kNone;
  p.block_q = a.block_q, p.block_k = a.block_k, p.window = a.window, p.sinks = a.sinks, p.pools = a.pools,
  p.is_causal = a.is_causal, p.scale = float(a.scale);
  p.blocks = ceil_div(p.q_tokens, p.block_q);
  // Memory follows the keys that there are, whatever the budget: no list is longer, and no more are chosen.
  p.capacity = std::min(list_capacity(a.keys, p.block_k), ceil_div(p.k_tokens, p.block_k));
  p.keys = p.block_k == 1 ? std::min(a.keys, p.k_tokens)
                          : p.window + std::min(a.keys - p.window, pad_to(p.k_tokens, p.block_k));
  MaybeTensor head_keys;
  if (a.head_keys) {
    head_keys = as_contiguous(*a.head_keys);
    p.head_keys = static_cast<const int32_t*>(head_keys->data_ptr());
  }

  const TensorRows q = as_rows<float>(a.query, p.head_pad), k = as_rows<float>(a.key, p.head_pad);
  p.q = q.rows, p.k = k.rows;
  const Padding padding(a, p);
  Maps maps;
  ClusterRows clusters;
  if (p.has_low_rank()) {
    p.rank = rank_of(a);
    p.has_clusters() ? clusters.set<float>(a, p) : maps.set<float>(a, p, false, true);
  }
  p.panel_rows = p.head_dim + 2 + (!p.has_low_rank() ? 0 : p.rank + 1);
  p.key_rows = p.has_clusters() ? p.head_dim + 5 : p.panel_rows;

  Tensor index = empty({p.batch, p.q_heads, p.blocks, p.capacity}, ScalarType::Int);
  Tensor count = zeros({p.batch, p.q_heads, p.blocks}, ScalarType::Int);
  if (index.numel() > 0) std::memset(index.data_ptr(), 0xff, size_t(index.numel()) * sizeof(int32_t));  // -1 everywhere
  p.index = static_cast<int32_t*>(index.data_ptr()), p.count = static_cast<int32_t*>(count.data_ptr());

  const RouteKernels& kernel = instruction_set().route;
  const ZeroRow<float> zero_row(std::max(p.head_pad, pad_to(p.rank + 1, kPad)));
  const int64_t panel_floats = place_panels(p), heads = p.batch * p.kv_heads, shared = p.q_heads / p.kv_heads;
  const Scratch memory(heads_per_range(heads, p.k_tokens) * panel_floats * int64_t(sizeof(float)));
  float* const panels = static_cast<float*>(memory.data());
  const int64_t segments = ceil_div(p.k_tokens, kRouteSegment),
                groups = ceil_div(p.blocks, blocks_per_group(p.block_k, p.pools));
  const int64_t key_bytes = key_scratch_floats(p) * int64_t(sizeof(float)),
                group_bytes = kernel.group(p, 0, 0, 0, nullptr, nullptr);
  for_each_head_range(heads, p.k_tokens, [&](const HeadRange& range) {
    std::optional<Stage> stage(std::in_place, "routing, keys");
    parallel_units(1, range.count, segments, key_bytes, [&](int64_t, int64_t at, int64_t segment, void* scratch) {
      const int64_t head = range.first + at;
      kernel.keys(p, head / p.kv_heads, head % p.kv_heads, segment, panels + at * panel_floats,
                  static_cast<float*>(scratch), static_cast<const float*>(zero_row.data()));
    });
    stage.emplace("routing, lists");
    parallel_units(1, range.count * shared, groups, group_bytes,
                   [&](int64_t, int64_t at, int64_t group, void* scratch) {
                     const int64_t head = range.first + at / shared, h = head % p.kv_heads * shared + at % shared;
                     kernel.group(p, head / p.kv_heads, h, group, panels + at / shared * panel_floats, scratch);
                   });
  });
  return {index, count};
}

}  // namespace sb::cpu

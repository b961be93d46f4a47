// Launcher of routing: rows, then means of runs of keys, then lists.
#include <algorithm>
#include <limits>

#include "../math/low_rank_kernels.h"
#include "../math/routing.h"
#include "../tensor_traits.h"
#include "call.h"
#include "kernels.h"
#include "launchers.h"

namespace sb::cuda {
namespace {

// Blocks of threads make lists in turn, each in memory of its own: as many as this memory holds, within limits.
constexpr int64_t kScratchWords = int64_t(1) << 24, kFewestBlocks = 128, kMostBlocks = 1024;

class Route {
 public:
  explicit Route(const RouteArguments& a)
      : a(a), query(tokens(a.query, a.key)), key(tokens(a.key, a.query)), call(query) {
    set_shape(), set_rows();
    if (p.has_low_rank()) set_low_rank();
    set_runs(), set_tile(), set_scratch();
  }

  std::tuple<Tensor, Tensor> run() {
    Tensor index = call.empty({p.batch, p.q_heads, p.blocks, p.capacity}, ScalarType::Int),
           count = call.empty({p.batch, p.q_heads, p.blocks}, ScalarType::Int);
    torch::stable::fill_(index, -1.0), torch::stable::zero_(count);
    p.index = static_cast<int32_t*>(call.write(index)), p.count = static_cast<int32_t*>(call.write(count));
    launch_rows(row_params, call.stream());
    launch_route(p, element_of(query), call.stream());
    return {index, count};
  }

 private:
  // Kernels read tokens of one type. Scores are in float32 whatever it is.
  static Tensor tokens(const Tensor& t, const Tensor& others) {
    return t.scalar_type() == others.scalar_type() ? t : torch::stable::to(t, ScalarType::Float);
  }

  void set_shape() {
    const Tensor &q = query, &k = key;
    p.batch = q.size(0), p.q_heads = q.size(1), p.kv_heads = k.size(1), p.q_tokens = q.size(2), p.k_tokens = k.size(2);
    p.head_dim = p.head_pad = q.size(3);
    p.low_rank = a.block_k == 1 ? static_cast<LowRank>(a.low_rank) : LowRank::kNone;
    p.block_q = a.block_q, p.block_k = a.block_k, p.window = a.window, p.sinks = a.sinks, p.pools = a.pools;
    p.is_causal = a.is_causal, p.scale = float(a.scale), p.blocks = ceil_div(p.q_tokens, p.block_q);
    // Memory follows the keys that there are, whatever the budget: no list is longer, and no more are chosen.
    p.capacity = std::min(list_capacity(a.keys, p.block_k), ceil_div(p.k_tokens, p.block_k));
    p.keys = p.block_k == 1 ? std::min(a.keys, p.k_tokens)
                            : p.window + std::min(a.keys - p.window, pad_to(p.k_tokens, p.block_k));
    p.q = call.read_rows(q), p.k = call.read_rows(k);
  }

  void set_rows() {
    p.head_keys = call.read_contiguous<int32_t>(a.head_keys);
    RowsParams& r = row_params;
    r.batch = p.batch, r.q_tokens = p.q_tokens, r.k_tokens = p.k_tokens;
    r.q_range = call.read_contiguous<int32_t>(a.query_range), r.k_range = call.read_contiguous<int32_t>(a.key_range);
    r.offset = call.read_contiguous<int32_t>(a.query_offset);
    p.q_mask = call.read_contiguous<uint8_t>(a.query_mask);
    p.k_mask = r.k_mask = call.read_contiguous<uint8_t>(a.key_mask);
    p.rows = r.rows = static_cast<RowRange*>(call.write(call.empty({p.batch, 5}, ScalarType::Int)));
  }

  void set_low_rank() {
    if (p.has_clusters()) {
      p.rank = a.representatives->size(2);
      p.cluster = call.read_contiguous<int32_t>(a.cluster_index);
      p.log_mass = call.read_contiguous<void>(a.log_mass);
      p.given_representatives = call.read_contiguous<void>(a.representatives);
      p.cluster_limit = map_limits<float>(p.low_rank).log;
      p.segment_top = floats({p.batch, p.kv_heads, ceil_div(p.k_tokens, int64_t(512)), p.rank});
      p.cluster_top = floats({p.batch, p.kv_heads, p.rank});
    } else {
      p.rank = a.packed_rank ? a.packed_rank : a.query_map->size(3) - 1;
      p.x_map = map_view(*a.query_map), p.y_map = map_view(*a.key_map);
    }
  }

  MapView map_view(const Tensor& map) {
    MapView view{};
    view.data = call.read(map), view.batch = map.stride(0), view.head = map.stride(1), view.row = map.stride(2);
    view.step = map.stride(3);
    view.log_column = a.packed_rank ? p.rank + 1 : p.rank, view.log_factor = a.packed_rank ? 1 : kLog2e;
    const MapLimits<float> limits = map_limits<float>(p.low_rank);
    view.coordinate_limit = limits.coordinate, view.log_limit = limits.log;
    return view;
  }

  void set_runs() {
    p.fine_keys = p.block_k == 1 ? kLeaf : kBranch;
    p.coarse_keys = p.block_k == 1 ? kLeaf * kSuper : kBranch * kBranch;
    p.fine_runs = ceil_div(p.k_tokens, p.fine_keys), p.coarse_runs = ceil_div(p.k_tokens, p.coarse_keys);
    if (p.has_sketches()) {
      p.sketch = static_cast<uint32_t*>(call.write(call.empty({p.batch, p.kv_heads, p.k_tokens, 2}, ScalarType::Int)));
      p.is_finite = static_cast<uint8_t*>(call.write(call.empty({p.batch, p.kv_heads, p.k_tokens}, ScalarType::Byte)));
      return;
    }
    p.run_width = p.has_groups() ? 2 * (p.head_dim + 2) : p.head_dim + 4 + (p.has_low_rank() ? p.rank : 0);
    p.fine = floats({p.batch, p.kv_heads, p.fine_runs, p.run_width});
    p.coarse = floats({p.batch, p.kv_heads, p.coarse_runs, p.run_width});
  }

  void set_scratch() {
    int64_t tasks = p.batch * p.q_heads;
    if (p.block_k == 1) {
      const int64_t kept = candidate_blocks(p.keys), leaves = std::min(p.fine_runs, kLongRow / kLeaf),
                    tail = kGroup * p.block_q / kLeaf + 2;
      p.units = std::max({p.coarse_runs + 1, leaves, (2 * kept + 2) * kSuper,
                          // On tensor cores keys are scored in shared memory.
                          (kept + tail) * (p.tile_rows > 0 ? int64_t(1) : kLeaf)});
      p.groups = ceil_div(p.blocks, kGroup / p.pools), tasks *= p.groups;
    } else if (p.has_sketches()) {
      p.units = p.fine_runs + 1, tasks *= p.q_tokens;
    } else {
      const int64_t kept = std::min<int64_t>(candidate_superblocks(p.keys, p.window, p.pools), p.coarse_runs);
      p.units = std::max(p.coarse_runs + 1, (kept + 2) * kBranch);
      tasks *= p.tile_rows > 0 ? ceil_div(p.q_tokens, kGroup) : p.q_tokens;
    }
    p.scratch_words = route_scratch_words(p);
    p.scratch_blocks = std::min(tasks, std::clamp(kScratchWords / p.scratch_words, kFewestBlocks, kMostBlocks));
    // Bytes: numbers of several types lie there.
    p.scratch =
        static_cast<int32_t*>(call.write(call.empty({p.scratch_blocks, p.scratch_words * 4}, ScalarType::Char)));
  }

  // On tensor cores: decided by types, widths and what lists hold, never by the number of tokens, so that padding
  // changes no bit.
  void set_tile() {
    if (p.has_sketches() || query.element_size() > 2 || p.head_dim % 8 || p.head_dim == 0 || p.head_dim > kWidest)
      return;
    if (p.block_k == 1) {
      // Leaves of a row that is not long, or of the kept superblocks and one more; kept leaves and those of the group.
      const int64_t kept = candidate_blocks(a.keys), tail = p.is_causal ? kGroup * p.block_q / kLeaf + 2 : 0,
                    rows = std::max({kLongRow / kLeaf / 32, ceil_div((2 * kept + 1) * kSuper, 32), kept + tail});
      if (rows > kMostRouteRows || (p.has_clusters() && p.rank > 32 * rows)) return;
      p.tile_rows = rows;
      if (!route_tile_fits(p, element_of(query))) {
        p.tile_rows = 0;
        return;
      }
      // Kernels reach the 32 keys of a leaf by offsets of 32 bits.
      p.k = call.read_aligned_rows(key.stride(2) < int64_t(1) << 30 ? key : Call::contiguous(key));
      p.key_numbers = floats({p.batch, p.kv_heads, p.fine_runs, p.key_columns(), 32});
      if (p.has_clusters()) p.cluster_parts = parts({p.batch, p.kv_heads, p.rank, 3, p.head_dim});
    } else {
      // A turn takes up as many superblocks or blocks as it keeps of those before, or more, so that turns are few.
      if (candidate_superblocks(a.keys, a.window, a.pools) > 32 * kMostRouteRows / 4) return;
      p.tile_rows = kMostRouteRows;
    }
    for (int level = 0; level < (p.block_k == 1 && p.k_tokens < kLongRow ? 1 : 2); ++level) {
      const int64_t runs = (level ? p.coarse_runs : p.fine_runs) * p.groups_of_run();
      p.run_numbers[level] = floats({p.batch, p.kv_heads, ceil_div(runs, 32), p.run_columns(), 32});
      p.run_parts[level] = parts({p.batch, p.kv_heads, runs, 3, p.head_dim});
    }
  }

  Bfloat16* parts(std::initializer_list<int64_t> sizes) {
    return static_cast<Bfloat16*>(call.write(call.empty(sizes, ScalarType::BFloat16)));
  }
  float* floats(std::initializer_list<int64_t> sizes) {
    return static_cast<float*>(call.write(call.empty(sizes, ScalarType::Float)));
  }

  const RouteArguments& a;
  const Tensor query, key;
  Call call;
  RoutingParams p{};
  RowsParams row_params{};
};

}  // namespace

std::tuple<Tensor, Tensor> route(const RouteArguments& a) { return Route(a).run(); }

}  // namespace sb::cuda

#include "attention_call.h"

#include <algorithm>

#include "../error.h"
#include "../math/low_rank_kernels.h"
#include "../tensor_traits.h"

namespace sb::cuda {

AttentionCall::AttentionCall(const AttentionArguments& a, bool is_forward, bool by_tiles)
    : a(a),
      call(a.query),
      by_tiles(by_tiles),
      has_few_queries(is_forward && a.query.size(2) <= kByKeyQueries),
      map_dtype(accumulation_type(a.query)),
      is_wide(map_dtype == ScalarType::Double || a.query.size(3) < kNarrowHead),
      dtype(is_wide ? ScalarType::Double : ScalarType::Float) {
  set_shape(), set_lists();
  if (p.has_low_rank() && !is_wide) set_flags();
  set_rows();
  set_low_rank(p, is_wide);
}

void AttentionCall::set_shape() {
  const Tensor &q = a.query, &k = a.key, &v = a.value;
  p.batch = q.size(0), p.q_heads = q.size(1), p.q_tokens = q.size(2), p.head_dim = p.head_pad = q.size(3);
  p.kv_heads = k.size(1), p.k_tokens = k.size(2), p.value_pad = v.size(3);
  SB_CHECK(p.head_dim <= kWidest && p.value_pad <= kWidest, "attention: expected query, key and value at most ",
           kWidest, " wide on a CUDA device, got ", p.head_dim, " and ", p.value_pad,
           "; use more heads, or move the tensors to the CPU");
  p.low_rank = static_cast<LowRank>(a.low_rank), p.is_causal = a.is_causal, p.scale = a.scale;
  const auto rows_of = [&](const Tensor& t) { return by_tiles ? call.read_aligned_rows(t) : call.read_rows(t); };
  p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v);
  p.fallback_bound = is_wide && map_dtype != ScalarType::Double ? kFallbackBoundInDouble : kFallbackBound;
  p.segment = p.is_causal ? kChunk : kSegment, p.slots = ceil_div(p.k_tokens, p.segment) + 1;
  p.has_one_state = has_few_queries && p.is_causal;
  p.state_segment = p.has_one_state ? kSegment : p.segment, p.state_slots = ceil_div(p.k_tokens, p.state_segment) + 1;
}

void AttentionCall::set_lists() {
  p.block_q = a.block_q, p.block_k = a.block_k, p.blocks = ceil_div(p.q_tokens, p.block_q);
  if (a.index) {
    p.index = call.read_contiguous<int32_t>(a.index), p.count = call.read_contiguous<int32_t>(a.count);
    p.list_heads = a.index->size(1), p.capacity = a.index->size(3);
  }
  if (a.span) {
    p.span = call.read_contiguous<int32_t>(a.span), p.span_batch = a.span->size(0) == 1 ? 0 : p.blocks * 2;
    p.span_keys = a.span_keys, p.span_sinks = std::min(a.span_sinks, p.k_tokens);
  }
  p.longest_list = p.span_keys + p.span_sinks + p.capacity * std::min(p.block_k, p.k_tokens);
  if (a.query_order) p.order = call.read_contiguous<int32_t>(a.query_order), p.order_heads = a.query_order->size(1);
}

void AttentionCall::set_rows() {
  RowsParams& r = row_params;
  r.batch = p.batch, r.q_tokens = p.q_tokens, r.k_tokens = p.k_tokens, r.segment = p.segment, r.slots = p.slots;
  r.q_range = call.read_contiguous<int32_t>(a.query_range), r.k_range = call.read_contiguous<int32_t>(a.key_range);
  r.offset = call.read_contiguous<int32_t>(a.query_offset);
  p.q_mask = call.read_contiguous<uint8_t>(a.query_mask);
  p.k_mask = r.k_mask = call.read_contiguous<uint8_t>(a.key_mask);
  static_assert(sizeof(RowRange) == 5 * sizeof(int32_t));
  p.rows = r.rows = static_cast<RowRange*>(room({p.batch, 5}, ScalarType::Int));
  if (!p.has_low_rank()) return;
  p.valid_before = r.valid_before = static_cast<int32_t*>(room({p.batch, p.slots}, ScalarType::Int));
  if (p.k_mask) p.valid_keys = r.valid_keys = static_cast<int32_t*>(room({p.batch, p.k_tokens}, ScalarType::Int));
}

// Flagged queries are computed again in float64, with states of their own, so that time stays linear.
void AttentionCall::set_flags() {
  p.flags = static_cast<uint8_t*>(room({p.batch, p.q_heads, p.q_tokens}, ScalarType::Byte));
  p.any_flagged = row_params.any_flagged = static_cast<uint8_t*>(room({p.batch, p.kv_heads}, ScalarType::Byte));
  row_params.kv_heads = p.kv_heads;
}

void AttentionCall::set_low_rank(ForwardParams& p, bool in_double) {
  if (!p.has_low_rank()) return;
  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  if (p.has_clusters()) {
    p.rank = a.representatives->size(2);
    p.cluster = call.read_contiguous<int32_t>(a.cluster_index);
    p.log_mass = call.read_contiguous<void>(a.log_mass);
    p.given_representatives = call.read_contiguous<void>(a.representatives);
    p.cluster_log = room({p.batch, p.kv_heads, p.rank}, dtype);
    p.cluster_limit = in_double ? map_limits<double>(p.low_rank).log : map_limits<float>(p.low_rank).log;
  } else {
    p.rank = a.packed_rank ? a.packed_rank : a.query_map->size(3) - 1;
    p.x_map = map_view(*a.query_map, in_double), p.y_map = map_view(*a.key_map, in_double);
  }
  p.features = feature_count(p.low_rank, p.rank), p.slot_size = p.features * (p.value_pad + 1);
  p.kv_state = nullptr;
  // Without tiles few queries sum every key by itself.
  if (has_few_queries && p.has_maps() && (in_double || !by_tiles)) return;
  if (p.has_products() && a.value.element_size() == 2 && !in_double && !by_tiles) p.v = call.read_aligned_rows(a.value);
  p.kv_state = room({p.batch, p.kv_heads, p.state_slots, p.slot_size}, dtype);
  p.segment_log = room({p.batch, p.kv_heads, p.state_slots, p.logs_of_state()}, dtype);
  p.state_log = room({p.batch, p.kv_heads, p.state_slots}, dtype);
}

void AttentionCall::make_states(ForwardParams& p, bool in_double) {
  if (!p.kv_state) return;
  if (in_double && p.has_maps()) {
    set_held_keys(p);
    launch_held_keys(p, element(), call.stream());
  }
  launch_states(p, element(), in_double, call.stream());
}

// States in float64, which the last queries that lose precision read, hold keys out.
void AttentionCall::set_held_keys(ForwardParams& p) {
  const auto integers = [&](std::initializer_list<int64_t> sizes) {
    return static_cast<int32_t*>(room(sizes, ScalarType::Int));
  };
  const int64_t longest = p.span_keys + p.span_sinks + p.capacity * p.block_k;
  p.most_held = std::clamp(longest, kLeastHeld, kMostHeld);
  p.weight_log = static_cast<double*>(room({p.batch, p.kv_heads, p.k_tokens}, ScalarType::Double));
  p.first_slot = integers({p.batch, p.kv_heads, p.k_tokens});
  p.held_keys = integers({p.batch, p.kv_heads, p.held_slots(), p.most_held});
  p.held_counts = integers({p.batch, p.kv_heads, p.held_slots()});
  if (!p.is_causal) return;
  p.late_keys = integers({p.batch, p.kv_heads, p.slots, p.most_held + kChunk});
  p.late_counts = integers({p.batch, p.kv_heads, p.slots});
}

MapView AttentionCall::map_view(const Tensor& map, bool in_double) {
  MapView view{};
  view.data = call.read(map), view.batch = map.stride(0), view.head = map.stride(1), view.row = map.stride(2);
  view.step = map.stride(3);
  view.log_column = a.packed_rank ? p.rank + 1 : p.rank, view.log_factor = a.packed_rank ? 1 : kLog2e;
  if (in_double) {
    const MapLimits<double> limits = map_limits<double>(p.low_rank);
    view.coordinate_limit = limits.coordinate, view.log_limit = limits.log;
  } else {
    const MapLimits<float> limits = map_limits<float>(p.low_rank);
    view.coordinate_limit = limits.coordinate, view.log_limit = limits.log;
  }
  return view;
}

}  // namespace sb::cuda

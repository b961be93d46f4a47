// Launcher of the backward pass: the forward pass again, which leaves a record of every query slot, then queries, on
// tensor cores both at once; then states and keys (docs/gpu.md). Nothing waits for the device.
#include <algorithm>

#include "attention_backward_tile.h"
#include "attention_call.h"
#include "attention_tile.h"
#include "launchers.h"

namespace sb::cuda {
namespace {

class Backward : AttentionCall {
 public:
  Backward(const AttentionArguments& a, const Tensor& d_out, const MaybeTensor& d_lse)
      : AttentionCall(a),
        by_tiles(fits_backward_tiles(a)),
        dq(gradient_of(a.query)),
        dk(gradient_of(a.key)),
        dv(gradient_of(a.value)),
        d_query_map(gradient_of_map(p.q_heads, a.query_weight ? 0 : p.q_tokens)),
        d_key_map(gradient_of_map(p.kv_heads, a.key_weight ? 0 : p.k_tokens)) {
    if (by_tiles)
      p.q = call.read_aligned_rows(a.query), p.k = call.read_aligned_rows(a.key), p.v = call.read_aligned_rows(a.value);
    static_cast<ForwardParams&>(params) = p;
    BackwardParams& b = params;
    b.d_out = by_tiles ? call.read_aligned_rows(d_out) : call.read_rows(d_out);
    if (d_lse) b.d_lse = call.read(Call::contiguous(*d_lse));
    b.dq = call.write_rows(dq), b.dk = call.write_rows(dk), b.dv = call.write_rows(dv);
    b.d_query_map = call.write_rows(d_query_map);
    b.query_weight = weight_of(a.query_weight), b.key_weight = weight_of(a.key_weight);
    set_transposed();
    b.dk_sum = room({p.batch, p.kv_heads, p.k_tokens, p.head_dim}, map_dtype);
    b.dv_sum = room({p.batch, p.kv_heads, p.k_tokens, p.value_pad}, map_dtype);
    if (p.has_maps())
      b.dy_sum = a.key_weight ? room({p.batch, p.kv_heads, p.k_tokens, p.rank + 1}, map_dtype) : call.write(d_key_map);
    if (p.has_clusters()) {
      b.dy_sum = room({p.batch, p.kv_heads, p.k_tokens}, map_dtype);
      b.d_representatives = room({p.batch, p.kv_heads, p.rank, p.head_dim}, map_dtype);
      b.query_mean = call.read_contiguous<void>(a.query_mean);
    }
    if (p.has_low_rank()) {
      b.by_key = static_cast<int32_t*>(room({p.batch, p.q_heads, p.q_tokens}, ScalarType::Int));
      b.by_key_count = static_cast<int32_t*>(room({p.batch, p.q_heads}, ScalarType::Int));
      b.query_segments = p.is_causal ? p.slots : std::max<int64_t>(1, ceil_div(p.q_tokens, kSegment));
    }
  }

  Gradients run() {
    for (Tensor zeroed : {dq, d_query_map, d_key_map}) torch::stable::zero_(zeroed);  // of what is ignored
    launch_rows(row_params, call.stream());
    launch_transposed_lists(params, call.stream());
    compute(params, is_wide);
    if (params.flags) compute(of_flagged(params), true);
    if (params.has_clusters()) launch_share_representatives(params, element(), is_wide, call.stream());
    launch_finish_keys(params, element(), is_wide, call.stream());
    return {dq, dk, dv, d_query_map, d_key_map};
  }

 private:
  void compute(BackwardParams of, bool in_double) {
    const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
    of.records = room({p.batch, p.q_heads, p.q_tokens, 5}, dtype);
    static_assert(sizeof(SlotRecord<float>) == 5 * sizeof(float) && sizeof(SlotRecord<double>) == 5 * sizeof(double));
    Tensor kinds = call.empty({p.batch, p.q_heads, p.q_tokens}, ScalarType::Int);
    torch::stable::zero_(kinds);  // SlotKind::kNone
    of.kinds = static_cast<SlotKind*>(call.write(kinds));
    if (of.has_low_rank()) {
      of.d_kv_state = room({p.batch, p.q_heads, of.query_segments, of.slot_size}, dtype);
      if (of.has_clusters()) {
        of.d_exponent = room({p.batch, p.q_heads, p.q_tokens, p.rank}, dtype);
        of.d_representative_parts =
            room({p.batch, p.q_heads, ceil_div(p.q_tokens, kSegment), p.rank, p.head_dim}, dtype);
      }
    }
    make_states(of, in_double);
    if (by_tiles && !in_double) {
      const TileParams operands = tile_params(of, call);
      launch_tile_operands(operands, element(), call.stream());
      launch_attention_backward_tile(backward_tile_params(of, operands, call), element(), call.stream());
    } else {
      launch_attention_forward(of, element(), in_double, call.stream());
      launch_backward_queries(of, element(), in_double, call.stream());
    }
    if (of.has_low_rank()) {
      launch_collect_by_key(of, call.stream());
      launch_state_gradients(of, element(), in_double, call.stream());
    }
    launch_backward_keys(of, element(), in_double, call.stream());
  }

  Tensor gradient_of(const Tensor& tokens) const { return call.empty_like_tokens(tokens, tokens.size(3)); }
  // Without rows where there is no map, and where its gradient goes on through the projection.
  Tensor gradient_of_map(int64_t heads, int64_t rows) const {
    return call.empty({p.batch, heads, p.has_maps() ? rows : 0, p.has_maps() ? p.rank + 1 : 1}, map_dtype);
  }
  MapWeight weight_of(const MaybeTensor& weight) {
    if (!weight) return {};
    return {call.read_contiguous<void>(weight),
            weight->size(0) == 1 ? 0 : weight->size(1) * weight->size(2) * weight->size(3), weight->size(1)};
  }

  void set_transposed() {
    if (p.span) {
      // Runs so long that a span touches few of them. Padding has no say in their length, which decides what is added
      // up together.
      const int64_t width = std::max(kChunk, ceil_div(p.span_keys, 4));
      params.of_span = transposed(1, width, ceil_div(std::min(p.span_keys, p.k_tokens), width) + 1);
    }
    if (p.index) params.of_index = transposed(p.list_heads, p.block_k, p.capacity);
  }
  // Of lists that have at most `capacity` entries of `width` keys. Parts of the blocks are walked at once, as many as
  // cursors stay no more than entries.
  TransposedLists transposed(int64_t heads, int64_t width, int64_t capacity) {
    TransposedLists t{};
    t.heads = heads, t.width = width, t.entries = ceil_div(p.k_tokens, width), t.room = p.blocks * capacity;
    if (t.entries == 0) return t;
    t.part = ceil_div(std::max<int64_t>(p.blocks, 1), std::clamp<int64_t>(t.room / t.entries, 1, 32));
    t.parts = std::max<int64_t>(1, ceil_div(p.blocks, t.part));
    t.cursor = static_cast<int32_t*>(room({p.batch, heads, t.entries, t.parts}, ScalarType::Int));
    t.blocks = static_cast<int32_t*>(room({p.batch, heads, t.room}, ScalarType::Int));
    return t;
  }

  const bool by_tiles;  // queries on tensor cores
  const Tensor dq, dk, dv, d_query_map, d_key_map;
  BackwardParams params{};
};

}  // namespace

// What the forward pass left is not needed: out and lse are found again, in the type of sums.
Gradients attention_backward(const AttentionArguments& a, const Tensor&, const Tensor&, const Tensor& d_out,
                             const MaybeTensor& d_lse) {
  return Backward(a, d_out, d_lse).run();
}

}  // namespace sb::cuda

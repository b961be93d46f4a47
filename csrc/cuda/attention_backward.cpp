// Launcher of the backward pass: the forward pass again, which leaves a record of every query slot, then queries, on
// tensor cores both at once; then states and keys (docs/gpu.md). Nothing waits for the device.
#include <algorithm>

#include "../error.h"
#include "attention_backward_shares.h"
#include "attention_backward_tile.h"
#include "attention_call.h"
#include "attention_tile.h"
#include "launchers.h"
#include "transposed_lists.h"

namespace sb::cuda {
namespace {

class Backward : AttentionCall {
 public:
  Backward(const AttentionArguments& a, const Tensor& d_out, const MaybeTensor& d_lse)
      : AttentionCall(a, false, fits_backward_tiles(a)),
        keys_by_tiles(fits_backward_tiles_of_keys(a)),
        by_shares(fits_backward_shares(a)),
        dq(gradient_of(a.query)),
        dk(gradient_of(a.key)),
        dv(gradient_of(a.value)),
        d_query_map(gradient_of_map(p.q_heads, a.query_weight ? 0 : p.q_tokens)),
        d_key_map(gradient_of_map(p.kv_heads, a.key_weight ? 0 : p.k_tokens)) {
    const bool by_products = a.query.element_size() == 2 && p.has_query_products();
    if (by_products && p.has_clusters() && !by_tiles) p.q = call.read_aligned_rows(a.query);
    static_cast<ForwardParams&>(params) = p;
    BackwardParams& b = params;
    const Tensor d_rows = Call::converted(d_out, a.query.scalar_type());
    b.d_out = by_tiles || by_products ? call.read_aligned_rows(d_rows) : call.read_rows(d_rows);
    b.d_lse = call.read_contiguous<void>(d_lse);
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
  bool is_float() const { return element() == Element::kFloat; }

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
        if (!in_double && (by_tiles || (a.query.element_size() == 2 && of.has_query_products())))
          of.cluster_scores = static_cast<float*>(room({p.batch, p.q_heads, p.q_tokens, p.rank}, ScalarType::Float));
        of.d_exponent = room({p.batch, p.q_heads, p.q_tokens, p.rank}, dtype);
        of.d_representative_parts =
            room({p.batch, p.q_heads, ceil_div(p.q_tokens, kSegment), p.rank, p.head_dim}, dtype);
      }
    }
    of.slots_per_state = by_tiles && !in_double ? kTile : 1;
    make_states(of, in_double);
    TileParams operands{};
    if (by_tiles && !in_double) {
      operands = tile_params(of, a, call, false);
      launch_tile_operands(operands, element(), call.stream());
      const BackwardTileParams tiles = backward_tile_params(of, operands, element(), call);
      if (is_float()) {
        launch_float_attention_backward_tile(tiles, call.stream());
      } else {
        launch_backward_tile_operands(tiles, call.stream());
        (of.is_ragged() ? launch_ragged_attention_backward_tile : launch_attention_backward_tile)(tiles, element(),
                                                                                                  call.stream());
      }
    } else {
      launch_attention_forward(of, element(), in_double, call.stream());
      launch_backward_queries(of, element(), in_double, call.stream());
    }
    if (of.has_low_rank()) {
      launch_collect_by_key(of, call.stream());
      launch_state_gradients(of, element(), in_double, call.stream());
    }
    compute_keys(of, operands, in_double);
  }

  // Those of windows and of the state, then pairs of listed blocks.
  void compute_keys(BackwardParams of, const TileParams& operands, bool in_double) {
    of.adds_listed_blocks = keys_by_tiles && !in_double;
    of.leaves_listed_blocks = by_shares && !in_double;
    if (of.adds_listed_blocks) {
      const BackwardTileKeysParams tiles = backward_tile_keys_params(of, operands, call);
      // Without queries there are no rows of theirs.
      if (!is_float() || tiles.query_rows) launch_backward_tile_keys_operands(tiles, call.stream());
      if (is_float())
        launch_float_attention_backward_tile_keys(tiles, call.stream());
      else
        (tiles.has_ragged_stages() ? launch_ragged_attention_backward_tile_keys : launch_attention_backward_tile_keys)(
            tiles, element(), call.stream());
    }
    const bool has_others = of.adds_listed_blocks ? of.index && !of.leaves_listed_blocks
                                                  : of.has_low_rank() || of.span || !of.leaves_listed_blocks;
    if (has_others) launch_backward_keys(of, element(), in_double, call.stream());
    if (!of.leaves_listed_blocks) return;
    const bool has_sums = of.adds_listed_blocks || has_others;
    add_shares(of, operands, has_sums, element(), call);
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
      const int64_t touched = ceil_div(std::min(p.span_keys, p.k_tokens), kChunk) + 1;  // runs, by a span, at most
      TransposedLists t{};
      t.heads = t.levels = t.first = 1, t.width = kChunk;
      while (int64_t(1) << t.levels <= touched) ++t.levels;
      while (t.first * kChunk < p.k_tokens) t.first *= 2;
      t.entries = p.k_tokens ? 2 * t.first : 0;
      params.of_span = with_room(t, p, std::min(touched, 2 * t.levels), false, call);
    }
    // Not where unions take their place, and no query is computed again.
    if (p.index && (!by_shares || has_shared_lists(a) || p.has_low_rank())) {
      TransposedLists t{};
      t.heads = p.list_heads, t.levels = 1, t.width = p.block_k, t.entries = ceil_div(p.k_tokens, p.block_k);
      params.of_index = with_room(t, p, p.capacity, by_shares && has_shared_lists(a), call);
    }
  }

  const bool keys_by_tiles, by_shares;  // keys, and pairs of listed blocks, on tensor cores; queries are if by_tiles
  const Tensor dq, dk, dv, d_query_map, d_key_map;
  BackwardParams params{};
};

// Which blocks of queries name a key is counted in 32 bits.
void check_size_of_lists(const AttentionArguments& a) {
  const int64_t entries = a.index ? ceil_div(a.query.size(2), a.block_q) * a.index->size(3) : 0;
  SB_CHECK(entries < int64_t(1) << 31,
           "attention_backward: expected lists of fewer than 2^31 entries for the queries of "
           "a head on a CUDA device, got ",
           entries, " (query blocks x capacity); use shorter lists or larger blocks");
}

}  // namespace

// What the forward pass left is not needed: out and lse are found again, in the type of sums.
Gradients attention_backward(const AttentionArguments& a, const Tensor&, const Tensor&, const Tensor& d_out,
                             const MaybeTensor& d_lse) {
  check_size_of_lists(a);
  return Backward(a, d_out, d_lse).run();
}

}  // namespace sb::cuda

#include "attention_backward_shares.h"

#include <algorithm>

#include "../error.h"
#include "attention_backward_tile.h"
#include "attention_tile.h"
#include "kernels.h"
#include "transposed_lists.h"

namespace sb::cuda {
namespace {

// Of the shares of a round, where those of a single tile and one for every key are not more: so that keys are looked at
// no more often than they are listed.
constexpr int64_t kBytesOfRound = 64 << 20;

// Puts unions in place of the lists, one for every tile, and transposes them.
void make_unions(BackwardSharesParams& p, Call& call) {
  const int64_t of_tile = kTile % p.block_q == 0 ? kTile / p.block_q : ceil_div(kTile - 1, p.block_q) + 1,
                entries = ceil_div(p.k_tokens, p.block_k);
  UnionListsParams u{};
  static_cast<ForwardParams&>(u) = p;
  u.tiles = p.tiles(), u.most = std::min(of_tile * p.capacity, entries);
  SB_CHECK(u.tiles * u.most < int64_t(1) << 31,
           "attention_backward: expected lists of fewer than 2^31 entries, merged by 16 queries, for the queries of a "
           "head on a CUDA device, got ",
           u.tiles * u.most, "; use shorter lists, or blocks of a multiple of 16 queries");
  const auto integers = [&](std::initializer_list<int64_t> sizes) {
    return static_cast<int32_t*>(call.write(call.empty(sizes, ScalarType::Int)));
  };
  u.entries = integers({p.batch, p.list_heads, u.tiles, u.most});
  u.slots_of_entries = integers({p.batch, p.list_heads, u.tiles, u.most});
  u.counts = integers({p.batch, p.list_heads, u.tiles});
  launch_union_lists(u, call.stream());
  p.index = u.entries, p.count = u.counts, p.slots_of_entries = u.slots_of_entries;
  p.capacity = u.most, p.block_q = kTile, p.blocks = u.tiles;
  TransposedLists t{};
  t.heads = p.list_heads, t.levels = 1, t.width = p.block_k, t.entries = entries;
  p.of_index = with_room(t, p, p.capacity, true, call), p.of_span = {};
  launch_transposed_lists(p, call.stream());
}

}  // namespace

bool fits_backward_shares(const AttentionArguments& a) {
  return a.index && a.index->numel() > 0 && fits_backward_tiles(a);
}
bool has_shared_lists(const AttentionArguments& a) { return a.block_q % kTile == 0; }

void add_shares(const BackwardParams& of_call, const TileParams& operands, bool has_sums, Element element, Call& call) {
  BackwardSharesParams p{};
  static_cast<BackwardParams&>(p) = of_call;
  p.head_steps = ceil_div(p.head_dim, 16), p.value_steps = ceil_div(p.value_pad, 16);
  p.key_log = operands.key_log, p.key_coordinates = operands.key_coordinates, p.key_rows = operands.key_rows;
  p.is_float = element == Element::kFloat, p.has_sums = has_sums;
  p.by_groups = operands.by_groups, p.span_queries = p.block_q;
  if (p.block_q % kTile != 0) make_unions(p, call);
  p.keys_of_list = p.capacity * std::min(p.block_k, p.k_tokens);
  p.share_words = p.words_of_keys() + p.words_of(p.value_pad);
  p.factors = p.is_float ? 0 : 2;
  p.numbers = p.factors + (p.has_maps() ? p.rank + 1 : p.has_clusters() ? 1 : 0);
  const int64_t all = p.batch * p.q_heads * p.tiles(), bytes = 4 * (p.share_words + p.numbers),
                of_tile = std::max<int64_t>(1, p.keys_of_list * bytes),
                most = std::max<int64_t>(1, std::max(kBytesOfRound, p.k_tokens * bytes) / of_tile),
                rounds = std::max<int64_t>(1, ceil_div(all, most));
  p.round_tiles = ceil_div(all, rounds);
  p.shares = static_cast<uint32_t*>(
      call.write(p.is_float ? call.empty({p.round_tiles, p.keys_of_list, p.share_words}, ScalarType::Float)
                            : call.empty({p.round_tiles, p.keys_of_list, p.share_words, 2}, ScalarType::Short)));
  p.share_numbers =
      static_cast<float*>(call.write(call.empty({p.round_tiles, p.keys_of_list, p.numbers}, ScalarType::Float)));
  if (p.is_float) return launch_float_attention_backward_shares(p, call.stream());
  (p.is_causal || p.slots_of_entries ? launch_ragged_attention_backward_shares : launch_attention_backward_shares)(
      p, element, call.stream());
}

}  // namespace sb::cuda

#include "attention_backward_shares.h"

#include <algorithm>

#include "attention_tile.h"

namespace sb::cuda {
namespace {

// Of the shares of a round, where those of a single tile and one for every key are not more: so that keys are looked at
// no more often than they are listed.
constexpr int64_t kBytesOfRound = 64 << 20;

}  // namespace

bool fits_backward_shares(const AttentionArguments& a) {
  return a.index && a.index->numel() > 0 && !a.is_causal && a.block_q % 16 == 0 && fits_tiles(a);
}

BackwardSharesParams backward_shares_params(const BackwardParams& of_call, const TileParams& operands, bool has_sums,
                                            Call& call) {
  BackwardSharesParams p{};
  static_cast<BackwardParams&>(p) = of_call;
  p.head_steps = ceil_div(p.head_dim, 16), p.value_steps = ceil_div(p.value_pad, 16);
  p.key_log = operands.key_log, p.key_coordinates = operands.key_coordinates, p.has_sums = has_sums;
  p.longest_list = p.capacity * std::min(p.block_k, p.k_tokens);
  p.share_words = share_words(p.head_dim) + share_words(p.value_pad);
  p.numbers = 2 + (p.has_maps() ? p.rank + 1 : p.has_clusters() ? 1 : 0);
  const int64_t all = p.batch * p.q_heads * p.tiles(), bytes = 4 * (p.share_words + p.numbers),
                of_tile = std::max<int64_t>(1, p.longest_list * bytes),
                most = std::max<int64_t>(1, std::max(kBytesOfRound, p.k_tokens * bytes) / of_tile),
                rounds = std::max<int64_t>(1, ceil_div(all, most));
  p.round_tiles = ceil_div(all, rounds);
  p.shares = static_cast<uint32_t*>(
      call.write(call.empty({p.round_tiles, p.longest_list, p.share_words, 2}, ScalarType::Short)));
  p.share_numbers =
      static_cast<float*>(call.write(call.empty({p.round_tiles, p.longest_list, p.numbers}, ScalarType::Float)));
  return p;
}

}  // namespace sb::cuda

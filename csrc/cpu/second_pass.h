// Queries beyond kFallbackBound are computed again: the first of a head key by key (kByKeyKeys), others in float64,
// where the same launcher runs on a call of one head in which every other query is masked.
#pragma once
#include <algorithm>
#include <cstring>

#include "../math/edges.h"
#include "attention_call.h"

namespace sb::cpu {

// The flags that AttentionParams::needs_again points at. A call in float64 has none.
template <class T>
class SecondPass {
 public:
  explicit SecondPass(AttentionParams& p) : p(p) {
    if (std::is_same_v<T, double> || !p.has_low_rank()) return;
    flags.resize(size_t(p.batch * p.q_heads * p.q_tokens));
    p.needs_again = flags.data();
  }

  // Whether any query is flagged.
  bool any() const { return !flags.empty() && std::memchr(flags.data(), 1, flags.size()); }

  // Takes the queries of head h of batch row b that are to be summed by key, and calls visit with the parameters of a
  // call in which all others are masked.
  template <class Visit>
  void by_key(int64_t b, int64_t h, const Visit& visit) {
    uint8_t* of_row = flags_of(b * p.q_heads + h);
    if (!of_row) return;
    const RowRange& range = p.rows[b];
    std::vector<uint8_t> mask(size_t(p.q_tokens), 1);
    const auto are_few = [](int64_t together, int64_t own) { return together <= kByKeyPairs + kByKeyKeys * own; };
    const int64_t all_keys = range.k_end - range.k_first;
    if (!p.is_causal && !are_few(std::count(of_row, of_row + p.q_tokens, 1) * all_keys, all_keys)) return;
    int64_t taken = 0;
    for (int64_t i = 0; i < p.q_tokens; ++i) {
      if (!of_row[i]) continue;
      const int64_t keys = edge_of_slot(p, range, i - range.q_first) + 1;
      if (!are_few(taken + keys, keys)) continue;
      taken += keys, mask[size_t(i)] = 0, of_row[i] = 0;
    }
    AttentionParams again = p;
    again.q_mask = mask.data() - b * p.q_tokens;
    again.sums_by_key = true, again.needs_again = nullptr, again.scores = nullptr;
    visit(again);
  }
  // Calls visit(b, h, flags of the N queries) for every head with queries that are left, in order.
  template <class Visit>
  void in_double(const Visit& visit) {
    for (int64_t row = 0; row < p.batch * p.q_heads; ++row)
      if (const uint8_t* of_row = flags_of(row)) visit(row / p.q_heads, row % p.q_heads, of_row);
  }

 private:
  // Null where no query of the head is flagged.
  uint8_t* flags_of(int64_t row) {
    uint8_t* of_row = flags.empty() ? nullptr : flags.data() + row * p.q_tokens;
    return of_row && std::memchr(of_row, 1, size_t(p.q_tokens)) ? of_row : nullptr;
  }

  const AttentionParams& p;
  std::vector<uint8_t> flags;
};

// The arguments of query head h of batch row b alone, with all queries masked but the flagged ones.
AttentionArguments one_head(const AttentionArguments& a, int64_t b, int64_t h, const uint8_t* flags);

// t[b, h] as (1, 1, ...), of any tensor that leads with batch and heads.
Tensor head_of(Tensor t, int64_t b, int64_t h);

}  // namespace sb::cpu

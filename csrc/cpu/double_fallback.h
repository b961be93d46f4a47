// Queries beyond kFallbackBound are recomputed in float64: the same launcher runs on a call of one head in which every
// other query is masked.
#pragma once
#include <cstring>

#include "attention_call.h"

namespace sb::cpu {

// The queries to recompute: the flags that AttentionParams::cancelled points at. A call in float64 has none.
template <class T>
class DoubleFallback {
 public:
  explicit DoubleFallback(AttentionParams& p) : heads(p.q_heads), tokens(p.q_tokens) {
    if (std::is_same_v<T, double> || !p.has_low_rank()) return;
    flags.resize(size_t(p.batch * heads * tokens));
    p.needs_double = flags.data();
  }

  // Calls visit(b, h, flags of the N queries) for every head with a query to recompute, in order.
  template <class Visit>
  void for_each_head(const Visit& visit) const {
    for (int64_t row = 0; row * tokens < int64_t(flags.size()); ++row) {
      const uint8_t* of_row = flags.data() + row * tokens;
      if (std::memchr(of_row, 1, size_t(tokens))) visit(row / heads, row % heads, of_row);
    }
  }

 private:
  std::vector<uint8_t> flags;
  int64_t heads, tokens;
};

// The arguments of query head h of batch row b alone, with all queries masked but the flagged ones.
AttentionArguments one_head(const AttentionArguments& a, int64_t b, int64_t h, const uint8_t* flags);

// t[b, h] as (1, 1, ...), of any tensor that leads with batch and heads.
Tensor head_of(Tensor t, int64_t b, int64_t h);

}  // namespace sb::cpu

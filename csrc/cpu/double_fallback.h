// Queries whose complement cancels (kFallbackBound) are evaluated again in double, head by head: the same launcher on a
// call that holds one head and in which every other query is masked. The first call leaves them out.
#pragma once
#include "attention_call.h"

namespace sb {

// The bytes of AttentionParams::cancelled for a call in float; a call in double has none.
template <class T>
class CancelledQueries {
 public:
  explicit CancelledQueries(AttentionParams& p);

  // Calls visit(b, h, flags of the N queries) for every head that has such a query, in order.
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

// The arguments of query head h of batch row b alone, all queries masked but those flagged.
AttentionArguments one_head(const AttentionArguments& a, int64_t b, int64_t h, const uint8_t* flags);

// t[b, h] as (1, 1, ...), of any tensor that leads with batch and heads.
Tensor head_of(Tensor t, int64_t b, int64_t h);

}  // namespace sb

#include "block_lists.h"

#include "../error.h"
#include "allocation.h"
#include "parallel.h"

#include <vector>

namespace sb::cpu {
namespace {

// Entries of every list ascend, and name key blocks of the row's valid range that the block's last query sees.
void check_index(const AttentionParams& p) {
  for (int64_t row = 0; row < p.batch * p.list_heads * p.blocks; ++row) {
    const RowRange& range = p.rows[row / (p.list_heads * p.blocks)];
    const int64_t used = p.count[row], key_blocks = ceil_div(range.k_end - range.k_first, p.block_k),
                  block = row % p.blocks;
    SB_CHECK(used >= 0 && used <= p.capacity, "attention: count must be between 0 and the capacity ", p.capacity,
             ", got ", used);
    const int32_t* entry = p.index + row * p.capacity;
    // One pass without branches; only a wrong list is read again, to say what is wrong.
    bool wrong = used > 0 && (entry[0] < 0 || entry[used - 1] >= key_blocks);
    for (int64_t i = 1; i < used; ++i) wrong |= entry[i - 1] >= entry[i];
    for (int64_t i = 0; wrong && i < used; ++i) {
      SB_CHECK(entry[i] >= 0 && entry[i] < key_blocks, "attention: index names key block ", entry[i], " of ",
               key_blocks, " (blocks of ", p.block_k, " keys)");
      SB_CHECK(i == 0 || entry[i - 1] < entry[i], "attention: each list of index must be strictly ascending, got ",
               entry[std::max<int64_t>(i, 1) - 1], " before ", entry[i]);
    }
    if (p.is_causal && used > 0) {
      const int64_t last_query = std::min<int64_t>(range.q_first + (block + 1) * p.block_q, range.q_end) - 1;
      SB_CHECK(range.k_first + int64_t(entry[used - 1]) * p.block_k <= last_query + range.offset,
               "attention: index of query block ", block,
               " lists a key block after the block's last query, which causal attention must not see");
    }
  }
}

// Every row of the order names each query at most once: two slots of one query would write its results, and add up its
// gradients, at the same time.
void check_order(const AttentionParams& p) {
  std::vector<int64_t> last_row(size_t(p.q_tokens), -1);  // that named the query
  for (int64_t row = 0; row < p.batch * p.order_heads; ++row)
    for (int64_t slot = 0; slot < p.q_tokens; ++slot) {
      const int64_t query = p.order[row * p.q_tokens + slot];
      SB_CHECK(query >= -1 && query < p.q_tokens, "attention: query_order names query ", query, " of ", p.q_tokens);
      if (query < 0) continue;
      int64_t& last = last_row[size_t(query)];
      SB_CHECK(last != row, "attention: query_order must name every query at most once in a row, got query ", query,
               " twice in row ", row / p.order_heads, ", head ", row % p.order_heads, "; give -1 to slots without one");
      last = row;
    }
}

}  // namespace

BlockLists::BlockLists(const AttentionArguments& a, AttentionParams& p) {
  p.block_q = a.block_q, p.block_k = a.block_k, p.blocks = ceil_div(p.q_tokens, p.block_q);
  if (a.index) {
    index = as_contiguous(*a.index), count = as_contiguous(*a.count);
    p.index = static_cast<const int32_t*>(index->data_ptr()), p.count = static_cast<const int32_t*>(count->data_ptr());
    p.list_heads = index->size(1), p.capacity = index->size(3);
    check_index(p);
  }
  if (a.span) {
    span = as_contiguous(*a.span);
    p.span = static_cast<const int32_t*>(span->data_ptr());
    p.span_batch = span->size(0) == 1 ? 0 : p.blocks * 2, p.span_keys = a.span_keys;
    p.span_sinks = a.span_sinks;
  }
  if (a.query_order) {
    order = as_contiguous(*a.query_order);
    p.order = static_cast<const int32_t*>(order->data_ptr()), p.order_heads = order->size(1);
    check_order(p);
  }
}

int64_t longest_list(const AttentionParams& p) {
  int64_t longest_index = 0;
  for (int64_t row = 0; p.index && row < p.batch * p.list_heads * p.blocks; ++row)
    longest_index = std::max<int64_t>(longest_index, p.count[row]);
  return std::min((p.span ? p.span_keys + p.span_sinks : 0) + longest_index * p.block_k, p.k_tokens);
}

// The window of a block lies inside the row; of its list only the last key block may be cut.
int64_t shortest_list(const AttentionParams& p, int64_t b) {
  if (p.k_mask || p.order) return 0;
  const RowRange& row = p.rows[b];
  const int64_t length = row.k_end - row.k_first, cut = pad_to(length, p.block_k) - length;
  int64_t shortest = p.k_tokens;
  for (int64_t h = 0; h < std::max<int64_t>(p.list_heads, 1); ++h)
    for (int64_t block = 0; block * p.block_q < row.q_end - row.q_first; ++block) {
      int64_t keys = 0;
      if (p.span) {
        const int32_t* span = p.span + b * p.span_batch + block * 2;
        const int64_t before = std::max<int64_t>(span[0] - row.k_first, 0);
        keys = std::min(span[1], row.k_end) - std::max(span[0], row.k_first) + std::min(p.span_sinks, before);
      }
      if (p.index) {
        const int64_t listed = p.count[(b * p.list_heads + h) * p.blocks + block];
        keys = std::max(keys, listed * p.block_k - cut);
      }
      shortest = std::min(shortest, keys);
    }
  return shortest;
}

}  // namespace sb::cpu

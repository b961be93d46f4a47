// What a kernel is told: raw pointers, int64 strides in elements, shapes and flags. Free of torch.
#pragma once
#include <cstdint>

namespace sb {

// The bits of a bfloat16. Kernels read and write rows of them; nothing computes in it.
struct Bfloat16 {
  uint16_t bits;
};

// A (batch, heads, tokens, width) operand whose last dimension is contiguous.
struct StridedTensor {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides in elements

  template <class T>
  T* at(int64_t b, int64_t h, int64_t i) const {
    return static_cast<T*>(data) + b * batch + h * head + i * row;
  }
};

// A projection that made a map, rows T (1 or B, heads, rank + 1, head_pad).
struct MapWeight {
  const void* data = nullptr;
  int64_t batch = 0, heads = 0;  // stride in elements, 0 where one is shared; as many as divide the tokens' heads
};

// The low-rank kernel L_ij = exp(rho_i + kappa_j) K(x_i, y_j): K = (1 + x.y / 2)^2, or x.y of general non-negative
// features.
enum class LowRank : int64_t { kNone = 0, kQuadratic = 1, kFeatures = 2 };

// What of one batch row exists: queries and keys in [first, end), and the position of query i in key coordinates, i +
// offset.
struct RowRange {
  int32_t q_first, q_end, k_first, k_end, offset;
};

inline constexpr int64_t kPad = 16;  // every row operand is padded with zeros to a multiple of this many elements
inline constexpr int64_t kChunk =
    64;  // keys of a state chunk: inside the chunk of the causal edge nothing comes from a state
// Bidirectional rows of no more keys than this, and of more queries than kDirectQueries: queries that have lists of
// their own evaluate all keys together, a list is then a mask (key_list_bitmask.h).
inline constexpr int64_t kDenseKeys = 128;
inline constexpr int64_t kDirectKeys = 64;     // a complement of no more keys than this is evaluated pair by pair
inline constexpr int64_t kDirectQueries = 16;  // a row with no more queries than this evaluates every complement so
// Where a state's L of the listed keys, which is taken back, is this many times the query's whole weight, what is left
// of it carries too much rounding. Such a query is evaluated again in double (double_fallback.h), where float32
// results allow a larger bound; one beyond that too sums its complement key by key, in time linear in the keys.
inline constexpr double kCancelling = 1, kCancellingInDouble = 1 << 30;
// Heads of fewer dimensions than this are computed in double. Sums that short do not average roundings out, and their
// rows are mostly padding.
inline constexpr int64_t kNarrowHead = 16;
// Scores of listed keys are kept from the forward to the backward pass where a query lists no more keys than this (64
// and a block that its window touches) and tiles are full, or where all keys are evaluated together (kDenseKeys): what
// is kept is then about one more row of 64 of a query. Never with a causal edge, where the states that the backward
// pass holds as well would make it the larger part of a call's memory.
inline constexpr int64_t kKeptKeys = 80;
inline constexpr int64_t kSegment = 512;  // keys of one partial state when there is no causal edge
inline constexpr int64_t kQueriesPerUnit =
    256;  // queries that one task takes when there is no causal edge; 64 (a chunk) with one

inline constexpr int64_t pad_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Width of a packed row of the quadratic kernel: r coordinates, 1, the log scale in base 2, zeros.
inline constexpr int64_t packed_width(int64_t rank) { return pad_to(rank + 2, kPad); }

// The attention operator. T is float, or double for float64 inputs; every T array is in that type. Log scales are in
// base 2.
struct AttentionParams {
  int64_t batch, q_heads, kv_heads, q_tokens, k_tokens;
  int64_t head_dim, head_pad, value_pad;  // d, and d and dv rounded up to kPad
  LowRank low_rank;
  int64_t rank, map_pad, features;  // r (or m for general features), its padded row width, m
  bool is_causal;
  double scale;
  StridedTensor q, k, v;                    // T (B, Hq|Hkv, N|M, head_pad|value_pad)
  StridedTensor x, y;                       // T (B, Hq|Hkv, N|M, map_pad); for the quadratic kernel column r holds 1
  StridedTensor rho, kappa;                 // T (B, Hq|Hkv, N|M, 1), log scales
  StridedTensor out;                        // T (B, Hq, N, value_pad)
  void* lse;                       // T (B, Hq, N), natural logarithm
  const RowRange* rows;            // (B)
  const uint8_t *q_mask, *k_mask;  // (B, N|M) or null; nonzero = ignore

  int64_t block_q, block_k, blocks;  // blocks = ceil(N / block_q)
  const int32_t *index, *count;      // (B, list_heads, blocks, capacity), (B, list_heads, blocks) or null
  int64_t list_heads, capacity;
  const int32_t* span;            // (B or 1, blocks, 2) absolute [lo, hi) of a contiguous window, or null
  int64_t span_batch, span_keys;  // stride in elements between batch rows, 0 if shared; upper bound of hi - lo
  const int32_t* order;           // (B, order_heads, N): query slot -> query, or null
  int64_t order_heads;
  int64_t max_pairs;  // upper bound of the keys that one tile evaluates

  // Prefix states: slot s of (b, kv head) is the sum over keys before segment s: H (features, value_pad), then hz
  // (features_pad), then kappa_ref.
  int64_t segment, slots, slot_size;
  void* state;
  bool
      uses_state;  // whether any query's complement is that of a state: false only where all are evaluated pair by pair
  const int32_t* valid_before;  // (B, slots): keys before segment s that are not ignored

  // Scores that the forward pass leaves to the backward pass, T (B, Hq, kept_slots, kept_keys), or null; kept_keys is 0
  // where none are kept. A tile of kept_lanes queries that share a list has [keys][lanes], a query with its own [keys].
  void* scores;
  int64_t kept_keys, kept_lanes, kept_slots;

  double cancelling;   // bound of what is taken back over the whole weight, see kCancelling
  uint8_t* cancelled;  // (B, Hq, N), set for queries beyond the bound, which get no result here; null in double

  int64_t units;  // tasks that the queries of one head are cut into; with a causal edge a unit is a state slot

  // Backward only.
  StridedTensor d_out;                   // T (B, Hq, N, value_pad)
  const void* d_lse;            // T (B, Hq, N) or null
  StridedTensor dq, dk, dv;              // T, padded rows; all gradients start at zero
  StridedTensor dy;                      // T (B, Hkv, M, map_pad); for the quadratic kernel column r collects the sum of dt
  StridedTensor d_query_map, d_key_map;  // T (B, Hq|Hkv, N|M, rank + 1): x and rho, y and kappa
  MapWeight query_weight, key_weight;  // where given, the maps' gradients are not written but go on to dq and dk
  void* d_state;                       // T (B, Hq, units, slot_size)

  int64_t features_pad() const { return pad_to(features, kPad); }
  int64_t kv_head(int64_t h) const { return h / (q_heads / kv_heads); }
  // Whether a row's lists are masks over all its keys. Never with a causal edge, nor without a low-rank kernel: there
  // some queries do not see some keys at all, and zero times what those hold need not be zero.
  bool is_dense(const RowRange& row) const {
    return block_q == 1 && !is_causal && low_rank != LowRank::kNone && row.k_end - row.k_first <= kDenseKeys &&
           row.q_end - row.q_first > kDirectQueries;
  }
  // Keys of the largest complement that a row evaluates pair by pair. Depends on what is valid in the row alone, so
  // that padding changes nothing.
  int64_t direct_keys(const RowRange& row) const {
    const bool all = row.q_end - row.q_first <= kDirectQueries || is_dense(row);
    return all ? row.k_end - row.k_first : kDirectKeys;
  }
};

// Routing (csrc/cpu/route.h). Everything is float32; positions count from the row's first valid key.
inline constexpr int64_t kRouteLanes = 32;     // tokens of a panel
inline constexpr int64_t kRouteSegment = 512;  // keys that one task prepares
inline constexpr int64_t kLongRow = 16384;     // valid keys from which the pooled form looks at superblocks first

struct RouteParams {
  int64_t batch, q_heads, kv_heads, q_tokens, k_tokens;
  int64_t head_dim, head_pad;  // d, and d rounded up to kPad
  LowRank low_rank;
  int64_t rank;                            // r, or m for general features
  int64_t keys, block_q, block_k, window;  // of the support
  bool is_causal;
  float scale;
  StridedTensor q, k;                            // (B, Hq|Hkv, N|M, head_pad)
  StridedTensor x, y;                            // (B, Hq|Hkv, N|M, rank)
  StridedTensor rho, kappa;                      // (B, Hq|Hkv, N|M, 1), log scales in base 2
  const RowRange* rows;                 // (B)
  const uint8_t *q_mask, *k_mask;       // (B, N|M) or null; nonzero = ignore
  int64_t blocks, capacity;             // blocks = ceil(N / block_q)
  int32_t *index, *count;               // (B, Hq, blocks, capacity), (B, Hq, blocks)
  int64_t panel_rows, level_offset[3];  // rows of a panel; where each level of a head's panels begins

  // Candidate blocks of 32 keys (pooled) and candidate superblocks of 64 (per query) that are kept. Fewer lose accuracy
  // on real attention.
  int64_t candidate_blocks() const { return keys > 85 ? (3 * keys + 15) / 16 : 16; }
  int64_t candidate_superblocks() const { return keys - window > 64 ? (keys - window) / 8 * 2 : 16; }
  int64_t blocks_per_group() const { return block_k == 1 ? 4 : 16; }
  int64_t index_capacity() const {
    return block_k == 1 ? keys : keys / block_k + 1;
  }  // a window touches one block more than it fills
};

}  // namespace sb

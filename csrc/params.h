// Arguments of the kernels: raw pointers, int64 strides in elements, shapes and flags. Free of torch.
#pragma once
#include "math/padding.h"

namespace sb {

// Exponents are kept in base 2 inside the kernels, where exp2 is cheaper than exp.
inline constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// math/low_rank_kernels.h has their algebra.
enum class LowRank : int64_t { kNone = 0, kQuadratic = 1, kFeatures = 2, kCentroid = 3 };

// The bits of a bfloat16. Kernels read and write rows of them; nothing computes in it.
struct Bfloat16 {
  uint16_t bits;
};

// The accumulation type of rows of E.
template <class E>
struct AccTypeOf {
  typedef E type;
};
template <>
struct AccTypeOf<Bfloat16> {
  typedef float type;
};
template <class E>
using AccType = typename AccTypeOf<E>::type;

// A (batch, heads, tokens, width) operand whose last dimension is contiguous.
struct StridedTensor {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides in elements

  template <class T>
  SB_HD T* at(int64_t b, int64_t h, int64_t i) const {
    return static_cast<T*>(data) + b * batch + h * head + i * row;
  }
};

// The projection that made a map: rows T (1 or B, heads, rank + 1, head_pad).
struct MapWeight {
  const void* data = nullptr;
  int64_t batch = 0;  // stride in elements, 0 where all batch rows share the weight
  int64_t heads = 0;  // divides the tokens' heads
};

// One batch row: its queries and keys in [first, end), and the position of query i in key coordinates, i + offset.
struct RowRange {
  int32_t q_first, q_end, k_first, k_end, offset;
};

// Keys of a chunk of causal states: inside the chunk of its edge a query reads nothing from a state.
inline constexpr int64_t kChunk = 64;
// A query is computed again where the L subtracted from the state is more than this many times its whole weight.
// Where the result is float32 but the call computes in float64, more may be lost (docs/algorithm.md, section 5).
inline constexpr double kFallbackBound = 1, kFallbackBoundInDouble = 1 << 30;
// And where the terms that sum up to what it takes from the state may be this many times its whole weight.
inline constexpr double kTermsBound = 512;
// Queries of a head that are computed again sum their complements key by key if they see no more keys together than
// kByKeyPairs and kByKeyKeys times their own; else they are computed in float64, with states. With a causal edge, where
// no later query may have a say, this goes for every query and those before it.
inline constexpr int64_t kByKeyPairs = 1 << 16, kByKeyKeys = 32;
// Heads of fewer dimensions than this are computed in float64: sums that short do not average roundings out.
inline constexpr int64_t kNarrowHead = 16;

// Coordinates and log scales in base 2 saturate here. Beyond, their products overflow, and a rounding error of a log
// scale is a factor of more than 2^4 (docs/algorithm.md, section 5).
template <class T>
struct MapLimits {
  T coordinate, log;
};
template <class T>
constexpr MapLimits<T> map_limits(LowRank kind) {
  if (sizeof(T) == sizeof(double)) return {T(0x1p100), T(0x1p52)};
  return {kind == LowRank::kQuadratic ? T(0x1p22) : T(0x1p44), T(0x1p26)};
}
// The stabiliser of the backward pass is lse below this; beyond, lse is rounded too far, and the stabiliser is found
// again from the exponents.
inline constexpr double kLargestLse = 1 << 20;

// States expand about the weighted mean of some keys' coordinates where its squared length is at least this, else about
// 0: of kCentreSamples keys, or with a causal edge of the first chunk and every so many keys after it, from where the
// centre follows the mean if that is as far away (docs/algorithm.md, section 5).
inline constexpr double kCentreBound = 4;
inline constexpr int64_t kCentreSamples = kChunk, kCentreStep = 8;

// Keys held out of a state (docs/algorithm.md, section 5): each with at least kHeldShare of what all keys below it
// weigh together, as many as the longest list of the call has, within these bounds, and never so many that fewer than
// kLeastInState stay.
inline constexpr int64_t kLeastHeld = 64, kMostHeld = 256, kLeastInState = 16;
inline constexpr double kHeldShare = 0.5;
inline constexpr int32_t kNeverEnters = INT32_MAX;

// The attention operator. T is float, or double for float64 inputs; every T array is in that type. Log scales are in
// base 2.
struct AttentionParams {
  int64_t batch, q_heads, kv_heads, q_tokens, k_tokens;
  int64_t head_dim, head_pad, value_pad;  // d, and d and dv rounded up to kPad
  LowRank low_rank;
  int64_t rank, map_pad, features;  // r (or m for general features, or clusters), its padded row width, m
  bool is_causal;
  double scale;
  StridedTensor q, k, v;     // T (B, Hq|Hkv, N|M, head_pad|value_pad)
  StridedTensor x, y;        // T (B, Hq|Hkv, N|M, map_pad); for the quadratic kernel column r holds 1
  StridedTensor rho, kappa;  // T (B, Hq|Hkv, N|M, 1), log scales

  // The centroid kernel has these in place of x, y and rho; its kappa counts from the largest of the key's cluster.
  const int32_t* cluster;         // (B, Hkv, M): the cluster of each key
  StridedTensor representatives;  // T (B, Hkv, clusters, head_pad)
  StridedTensor largest;     // T (B, Hkv, 1, map_pad): the largest log mass of a cluster, or -1e30 for an empty one
  StridedTensor query_mean;  // T (B, Hkv, 1, head_pad)

  StridedTensor out;               // T (B, Hq, N, value_pad)
  void* lse;                       // T (B, Hq, N), natural logarithm
  const RowRange* rows;            // (B)
  const uint8_t *q_mask, *k_mask;  // (B, N|M) or null; nonzero = ignore

  int64_t block_q, block_k, blocks;  // blocks = ceil(N / block_q)
  const int32_t *index, *count;      // (B, list_heads, blocks, capacity), (B, list_heads, blocks) or null
  int64_t list_heads, capacity;
  const int32_t* span;            // (B or 1, blocks, 2) absolute [lo, hi) of a contiguous window, or null
  int64_t span_batch, span_keys;  // stride in elements between batch rows, 0 if shared; upper bound of hi - lo
  int64_t span_sinks;             // so many first keys of the row are listed besides the window
  const int32_t* order;           // (B, order_heads, N): query slot -> query, or null
  int64_t order_heads;
  int64_t max_keys;  // upper bound of the keys that one query tile evaluates

  // Prefix states: slot s of (b, kv head) is the sum over keys before segment s: H (features, value_pad), then hz
  // (features_pad), then kappa_ref.
  int64_t segment, slots, slot_size;
  void* kv_state;
  bool uses_kv_state;           // false where every complement is summed key by key
  const int32_t* valid_before;  // (B, slots): keys before segment s that are not ignored
  const int32_t* valid_keys;    // (B, M): those of every row, ascending; null without a mask
  // T (B, Hkv, centre_slots, map_pad), or null where no head has one: states hold F(y - centre). Column r is 1 where it
  // differs from 0. centre_slots is 1 where the slots of a head share it, else slots.
  const void* centre;
  int64_t centre_slots;

  // Keys held out of the states, which no list subtracts. All are null where no key of the call is held.
  const int32_t* held;                     // absolute keys, ascending
  const int32_t* late;                     // keys that enter a slot behind that of their own segment, ascending
  const int64_t *held_begin, *late_begin;  // (B, Hkv, slots + 1): the first of a slot
  int64_t most_held;                       // bound of the keys held out of a state
  const int32_t* enters;                   // (B, Hkv, M): first slot whose state holds the key, or kNeverEnters

  // Scores that the forward pass leaves to the backward pass, T (B, Hq, kept_slots, kept_rows()), or null; kept_keys is
  // 0 where none are kept. A tile of kept_lanes queries that share a list has [keys][lanes], a query with its own
  // [keys]. Behind them are the exponents of the clusters, kept_clusters of them or none.
  void* scores;
  int64_t kept_keys, kept_clusters, kept_lanes, kept_slots;

  double fallback_bound;  // largest L taken back from the state over the whole weight, see kFallbackBound
  uint8_t* needs_again;   // (B, Hq, N), set for queries beyond the bound, which get no result here; null in float64
  bool sums_by_key;       // for those queries alone: every complement is summed key by key

  int64_t units;  // tasks that the queries of one head are cut into; with a causal edge a unit is a state slot

  // Backward only.
  StridedTensor d_out;       // T (B, Hq, N, value_pad)
  const void* d_lse;         // T (B, Hq, N) or null
  StridedTensor dq, dk, dv;  // T, padded rows; all gradients start at zero
  StridedTensor dy;          // T (B, Hkv, M, map_pad); for the quadratic kernel column r sums dL/dt, and the
                             // centroid kernel has one column, dkappa
  StridedTensor d_query_map, d_key_map;  // T (B, Hq|Hkv, N|M, rank + 1): x and rho, y and kappa
  MapWeight query_weight, key_weight;    // where given, the maps' gradients are not written but go on to dq and dk
  void* d_kv_state;                      // T (B, Hq, units, slot_size)
  void* d_representatives;               // T (B, Hq, units, clusters, head_pad), of the centroid kernel

  SB_HD bool has_low_rank() const { return low_rank != LowRank::kNone; }
  SB_HD bool has_clusters() const { return low_rank == LowRank::kCentroid; }
  SB_HD bool has_maps() const { return has_low_rank() && !has_clusters(); }
  // Rows of a tile's x: coordinates, or the clusters' weights and then their exponents (cluster_weights.h).
  SB_HD int64_t x_rows() const { return has_clusters() ? 2 * map_pad : map_pad; }
  SB_HD int64_t dy_width() const { return has_clusters() ? 1 : map_pad; }
  SB_HD int64_t kept_rows() const { return kept_keys + kept_clusters; }
  SB_HD int64_t features_pad() const { return pad_to(features, kPad); }
  SB_HD int64_t kv_state_size() const { return features * value_pad + features_pad(); }  // H and hz
  SB_HD int64_t kv_head(int64_t h) const { return h / (q_heads / kv_heads); }
};

// Clustering (docs/algorithm.md, section 2). T is float, or double for float64 inputs.
struct ClusterParams {
  int64_t batch, q_heads, kv_heads, q_tokens, k_tokens;
  int64_t head_dim, head_pad;  // d, and d rounded up to kPad
  int64_t clusters;
  double scale;
  StridedTensor q, k;                // T (B, Hq|Hkv, N|M, head_pad)
  const RowRange* rows;              // (B)
  const uint8_t *q_mask, *k_mask;    // (B, N|M) or null; nonzero = ignore
  const int64_t* valid_queries;      // (B): queries of one head that are not ignored
  const int32_t *samples, *sampled;  // (B, kSamples): keys that directions and centres are taken from; (B): how many
  int32_t* index;                    // (B, Hkv, M), -1 for ignored keys
  void* representatives;             // T (B, Hkv, clusters, head_dim)
  void* log_mass;                    // T (B, Hkv, M), natural logarithms
  void* query_mean;                  // T (B, Hkv, head_dim)
};

// Routing (docs/algorithm.md, section 3). Everything is float32; positions count from the row's first valid key.
struct RouteParams {
  int64_t batch, q_heads, kv_heads, q_tokens, k_tokens;
  int64_t head_dim, head_pad;  // d, and d rounded up to kPad
  LowRank low_rank;
  int64_t rank;                                          // r, or m for general features, or clusters
  int64_t keys, block_q, block_k, window, sinks, pools;  // of the support; keys: the most of any head
  const int32_t* head_keys;                              // (Hq) keys of each head, or null: the same for all
  bool is_causal;
  float scale;
  StridedTensor q, k;        // (B, Hq|Hkv, N|M, head_pad)
  StridedTensor x, y;        // (B, Hq|Hkv, N|M, rank)
  StridedTensor rho, kappa;  // (B, Hq|Hkv, N|M, 1), log scales in base 2
  const int32_t* cluster;    // these three as in AttentionParams
  StridedTensor representatives, largest;
  const RowRange* rows;                           // (B)
  const uint8_t *q_mask, *k_mask;                 // (B, N|M) or null; nonzero = ignore
  int64_t blocks, capacity;                       // blocks = ceil(N / block_q)
  int32_t *index, *count;                         // (B, Hq, blocks, capacity), (B, Hq, blocks)
  int64_t key_rows, panel_rows, level_offset[3];  // rows of a panel of keys, and of means; where each level begins

  SB_HD bool has_low_rank() const { return low_rank != LowRank::kNone; }
  SB_HD bool has_clusters() const { return low_rank == LowRank::kCentroid; }
  // Per query: whether every run of keys is two groups, or keys are found by sketches of their own (csrc/math/sketch.h).
  SB_HD bool has_groups() const { return block_k > 1 && pools == 2; }
  SB_HD bool has_sketches() const { return block_k > 1 && pools == 0; }
};

}  // namespace sb

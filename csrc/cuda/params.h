// Arguments of the CUDA kernels. Free of torch and of CUDA, so that launchers and kernels share them.
#pragma once
#include "../params.h"

namespace sb {

// The bits of a float16.
struct Half {
  uint16_t bits;
};
template <>
struct AccTypeOf<Half> {
  typedef float type;
};

namespace cuda {

// Elements of rows of tokens.
enum class Element : int { kFloat, kDouble, kBfloat16, kHalf };

// The stream of a call, a cudaStream_t.
struct Stream {
  void* handle;
};

// Widest head and value: a lane of a warp holds kColumns columns of a row.
inline constexpr int kWidest = 256, kColumns = kWidest / 32;
// A complement of so few keys is summed key by key: nothing cancels.
inline constexpr int64_t kByKeyLimit = 64;
// As kTermsBound. States in float32 have no centres and hold no key out here, so that queries with as many terms are
// common where keys are unusual; they are as exact as the CPU's at this bound.
inline constexpr double kTermsBoundOfPlainStates = 128;
// So is every complement of a row with so few queries.
inline constexpr int64_t kByKeyQueries = 16;
// Keys of a partial state without a causal edge, or before one of few queries; else kChunk with one.
inline constexpr int64_t kSegment = 512;
// Query slots of a tile.
inline constexpr int kTile = 16;
// Features that one block sums.
inline constexpr int64_t kFeatureTile = 64;
// Most coordinates of the quadratic kernel whose states are made on tensor cores.
inline constexpr int64_t kMostProductRank = 48;
// Tokens of a partial sum of a projection's weight gradient.
inline constexpr int64_t kTokensPerPart = 256;

// Coordinates and log scales of tokens as the operators take them: rows of an affine map, or packed rows.
struct MapView {
  const void* data;
  int64_t batch, head, row, step;  // strides in elements
  int64_t log_column;
  double log_factor;  // to base 2
  double coordinate_limit, log_limit;
};

struct ProjectParams {
  int64_t batch, heads, tokens, head_dim, outputs;
  int64_t weight_batch, weight_heads;  // weight_batch is 1 where all batch rows share the weight
  StridedTensor x;                     // tokens
  const void *weight, *bias;  // accumulation type (weight_batch, weight_heads, outputs, head_dim), bias or null
  // Forward only. Rows of z have `width` columns. The last output is multiplied by `last_factor` and stands in column
  // `last`; with it in another column than behind the others, rows are packed: 1 between them and zeros behind.
  void* z;
  int64_t width, last;
  double last_factor, coordinate_limit, log_limit;
  // Backward only.
  const void* grad;  // (batch, heads, tokens, outputs)
  StridedTensor dx;  // of x
  int64_t parts;     // ceil(tokens / kTokensPerPart)
  void* partial;     // (batch, heads, parts, outputs, head_dim + 1)
  void *d_weight, *d_bias;

  // Whether tokens of 16 bits are mapped on tensor cores; their rows then begin at multiples of 16 bytes.
  SB_HD bool has_products() const { return head_dim % 8 == 0 && head_dim > 0; }
};

struct RowsParams {
  int64_t batch, q_tokens, k_tokens;
  const int32_t *q_range, *k_range, *offset;  // (B, 2), (B, 2), (B), or null
  const uint8_t* k_mask;                      // (B, M) or null; nonzero = ignore
  int64_t segment, slots;
  RowRange* rows;        // (B)
  uint8_t* any_flagged;  // (B, kv_heads) or null: set to 0
  int64_t kv_heads;
  int32_t* valid_before;  // (B, slots), or null without a low-rank kernel
  int32_t* valid_keys;    // (B, M), or null without a low-rank kernel or a mask
};

// Clustering. Here rows of q and k are the caller's own and head_pad is head_dim.
struct ClusteringParams : ClusterParams {
  int64_t q_segments, k_slots;  // ceil(N / kSegment), ceil(M / kSegment) + 1
  const int32_t* valid_before;  // (B, k_slots): valid keys before a segment; the last is all of them
  void* query_sums;             // T (B, Hkv, q_segments, head_dim)
  int32_t* query_counts;        // (B, Hkv, q_segments): queries in a sum
  void *mean, *directions;      // T (B, Hkv, head_dim), (B, Hkv, head_dim, kDirections): of the samples
  void* centres;                // T (B, Hkv, clusters, kDirections + 1)
  void *top, *mass, *sums;      // T (B, Hkv, k_slots - 1, clusters) twice, and (.., head_dim): of a segment's keys
  void* dots;                   // T (B, Hkv, clusters): a.b
  bool has_eights;              // rows of keys can be read eight numbers at a time
};

// Routing. Here rows of q and k are the caller's own. A run of keys is one row of run_width floats: the mean key;
// |mean|^2 (per-query form: the variance of the run); y and kappa of the run; its mean |k|^2; and how many keys it has.
// Where runs are two groups (route_groups.cuh) it is two rows of GroupColumns.
struct RoutingParams : RouteParams {
  MapView x_map, y_map;
  const void* log_mass;               // (B, Hkv, M)
  const void* given_representatives;  // (B, Hkv, clusters, head_dim)
  double cluster_limit;
  float *segment_top, *cluster_top;  // (B, Hkv, segments, clusters), (B, Hkv, clusters): the largest log mass, base 2
  int64_t fine_keys, coarse_keys;    // keys of a run, and of a run of runs
  int64_t fine_runs, coarse_runs;    // of a head
  int64_t run_width;
  int64_t groups;        // of pools, in a head
  float *fine, *coarse;  // (B, Hkv, runs, run_width)
  // With sketches, in place of runs: the two halves of a key's (B, Hkv, M, 2), and whether it is finite (B, Hkv, M).
  uint32_t* sketch;
  uint8_t* is_finite;
  // What a block needs for the lists that it makes: 4 byte words. `units`: the most keys or runs that it scores at
  // once.
  int64_t units, scratch_words, scratch_blocks;
  int32_t* scratch;  // (scratch_blocks, scratch_words)

  // On tensor cores (route_tile.cuh): the most rows of 32 keys or runs that a group of pools scores at once. Else 0.
  int64_t tile_rows;
  float* key_numbers;       // (B, Hkv, fine_runs, key_columns(), 32)
  float* run_numbers[2];    // of fine and of coarse runs (B, Hkv, ceil(groups of runs / 32), run_columns(), 32)
  Bfloat16* run_parts[2];   // (B, Hkv, groups of runs, 3, head_dim)
  Bfloat16* cluster_parts;  // (B, Hkv, clusters, 3, head_dim)
  SB_HD int64_t key_columns() const { return 2 + (has_clusters() ? 1 : has_low_rank() ? rank : 0); }
  SB_HD int64_t groups_of_run() const { return has_groups() ? 2 : 1; }
  SB_HD int64_t run_columns() const { return 3 + (has_low_rank() ? rank : 0); }
};
// The most of those rows that there are kernels for.
inline constexpr int64_t kMostRouteRows = 64;

// How a query slot is computed: from its list alone, key by key, or with a state. kNone: not here.
enum class SlotKind : int32_t { kNone, kListed, kByKey, kState };

// The attention operator. Here rows of q, k, v and out are the caller's own, head_pad and value_pad are head_dim and
// the width of v, and a state is `features` rows of value_pad + 1 columns, the last of them hz.
struct ForwardParams : AttentionParams {
  MapView x_map, y_map;
  const void* log_mass;               // (B, Hkv, M)
  const void* given_representatives;  // (B, Hkv, clusters, head_dim)
  void* cluster_log;  // T (B, Hkv, clusters), the largest log mass of a cluster in base 2, or kLowestLog
  double cluster_limit;
  void* segment_log;  // T (B, Hkv, state_slots, logs_of_state()): the largest kappa of a segment, by cluster
  void* state_log;    // T (B, Hkv, state_slots): the same of the keys of a stored state, 0 with clusters
  // Queries whose complement drowns in rounding get no result, and a flag; any_flagged says whether their states are
  // wanted again in float64. Both are null where nothing computes again.
  uint8_t *flags, *any_flagged;  // (B, Hq, N), (B, Hkv)
  bool only_flagged;             // computes what is flagged, and nothing else
  const int32_t* valid_keys;     // (B, M): a row's keys that are not ignored, from its first one; null without a mask
  // For the backward pass, written in place of out and lse: SlotRecord<T> (B, Hq, N), and kinds where there is a
  // record. Else both are null.
  void* records;
  SlotKind* kinds;

  // Keys that states hold out (held_keys.cuh), where they do; else all are null. Held and late keys of a slot are as
  // many as their counts say; late ones enter it from earlier segments, and -1 is none.
  double* weight_log;                // (B, Hkv, M): log2 of what a key weighs in a state
  int32_t* first_slot;               // (B, Hkv, M): whose state holds a key, or kNeverEnters
  int32_t *held_keys, *held_counts;  // (B, Hkv, held_slots(), most_held), (B, Hkv, held_slots())
  int32_t *late_keys, *late_counts;  // with a causal edge (B, Hkv, slots, most_held + kChunk), (B, Hkv, slots)

  // States are stored by the slots of the keys before them, or where few queries have a causal edge one alone is, of
  // the chunks before the first query's edge. Sums over segments of state_segment keys come first.
  bool has_one_state;
  int64_t state_segment, state_slots;

  // Of ragged tiles (attention_tile_rows.cuh): whether the rows' lists are merged by groups of keys, else one list
  // follows the other; and a bound of the keys of a list.
  bool by_groups;
  int64_t longest_list;

  // Whether the queries of a tile have several lists or edges.
  SB_HD bool is_ragged() const { return is_causal || block_q % kTile != 0; }
  SB_HD int64_t held_slots() const { return is_causal ? slots : 1; }
  SB_HD bool has_prefixes() const { return is_causal && !has_one_state; }
  SB_HD int64_t operand_slots() const { return has_prefixes() ? slots : 1; }
  // Where a state is stored that a query with a causal edge reads by this slot; the first one is empty.
  SB_HD int64_t stored_state(int64_t state_slot) const {
    return has_one_state && state_slot > 0 ? state_slots - 1 : state_slot;
  }
  SB_HD int64_t logs_of_state() const { return has_clusters() ? rank : 1; }
  // Whether states in float32, and their gradients, are sums on tensor cores where tokens have 16 bits. Decided by
  // widths alone, so that padding changes no bit. Rows of v and of d_out then begin at multiples of 16 bytes.
  SB_HD bool has_products() const {
    return has_maps() && value_pad % 8 == 0 && value_pad > 0 &&
           (low_rank != LowRank::kQuadratic || rank <= kMostProductRank);
  }
  // The same of gradients of states; with clusters rows of q do too, and gradients of representatives are such sums.
  SB_HD bool has_query_products() const {
    return has_products() || (has_clusters() && value_pad % 8 == 0 && value_pad > 0 && head_dim % 8 == 0);
  }
};

// What the backward pass knows of a query slot. Exponents are to base 2; a weight is exp(exponent - log) inverse.
template <class T>
struct SlotRecord {
  T log, inverse;
  T state_weight;  // exp(rho + kappa_ref - log) inverse
  // What g = dO.v - delta - correction is from: dO.o, and once queries are balanced its error, less the gradient of
  // lse. Kept apart, so that nothing large rounds what is small.
  T delta, correction;
};

// Which blocks of queries name a key, from lists of blocks: for every entry of the lists its blocks in ascending order.
// Entries are runs of `width` keys, and with spans of twice as many, four times as many, .. : a run of level l is entry
// (first >> l) + run. They are made by `parts` walks over `part` blocks each, and end of entry e is at cursor
// e parts - 1.
struct TransposedLists {
  int64_t heads, width, levels, first, entries, parts, part;
  int64_t room;        // for the blocks of all entries
  int32_t* cursor;     // (B, heads, entries, parts)
  int32_t* blocks;     // (B, heads, room)
  int32_t* positions;  // (B, heads, room): of the entries in the blocks' lists, or null
};

struct BackwardParams : ForwardParams {
  TransposedLists of_span, of_index;  // without entries where there is no span, or no index
  int32_t *by_key, *by_key_count;     // (B, Hq, N): slots of kind kByKey, ascending; (B, Hq)
  int64_t query_segments;  // of d_kv_state, T (B, Hq, query_segments, slot_size): state slots, or kSegment queries
  void* d_exponent;        // T (B, Hq, N, clusters): gradients of a slot by q.b_c
  float* cluster_scores;   // (B, Hq, N, clusters): q.b_c, where gradients of states are products or queries go by tiles
  void* d_representative_parts;  // T (B, Hq, parts of kSegment slots, clusters, head_dim)
  // Sums over queries, in the type of maps: (B, Hkv, M, head_dim), (.., value_pad), and (.., rank + 1) of maps or
  // (.., 1), that by the log mass; and (B, Hkv, clusters, head_dim) of AttentionParams.d_representatives.
  void *dk_sum, *dv_sum, *dy_sum;
  const void* query_mean;     // (B, Hkv, head_dim)
  int64_t slots_per_state;    // neighbouring query slots that read the state of the first of them
  bool adds_listed_blocks;    // keys' sums are there but for pairs of listed blocks
  bool leaves_listed_blocks;  // these come later, by shares
};

// Four registers of 32 bits, read and written together.
struct alignas(16) FourWords {
  uint32_t at[4];
};

// The forward pass by tiles of queries (attention_tile.cuh). Its operands are made from the states in float32.
struct TileParams : ForwardParams {
  int64_t features_padded, head_steps, value_chunks;  // features to 16s, head_dim in 16s, value_pad in 8s
  FourWords* state_operand;                 // (B, Hkv, operand_slots(), features_padded / 16, value_chunks, 32)
  float* state_sums;                        // (B, Hkv, operand_slots(), features_padded): hz
  FourWords* cluster_operand;               // (B, Hkv, features_padded / 8, head_steps, 32, 2)
  float* key_log;                           // (B, Hkv, M): the log scale of a key, with clusters over that of its own
  Bfloat16* key_coordinates;                // (B, Hkv, M, 2, 16), of the quadratic kernel
  uint32_t key_row_bytes, value_row_bytes;  // strides
  float* key_rows;                          // with float32 tokens in its place (B, Hkv, M, 16): coordinates, then 1
};
// Widest head and value of a tile, and features of the quadratic kernel.
inline constexpr int64_t kWidestTile = 128, kTileFeatures = 64, kMostTileClusters = 256;
inline constexpr int kMostFloatTileThreads = 128;  // of a block

// A matrix of every head as the right operand of products: rows in 16s, columns in 8s, in two parts of bfloat16.
struct OperandParams {
  int64_t batch, heads, rows, columns;
  const float* data;
  int64_t of_batch, of_head, of_row, of_column;  // strides
  int64_t given_heads;                           // divides heads
  int64_t row_steps, column_chunks;
  FourWords* operand;  // (batch, heads, row_steps, column_chunks, 32)
};

// The backward pass of queries by tiles (attention_backward_tile.cuh).
struct BackwardTileParams : BackwardParams {
  int64_t features_padded, head_steps, value_steps;  // features to 16s, head_dim and value_pad in 16s
  // The state with its features as columns, of operand_slots(); and what carries gradients of coordinates to dq: the
  // projection's rows, of q_heads, or without a projection null, or the representatives. OperandParams.operand of
  // either.
  FourWords *state_operand, *map_operand;
  const FourWords* cluster_operand;  // these four as in TileParams
  const float* key_log;
  const Bfloat16* key_coordinates;
  const float* key_rows;
};

// That of keys by tiles (attention_backward_tile_keys.cuh).
struct BackwardTileKeysParams : BackwardParams {
  int64_t features_padded, head_steps, value_steps;  // these, and what is of keys, as in BackwardTileParams
  // Of d_kv_state, OperandParams.operand of either form, where stages are not ragged.
  FourWords *state_by_value, *state_by_feature;
  const float* key_log;
  const Bfloat16* key_coordinates;
  const float* key_rows;
  Bfloat16* query_coordinates;  // (B, Hq, N, 2, 16)
  float* query_rows;            // with float32 tokens in its place (B, Hq, N, 16): half of the coordinates, then 1

  // Whether the 16 slots of a stage have several lists, or take back of causal states.
  SB_HD bool has_ragged_stages() const { return block_q % kTile != 0 || (is_causal && has_low_rank()); }
};

// The lists of every tile of 16 query slots as one (union_lists.cuh): entries that any block of the tile lists,
// ascending, and the slots that list each.
struct UnionListsParams : ForwardParams {
  int64_t tiles, most;        // entries of a union, at most
  int32_t *entries, *counts;  // (B, list_heads, tiles, most), (B, list_heads, tiles)
  int32_t* slots_of_entries;  // (B, list_heads, tiles, most)
};

// That of listed blocks' keys by shares (attention_backward_shares.cuh), in rounds of tiles of 16 query slots: those of
// all heads in turn, [first_tile, end_tile). A share is what a tile adds to the gradients of a key of its list. Blocks
// of queries and their lists are those of unions where blocks are no multiple of 16 queries.
struct BackwardSharesParams : BackwardParams {
  int64_t head_steps, value_steps;  // these, and what is of keys, as in BackwardTileParams
  const float* key_log;
  const Bfloat16* key_coordinates;
  const float* key_rows;
  int64_t span_queries;             // of a block, as the call has them
  const int32_t* slots_of_entries;  // of unions, else null
  int64_t keys_of_list;             // of listed blocks, at most
  bool is_float;
  int64_t share_words, numbers, factors;
  uint32_t* shares;  // (tiles of a round, keys_of_list, share_words): dk, then dv, in pairs of 16 bits or float32
  // (.., numbers): factors of the two, but in float32; then dy of maps, or what is by the log mass.
  float* share_numbers;
  int64_t round_tiles, first_tile, end_tile;
  bool has_sums;  // keys' sums are there but for pairs of listed blocks

  SB_HD int64_t tiles() const { return ceil_div(q_tokens, 16); }  // of a head
  // Of a row of `width` numbers in a share. Of 16 bits they are pairs of columns, of which 16 pairs go together.
  SB_HD int64_t words_of(int64_t width) const { return is_float ? width : ceil_div(width, 32) * 16; }
  SB_HD int64_t words_of_keys() const { return words_of(head_dim); }
};

// Below every exponent.
inline constexpr double kLowestLog = -1e30;
// Exponents up to this belong to no key.
inline constexpr double kNoKeyLog = -1e29;

}  // namespace cuda
}  // namespace sb

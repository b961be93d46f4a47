// The launch functions of the .cu files. Free of torch and of CUDA.
#pragma once
#include "params.h"

namespace sb::cuda {

// z = W x + b for every token.
void launch_project(const ProjectParams& p, Element element, Stream stream);
// dx; then dW and db in two steps, whose order does not depend on the device.
void launch_project_backward(const ProjectParams& p, Element element, Stream stream);

// What a row counts: its valid ranges, clamped, and its keys before every segment.
void launch_rows(const RowsParams& p, Stream stream);

// The mean query, directions and centres, then clusters of keys, then representatives and log masses.
void launch_cluster(const ClusteringParams& p, Element element, Stream stream);

// Means of runs of keys, then the lists.
void launch_route(const RoutingParams& p, Element element, Stream stream);
// Of a block, in global memory.
int64_t route_scratch_words(const RoutingParams& p);
// Whether every device has the shared memory of pooled lists on tensor cores.
bool route_tile_fits(const RoutingParams& p, Element element);

// The keys that states in float64 hold out: before the states.
void launch_held_keys(const ForwardParams& p, Element element, Stream stream);
// In order: sums over segments, then prefix sums or their total, with the largest log mass of every cluster. `is_wide`:
// computes in double.
void launch_states(const ForwardParams& p, Element element, bool is_wide, Stream stream);
// On tensor cores, of tokens of 16 bits with sums in float32: sums over segments of keys; gradients of those, and of
// representatives, over segments of queries; those of a projection over parts of the tokens.
void launch_feature_products(const ForwardParams& p, Element element, Stream stream);
void launch_query_products(const BackwardParams& p, Element element, Stream stream);
void launch_representative_products(const BackwardParams& p, Element element, Stream stream);
void launch_project_parts(const ProjectParams& p, Element element, Stream stream);
void launch_attention_forward(const ForwardParams& p, Element element, bool is_wide, Stream stream);
// What both passes on tensor cores read of keys and clusters, and where there is room of states in float32.
void launch_tile_operands(const TileParams& p, Element element, Stream stream);
// Then launch_attention_forward by tiles of queries, which share a list, or are ragged. Elements of 16 bits; and float32.
void launch_attention_tile(const TileParams& p, Element element, Stream stream);
void launch_ragged_attention_tile(const TileParams& p, Element element, Stream stream);
// The same where neighbouring tiles share the keys of their windows; false where it does not take the call, and then
// starts nothing.
bool launch_attention_window(const TileParams& p, Element element, Stream stream);
bool launch_causal_attention_window(const TileParams& p, Element element, Stream stream);
void launch_float_attention_tile(const TileParams& p, Stream stream);
void launch_ragged_float_attention_tile(const TileParams& p, Stream stream);

// The backward pass, in the order of its steps, after a forward pass that writes records. Lists are transposed once for
// both passes; representatives are shared, and keys finished, after the last.
void launch_transposed_lists(const BackwardParams& p, Stream stream);
void launch_collect_by_key(const BackwardParams& p, Stream stream);
void launch_backward_queries(const BackwardParams& p, Element element, bool is_wide, Stream stream);
// Queries on tensor cores, in place of launch_attention_forward and launch_backward_queries; after
// launch_tile_operands.
void launch_attention_backward_tile(const BackwardTileParams& p, Element element, Stream stream);
void launch_ragged_attention_backward_tile(const BackwardTileParams& p, Element element, Stream stream);
void launch_float_attention_backward_tile(const BackwardTileParams& p, Stream stream);
// The state, and what carries gradients of coordinates to dq, as either reads them.
void launch_backward_tile_operands(const BackwardTileParams& p, Stream stream);
// What a product of tokens or of numbers with a matrix reads (tile_memory.cuh).
void launch_right_operand(const OperandParams& p, Stream stream);
void launch_state_gradients(const BackwardParams& p, Element element, bool is_wide, Stream stream);
// Keys on tensor cores, but for pairs of listed blocks, which others add; after what they read of queries and states.
void launch_backward_tile_keys_operands(const BackwardTileKeysParams& p, Stream stream);
void launch_attention_backward_tile_keys(const BackwardTileKeysParams& p, Element element, Stream stream);
void launch_ragged_attention_backward_tile_keys(const BackwardTileKeysParams& p, Element element, Stream stream);
void launch_float_attention_backward_tile_keys(const BackwardTileKeysParams& p, Stream stream);
void launch_backward_keys(const BackwardParams& p, Element element, bool is_wide, Stream stream);
// Pairs of listed blocks, on tensor cores; adds to what the others have left, if that is any. Tiles are ragged with a
// causal edge, and where their lists are unions, which come before and are transposed then.
void launch_union_lists(const UnionListsParams& p, Stream stream);
void launch_attention_backward_shares(const BackwardSharesParams& p, Element element, Stream stream);
void launch_ragged_attention_backward_shares(const BackwardSharesParams& p, Element element, Stream stream);
void launch_float_attention_backward_shares(const BackwardSharesParams& p, Stream stream);
void launch_share_representatives(const BackwardParams& p, Element element, bool is_wide, Stream stream);
void launch_finish_keys(const BackwardParams& p, Element element, bool is_wide, Stream stream);

}  // namespace sb::cuda

// The arguments of the operators, listed once. A list names its fields as X(type, name, default of the schema) with S()
// between them. The schemas, the parameters of the operator functions, the values that they pass on and the structs
// below are generated from these lists, so a new argument is one new line here. scatterbrain/operators/arguments.py
// says what each means.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace sb {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// clang-format off

// -------------------- groups

#define SB_TOKENS(X, S) X(Tensor, query) S() X(Tensor, key) S() X(Tensor, value)

#define SB_MAPS(X, S) X(MaybeTensor, query_map) S() X(MaybeTensor, key_map)

// Of the centroid kernel, in place of maps.
#define SB_CLUSTERS(X, S)                                              \
  X(MaybeTensor, cluster_index) S() X(MaybeTensor, representatives) S() \
  X(MaybeTensor, log_mass)

#define SB_LISTS(X, S)                                \
  X(MaybeTensor, index) S() X(MaybeTensor, count) S() \
  X(MaybeTensor, span) S()                            \
  X(MaybeTensor, query_order)

#define SB_PADDING(X, S)                                         \
  X(MaybeTensor, query_mask) S() X(MaybeTensor, key_mask) S()    \
  X(MaybeTensor, query_range) S() X(MaybeTensor, key_range) S()  \
  X(MaybeTensor, query_offset)

#define SB_PROJECTIONS(X, S)                              \
  X(Tensor, query_weight) S() X(Tensor, query_bias) S()   \
  X(Tensor, key_weight) S() X(Tensor, key_bias)

#define SB_SETTINGS(X, S)                           \
  X(int64_t, block_q) S() X(int64_t, block_k) S()   \
  X(int64_t, span_keys) S() X(int64_t, span_sinks) S() \
  X(bool, is_causal) S()                            \
  X(double, scale) S()                              \
  X(int64_t, packed_rank, "=0")

// Of lists that are routed in the same call, where keys > 0.
#define SB_BUDGET(X, S) \
  X(MaybeTensor, head_keys) S() X(int64_t, keys) S() X(int64_t, window) S() X(int64_t, sinks) S() X(int64_t, pools)

#define SB_ROUTE_SETTINGS(X, S)                     \
  X(int64_t, keys) S()                              \
  X(int64_t, block_q) S() X(int64_t, block_k) S()   \
  X(int64_t, window) S() X(int64_t, sinks) S()      \
  X(int64_t, pools) S()                             \
  X(bool, is_causal) S()                            \
  X(double, scale) S()                              \
  X(int64_t, packed_rank, "=0")

// For the backward pass: what attention_with_state saved, and the projections that made the maps, where the maps'
// gradients go on through them to query and key.
#define SB_SAVED(X, S)                                                            \
  X(MaybeTensor, state, "=None") S() X(MaybeTensor, scores, "=None") S()          \
  X(MaybeTensor, query_weight, "=None") S() X(MaybeTensor, key_weight, "=None")

// What the sizes of state and scores depend on. `rank`: r, or the number of general features or of clusters, 0 without
// a low-rank kernel. `listed_keys`: the most keys that a query can list, span_keys, span_sinks and the capacity of its
// list.
#define SB_SHAPE(X, S)                                                          \
  X(ScalarType, dtype) S() X(int64_t, batch) S()                                \
  X(int64_t, q_heads) S() X(int64_t, q_tokens) S() X(int64_t, head_dim) S()     \
  X(int64_t, kv_heads) S() X(int64_t, k_tokens) S() X(int64_t, value_dim) S()   \
  X(int64_t, low_rank) S() X(int64_t, rank) S()                                 \
  X(int64_t, listed_keys) S() X(int64_t, block_q) S()                           \
  X(bool, is_causal)

// -------------------- operators

#define SB_ATTENTION(X, S) \
  SB_TOKENS(X, S) S() SB_MAPS(X, S) S() SB_CLUSTERS(X, S) S() X(MaybeTensor, query_mean) S() \
  SB_LISTS(X, S) S() SB_PADDING(X, S) S() \
  X(int64_t, low_rank) S() SB_SETTINGS(X, S)

#define SB_ROUTE(X, S) \
  X(Tensor, query) S() X(Tensor, key) S() SB_MAPS(X, S) S() SB_CLUSTERS(X, S) S() SB_PADDING(X, S) S() \
  X(MaybeTensor, head_keys) S() X(int64_t, low_rank) S() \
  SB_ROUTE_SETTINGS(X, S)

#define SB_CLUSTER(X, S) \
  X(Tensor, query) S() X(Tensor, key) S() SB_PADDING(X, S) S() X(int64_t, clusters) S() X(double, scale)

#define SB_INPUT_PROJECTION(X, S) \
  X(Tensor, query) S() X(Tensor, key) S() SB_PADDING(X, S) S() X(int64_t, rank) S() X(double, scale)

// The arguments of the quadratic operators but the tokens.
#define SB_QUADRATIC(X, S) \
  SB_PROJECTIONS(X, S) S() SB_LISTS(X, S) S() SB_PADDING(X, S) S() SB_BUDGET(X, S) S() SB_SETTINGS(X, S)

// The same of calls that cluster their keys.
#define SB_CENTROID(X, S) \
  SB_LISTS(X, S) S() SB_PADDING(X, S) S() SB_BUDGET(X, S) S() X(int64_t, clusters) S() SB_SETTINGS(X, S)

// -------------------- what a list becomes

#define SB_COMMA() ,
#define SB_SEMICOLON() ;
#define SB_SCHEMA_COMMA() ", "

#define SB_FIELD(type, name, ...) type name{}
#define SB_PARAMETER(type, name, ...) type name
#define SB_VALUE(type, name, ...) std::move(name)
#define SB_SCHEMA(type, name, ...) SB_SCHEMA_##type " " #name __VA_ARGS__
#define SB_SCHEMA_REQUIRED(type, name, ...) SB_SCHEMA_##type " " #name

#define SB_SCHEMA_Tensor "Tensor"
#define SB_SCHEMA_MaybeTensor "Tensor?"
#define SB_SCHEMA_int64_t "int"
#define SB_SCHEMA_bool "bool"
#define SB_SCHEMA_double "float"
#define SB_SCHEMA_ScalarType "ScalarType"

// clang-format on

// A field that is empty was not given.
struct AttentionArguments {
  SB_ATTENTION(SB_FIELD, SB_SEMICOLON);
  SB_SAVED(SB_FIELD, SB_SEMICOLON);
  bool is_trained = false;  // of the forward pass: whether state and scores are saved for a backward pass
};

struct RouteArguments {
  SB_ROUTE(SB_FIELD, SB_SEMICOLON);
};

struct ClusterArguments {
  SB_CLUSTER(SB_FIELD, SB_SEMICOLON);
};

struct InputProjectionArguments {
  SB_INPUT_PROJECTION(SB_FIELD, SB_SEMICOLON);
};

struct Budget {
  SB_BUDGET(SB_FIELD, SB_SEMICOLON);
};

// `attention` lacks the tokens, what the low-rank kernel makes of them and the lists that are routed.
struct QuadraticArguments {
  SB_PROJECTIONS(SB_FIELD, SB_SEMICOLON);
  Budget budget;
  AttentionArguments attention;
};
struct CentroidArguments {
  int64_t clusters{};
  Budget budget;
  AttentionArguments attention;
};

struct AttentionShape {
  SB_SHAPE(SB_FIELD, SB_SEMICOLON);
};

}  // namespace sb

// Argument checks of the operators, the same for every device. scatterbrain.functional checks first and raises
// ValueError and TypeError; these checks hold for direct callers of the operators. Contents of tensors are read on the
// CPU only, because on another device the host would have to wait for them.
#pragma once
#include <type_traits>

#include "error.h"
#include "math/clustering.h"
#include "params.h"
#include "tensor_traits.h"

namespace sb {

inline constexpr int64_t kInt32Limit = int64_t(1) << 31;

// -------------------- devices

// A kernel that follows the pointer of another device's tensor would end the process. Arguments that are no tensors
// pass.
inline void check_device(const char* op, const Tensor& tokens, const char* name, const Tensor& t) {
  SB_CHECK(t.device() == tokens.device(), op, ": tensors must be on one device, and ", name,
           " is on another one than the tokens; move it there");
}
inline void check_device(const char* op, const Tensor& tokens, const char* name, const MaybeTensor& t) {
  if (t) check_device(op, tokens, name, *t);
}
template <class Number>
  requires std::is_arithmetic_v<Number>
void check_device(const char*, const Tensor&, const char*, Number) {}
#define SB_CHECK_DEVICE(type, name, ...) check_device(op, a.query, #name, a.name)

// -------------------- projections

inline void check_projection(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias = std::nullopt) {
  SB_CHECK(tokens.dim() == 4 && weight.dim() == 4,
           "project: expected tokens (B, H, N, d) and weight (1 or B, heads, outputs, d)");
  check_device("project", tokens, "weight", weight), check_device("project", tokens, "bias", bias);
  SB_CHECK(is_floating(tokens), "project: expected floating-point tokens");
  SB_CHECK(weight.size(3) == tokens.size(3) && (weight.size(0) == 1 || weight.size(0) == tokens.size(0)) &&
               weight.size(1) > 0 && tokens.size(1) % weight.size(1) == 0,
           "project: weight must be (1 or B, a divisor of H, outputs, d)");
  SB_CHECK(tokens.size(1) > 0 && tokens.size(3) > 0 && weight.size(2) > 0,
           "project: heads, d and outputs must be at least 1");
  SB_CHECK(weight.scalar_type() == accumulation_type(tokens),
           "project: expected a float32 weight (float64 for float64 tokens)");
  SB_CHECK(!bias || (has_shape(*bias, {weight.size(0), weight.size(1), weight.size(2)}) &&
                     bias->scalar_type() == weight.scalar_type()),
           "project: bias must have the dtype of weight and its shape without the last dimension");
}

inline void check_packed_projection(const Tensor& tokens, const Tensor& weight, const Tensor& bias) {
  check_projection(tokens, weight, bias);
  SB_CHECK(weight.size(2) >= 2, "project_packed: weight needs rows for coordinates and one for the log scale");
}

inline void check_projection_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight) {
  check_projection(tokens, weight);
  check_device("project_backward", tokens, "grad", grad);
  SB_CHECK(has_shape(grad, {tokens.size(0), tokens.size(1), tokens.size(2), weight.size(2)}) &&
               grad.scalar_type() == weight.scalar_type(),
           "project_backward: grad must have the dtype of weight and shape (B, H, N, outputs)");
}

// -------------------- shared by attention and routing

inline void check_int32(const char* op, const char* name, const MaybeTensor& t, int64_t dim) {
  SB_CHECK(!t || (t->scalar_type() == ScalarType::Int && t->dim() == dim), op, ": ", name, " must be int32 with ", dim,
           " dimensions");
}

inline void check_mask(const char* op, const char* name, const MaybeTensor& mask, int64_t batch, int64_t tokens) {
  SB_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && has_shape(*mask, {batch, tokens})), op, ": ", name,
           " must be bool of shape (", batch, ", ", tokens, ")");
}

inline void check_range(const char* op, const char* name, const MaybeTensor& range, int64_t batch, int64_t tokens) {
  if (!range) return;
  SB_CHECK(range->scalar_type() == ScalarType::Int && has_shape(*range, {batch, 2}), op, ": ", name,
           " must be int32 of shape (", batch, ", 2)");
  if (!range->is_cpu()) return;
  const int32_t* data = static_cast<const int32_t*>(range->data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = data[b * range->stride(0)], end = data[b * range->stride(0) + range->stride(1)];
    SB_CHECK(first >= 0 && first <= end && end <= tokens, op, ": ", name, " of batch row ", b,
             " must be [first, end) within ", tokens, " tokens, got [", first, ", ", end, ")");
  }
}

// Per-row padding masks, valid ranges and causal offset.
template <class Arguments>
void check_padding(const char* op, const Arguments& a) {
  const int64_t batch = a.query.size(0), q_tokens = a.query.size(2), k_tokens = a.key.size(2);
  SB_CHECK(q_tokens < kInt32Limit && k_tokens < kInt32Limit, op, ": more than 2^31 tokens");
  check_mask(op, "query_mask", a.query_mask, batch, q_tokens);
  check_mask(op, "key_mask", a.key_mask, batch, k_tokens);
  check_range(op, "query_range", a.query_range, batch, q_tokens);
  check_range(op, "key_range", a.key_range, batch, k_tokens);
  check_int32(op, "query_offset", a.query_offset, 1);
  SB_CHECK(!a.query_offset || a.query_offset->size(0) == batch, op,
           ": query_offset must have one entry per batch row, expected ", batch);
}

inline void check_low_rank(const char* op, int64_t low_rank) {
  SB_CHECK(low_rank >= 0 && low_rank <= 3, op,
           ": low_rank must be 0 (none), 1 (quadratic), 2 (features) or 3 (centroid)");
}

// Coordinates and log scales of queries and keys: maps (B, H, N, rank + 1), or packed rows with packed_rank.
template <class Arguments>
void check_maps(const char* op, const Arguments& a, ScalarType dtype) {
  SB_CHECK(a.query_map && a.key_map, op, ": a low-rank kernel needs query_map and key_map");
  const Tensor &q = a.query, &k = a.key, &x = *a.query_map, &y = *a.key_map;
  SB_CHECK(a.packed_rank >= 0 && (a.packed_rank == 0 || a.low_rank == 1), op,
           ": packed_rank is for the quadratic kernel (low_rank 1), got ", a.packed_rank, " with low_rank ",
           a.low_rank);
  SB_CHECK(x.dim() == 4 && y.dim() == 4 && x.size(3) == y.size(3) && x.size(3) >= 2, op,
           ": query_map and key_map must be (B, H, N, rank + 1)");
  SB_CHECK(a.packed_rank == 0 || x.size(3) == packed_width(a.packed_rank), op,
           ": query_map and key_map of packed_rank ", a.packed_rank, " must be ", packed_width(a.packed_rank),
           " wide, as project_packed makes them");
  for (int64_t i = 0; i < 3; ++i)
    SB_CHECK(x.size(i) == q.size(i) && y.size(i) == k.size(i), op,
             ": query_map and key_map must have the batch, heads and tokens of query and key");
  SB_CHECK(x.scalar_type() == dtype && y.scalar_type() == dtype, op,
           ": query_map and key_map must be float32 (float64 for float64 inputs)");
}

// Clusters of the keys. What the index holds, the device checks where it reads it.
template <class Arguments>
void check_clusters(const char* op, const Arguments& a, ScalarType dtype) {
  const Tensor &q = a.query, &k = a.key;
  SB_CHECK(a.cluster_index && a.representatives && a.log_mass, op,
           ": low_rank 3 (centroid) needs cluster_index, representatives and log_mass");
  SB_CHECK(!a.is_causal, op, ": low_rank 3 (centroid) needs is_causal=False, since clusters are of all keys");
  const int64_t batch = k.size(0), heads = k.size(1), keys = k.size(2), d = q.size(3);
  SB_CHECK(a.cluster_index->scalar_type() == ScalarType::Int && has_shape(*a.cluster_index, {batch, heads, keys}), op,
           ": cluster_index must be int32 of shape (", batch, ", ", heads, ", ", keys, ")");
  const Tensor& b = *a.representatives;
  SB_CHECK(b.dim() == 4 && has_shape(b, {batch, heads, b.size(2), d}) && b.size(2) >= 1 && b.size(2) <= kSamples, op,
           ": representatives must be (", batch, ", ", heads, ", 1 to ", kSamples, " clusters, ", d, ")");
  SB_CHECK(has_shape(*a.log_mass, {batch, heads, keys}), op, ": log_mass must be (", batch, ", ", heads, ", ", keys,
           ")");
  SB_CHECK(b.scalar_type() == dtype && a.log_mass->scalar_type() == dtype, op,
           ": representatives and log_mass must be float32 (float64 for float64 inputs)");
}

// -------------------- attention

// Lengths are 64-bit, so that no pair of ends wraps around into a short span.
inline void check_span(const Tensor& span, int64_t batch, int64_t blocks, int64_t span_keys) {
  SB_CHECK((span.size(0) == 1 || span.size(0) == batch) && span.size(1) == blocks && span.size(2) == 2,
           "attention: span must be (1 or batch, ", blocks, " query blocks, 2)");
  SB_CHECK(span_keys >= 0 && span_keys < kInt32Limit,
           "attention: span_keys must be at least 0 and fit into 32 bits, got ", span_keys);
  if (!span.is_cpu()) return;
  const int32_t* data = static_cast<const int32_t*>(span.data_ptr());
  for (int64_t row = 0; row < span.size(0) * blocks; ++row) {
    const int32_t* at = data + row / blocks * span.stride(0) + row % blocks * span.stride(1);
    const int64_t lo = at[0], hi = at[span.stride(2)];
    SB_CHECK(hi - lo <= span_keys, "attention: a span of ", hi - lo, " keys is longer than span_keys = ", span_keys);
  }
}

inline void check_lists(const AttentionArguments& a) {
  check_int32("attention", "index", a.index, 4);
  check_int32("attention", "count", a.count, 3);
  check_int32("attention", "span", a.span, 3);
  check_int32("attention", "query_order", a.query_order, 3);
  SB_CHECK(a.index.has_value() == a.count.has_value(), "attention: index and count come together");
  const int64_t batch = a.query.size(0), heads = a.query.size(1), tokens = a.query.size(2),
                blocks = (tokens + a.block_q - 1) / a.block_q;
  if (a.index) {
    SB_CHECK(a.index->size(0) == batch && a.index->size(1) > 0 && heads % a.index->size(1) == 0 &&
                 a.index->size(2) == blocks,
             "attention: index must be (batch, heads, ", blocks, " query blocks, capacity)");
    SB_CHECK(has_shape(*a.count, {batch, a.index->size(1), blocks}),
             "attention: count must have the shape of index without its last dimension");
  }
  if (a.span) check_span(*a.span, batch, blocks, a.span_keys);
  SB_CHECK(a.span_sinks >= 0 && a.span_sinks < kInt32Limit && (a.span || a.span_sinks == 0),
           "attention: span_sinks must be at least 0, fit into 32 bits and come with a span, got ", a.span_sinks);
  SB_CHECK(!a.query_order || (a.query_order->size(1) > 0 && heads % a.query_order->size(1) == 0 &&
                              has_shape(*a.query_order, {batch, a.query_order->size(1), tokens})),
           "attention: query_order must be (batch, heads, queries)");
}

inline void check_attention(const AttentionArguments& a) {
  const Tensor &q = a.query, &k = a.key, &v = a.value;
  const char* const op = "attention";
  SB_ATTENTION(SB_CHECK_DEVICE, SB_SEMICOLON);
  SB_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
           "attention: query, key and value must be (batch, heads, tokens, head_dim)");
  SB_CHECK(is_floating(q) && q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
           "attention: query, key and value must share one floating-point dtype");
  SB_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) &&
               k.size(3) == q.size(3),
           "attention: shapes of query, key and value do not fit together");
  SB_CHECK(k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0,
           "attention: the heads of query must be a multiple of those of key");
  SB_CHECK(q.size(3) > 0 && v.size(3) > 0, "attention: head_dim must be at least 1");
  SB_CHECK(a.block_q >= 1 && a.block_k >= 1 && a.block_q < kInt32Limit && a.block_k < kInt32Limit,
           "attention: block_q and block_k must be at least 1 and fit into 32 bits");
  check_low_rank("attention", a.low_rank);
  SB_CHECK(!a.query_order || !a.is_causal, "attention: query_order needs is_causal=False");
  check_padding("attention", a);
  check_lists(a);
  const bool has_clusters = a.low_rank == int64_t(LowRank::kCentroid);
  if (has_clusters) {
    check_clusters("attention", a, accumulation_type(q));
    SB_CHECK(a.query_mean && has_shape(*a.query_mean, {k.size(0), k.size(1), k.size(3)}) &&
                 a.query_mean->scalar_type() == accumulation_type(q),
             "attention: low_rank 3 (centroid) needs query_mean (", k.size(0), ", ", k.size(1), ", ", k.size(3),
             "), float32 (float64 for float64 inputs)");
  }
  SB_CHECK(
      has_clusters || (!a.cluster_index && !a.representatives && !a.log_mass && !a.query_mean),
      "attention: cluster_index, representatives, log_mass and query_mean need low_rank 3 (centroid), got low_rank ",
      a.low_rank);
  if (a.low_rank != 0 && !has_clusters) return check_maps("attention", a, accumulation_type(q));
  SB_CHECK(!a.query_map && !a.key_map && a.packed_rank == 0,
           "attention: query_map, key_map and packed_rank need low_rank 1 (quadratic) or 2 (features), got low_rank ",
           a.low_rank);
}

// Results of the forward pass and their gradients.
inline void check_attention_backward(const AttentionArguments& a, const Tensor& d_out, const MaybeTensor& d_lse,
                                     const Tensor& out, const Tensor& lse) {
  check_attention(a);
  const char* const op = "attention_backward";
  SB_SAVED(SB_CHECK_DEVICE, SB_SEMICOLON);
  check_device(op, a.query, "out", out), check_device(op, a.query, "lse", lse);
  check_device(op, a.query, "d_out", d_out), check_device(op, a.query, "d_lse", d_lse);
  const int64_t batch = a.query.size(0), heads = a.query.size(1), tokens = a.query.size(2), width = a.value.size(3);
  SB_CHECK(is_floating(out) && has_shape(out, {batch, heads, tokens, width}) && is_floating(d_out) &&
               has_shape(d_out, {batch, heads, tokens, width}),
           "attention_backward: out and d_out must be floating-point of shape (", batch, ", ", heads, ", ", tokens,
           ", ", width, ")");
  const ScalarType dtype = accumulation_type(a.query);
  SB_CHECK(lse.scalar_type() == dtype && has_shape(lse, {batch, heads, tokens}) &&
               (!d_lse || (d_lse->scalar_type() == dtype && has_shape(*d_lse, {batch, heads, tokens}))),
           "attention_backward: lse and d_lse must be float32 (float64 for float64 inputs) of shape (", batch, ", ",
           heads, ", ", tokens, ")");
  SB_CHECK(a.query_map || (!a.query_weight && !a.key_weight),
           "attention_backward: query_weight and key_weight need query_map and key_map");
  const auto check_weight = [&](const MaybeTensor& weight, const Tensor& of, const MaybeTensor& map) {
    if (!weight) return;
    check_projection(of, *weight);
    SB_CHECK(weight->size(2) == (a.packed_rank ? a.packed_rank + 1 : map->size(3)),
             "attention_backward: query_weight and key_weight must have a row for every column of the map");
  };
  check_weight(a.query_weight, a.query, a.query_map), check_weight(a.key_weight, a.key, a.key_map);
}

inline void check_shape(const AttentionShape& s) {
  SB_CHECK(s.batch >= 0 && s.q_heads >= 0 && s.q_tokens >= 0 && s.head_dim >= 0 && s.kv_heads >= 0 && s.k_tokens >= 0 &&
               s.value_dim >= 0 && s.rank >= 0 && s.listed_keys >= 0 && s.block_q >= 1,
           "saved_sizes: expected sizes of at least 0 and block_q of at least 1");
  check_low_rank("saved_sizes", s.low_rank);
}

// -------------------- clustering

// The tokens of an operator that reads queries and keys of whole sequences.
template <class Arguments>
void check_whole_sequences(const char* op, const Arguments& a) {
  const Tensor &q = a.query, &k = a.key;
  SB_CHECK(q.dim() == 4 && k.dim() == 4, op, ": query and key must be (batch, heads, tokens, head_dim)");
  SB_CHECK(is_floating(q) && q.scalar_type() == k.scalar_type(), op,
           ": query and key must share one floating-point dtype");
  SB_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3) && q.size(3) > 0 && k.size(1) > 0 && q.size(1) > 0 &&
               q.size(1) % k.size(1) == 0,
           op, ": shapes of query and key do not fit together");
  SB_CHECK(!a.query_offset, op,
           ": query_offset is for causal calls, and this one is of the whole sequence; expected None");
  check_padding(op, a);
}

inline void check_cluster(const ClusterArguments& a) {
  const char* const op = "cluster";
  SB_CLUSTER(SB_CHECK_DEVICE, SB_SEMICOLON);
  check_whole_sequences(op, a);
  SB_CHECK(a.clusters >= 1 && a.clusters <= kSamples, "cluster: clusters must be from 1 to ", kSamples, ", got ",
           a.clusters);
}

// -------------------- projections fitted to the tokens

inline void check_input_projection(const InputProjectionArguments& a) {
  const char* const op = "input_projection";
  SB_INPUT_PROJECTION(SB_CHECK_DEVICE, SB_SEMICOLON);
  check_whole_sequences(op, a);
  SB_CHECK(a.rank >= 1 && a.rank <= a.query.size(3), op, ": expected a rank from 1 to head_dim = ", a.query.size(3),
           ", got ", a.rank);
}

// -------------------- routing

// Keys of every query head. What they are, the device looks at where it is not the CPU.
inline void check_head_keys(const Tensor& head_keys, int64_t heads, const RouteArguments& a) {
  SB_CHECK(head_keys.scalar_type() == ScalarType::Int && has_shape(head_keys, {1, heads}),
           "route: head_keys must be int32 of shape (1, ", heads, "), a number of keys for every query head");
  if (!head_keys.is_cpu()) return;
  const int64_t near = a.block_k > 1 || a.window > 0 ? a.window : a.block_q, least = near + pad_to(a.sinks, a.block_k);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t keys = static_cast<const int32_t*>(head_keys.data_ptr())[h * head_keys.stride(1)];
    SB_CHECK(keys >= least && keys <= a.keys, "route: expected head_keys from ", least,
             ", what the window and the sinks take, to keys = ", a.keys, ", got ", keys, " for head ", h);
  }
}

inline void check_route(const RouteArguments& a) {
  const Tensor &q = a.query, &k = a.key;
  const char* const op = "route";
  SB_ROUTE(SB_CHECK_DEVICE, SB_SEMICOLON);
  SB_CHECK(q.dim() == 4 && k.dim() == 4, "route: query and key must be (batch, heads, tokens, head_dim)");
  SB_CHECK(is_floating(q) && is_floating(k), "route: query and key must be floating-point");
  SB_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3) && q.size(3) > 0 && k.size(1) > 0 && q.size(1) > 0 &&
               q.size(1) % k.size(1) == 0,
           "route: shapes of query and key do not fit together");
  SB_CHECK(a.keys < kInt32Limit, "route: keys must fit into 32 bits, got ", a.keys);
  SB_CHECK(a.window >= 0 && a.window <= a.keys && a.sinks >= 0 && a.sinks <= a.keys,
           "route: expected window and sinks between 0 and keys, got keys ", a.keys, ", window ", a.window, ", sinks ",
           a.sinks);
  const bool pooled = a.block_k == 1 && (a.block_q == 8 || a.block_q == 16 || a.block_q == 32) &&
                      (a.window == 0 || a.window >= a.block_q) &&
                      a.keys >= (a.window == 0 ? a.block_q : a.window) + a.sinks;
  const bool per_query = a.block_k == 8 && a.block_q == 1 && a.keys >= 8 && a.keys % 8 == 0 && a.window % 8 == 0 &&
                         a.keys >= a.window + pad_to(a.sinks, 8);
  SB_CHECK(pooled || per_query,
           "route: expected block_q 8, 16 or 32 with block_k 1, window 0 or at least block_q, and keys >= "
           "max(window, block_q) + sinks; or block_q 1 with block_k 8, keys and window in multiples of 8, and keys >= "
           "window + sinks rounded up to 8; got block_q ",
           a.block_q, ", block_k ", a.block_k, ", keys ", a.keys, ", window ", a.window, ", sinks ", a.sinks);
  SB_CHECK(a.pools == 1 || a.pools == 2 || (a.pools == 0 && per_query),
           "route: expected 1 or 2 pools, or 0 with block_k 8, got ", a.pools, " with block_k ", a.block_k);
  if (a.head_keys) check_head_keys(*a.head_keys, q.size(1), a);
  check_low_rank("route", a.low_rank);
  check_padding("route", a);
  if (a.low_rank == 0 || !pooled) return;  // per-query routing reads neither maps nor clusters
  if (a.low_rank == int64_t(LowRank::kCentroid))
    check_clusters("route", a, ScalarType::Float);
  else
    check_maps("route", a, ScalarType::Float);
}

#undef SB_CHECK_DEVICE

}  // namespace sb

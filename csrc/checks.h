// Second line of argument checks, once, for every device. The first line is scatterbrain.functional, which raises
// ValueError and TypeError before anything runs; these hold for callers of the operators themselves.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "params.h"

namespace sb {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Names of the operator schema; a field that is empty was not given.
struct AttentionArguments {
  Tensor query, key, value;
  std::optional<Tensor> query_map, key_map, index, count, span, query_order, query_mask, key_mask, query_range,
      key_range, query_offset;
  int64_t low_rank, block_q, block_k, span_keys;
  bool is_causal;
  double scale;
  int64_t packed_rank;
  // Of the backward pass: what the forward pass kept, and projections that made the maps, whose gradients then go on to
  // query and key.
  std::optional<Tensor> state = std::nullopt, scores = std::nullopt, query_weight = std::nullopt,
                        key_weight = std::nullopt;
  bool is_trained = false;  // of the forward pass: whether a backward pass follows, for which it may keep things
};

// Of quadratic_attention: projections, routing where keys > 0, and the rest; `attention` lacks the tokens, their maps
// and what is routed.
struct QuadraticArguments {
  Tensor query_weight, query_bias, key_weight, key_bias;
  int64_t keys, window;
  AttentionArguments attention;
};

struct RouteArguments {
  Tensor query, key;
  std::optional<Tensor> query_map, key_map, query_mask, key_mask, query_range, key_range, query_offset;
  int64_t low_rank, keys, block_q, block_k, window;
  bool is_causal;
  double scale;
  int64_t packed_rank;
};

inline bool is_floating(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  return s == ScalarType::Float || s == ScalarType::Double || s == ScalarType::BFloat16 || s == ScalarType::Half;
}
inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != int64_t(sizes.size())) return false;
  int64_t i = 0;
  for (const int64_t size : sizes)
    if (t.size(i++) != size) return false;
  return true;
}

// Coordinates and log scales of queries and keys: maps (B, H, N, rank + 1), or with packed_rank packed rows.
inline void check_maps(const char* op, const Tensor& q, const Tensor& k, const Tensor& x, const Tensor& y,
                       int64_t low_rank, int64_t packed_rank, ScalarType dtype) {
  STD_TORCH_CHECK(packed_rank >= 0 && (packed_rank == 0 || low_rank == 1), op,
                  ": packed_rank is for the quadratic kernel (low_rank 1), got ", packed_rank, " with low_rank ",
                  low_rank);
  STD_TORCH_CHECK(x.dim() == 4 && y.dim() == 4 && x.size(3) == y.size(3) && x.size(3) >= 2, op,
                  ": query_map and key_map must be (B, H, N, rank + 1)");
  STD_TORCH_CHECK(packed_rank == 0 || x.size(3) == packed_width(packed_rank), op,
                  ": query_map and key_map of packed_rank ", packed_rank, " must be ", packed_width(packed_rank),
                  " wide, as project_packed makes them");
  for (int64_t i = 0; i < 3; ++i)
    STD_TORCH_CHECK(x.size(i) == q.size(i) && y.size(i) == k.size(i), op,
                    ": query_map and key_map must have the batch, heads and tokens of query and key");
  STD_TORCH_CHECK(x.scalar_type() == dtype && y.scalar_type() == dtype, op,
                  ": query_map and key_map must be float32 (float64 for float64 inputs)");
}

inline void check_projection(const Tensor& tokens, const Tensor& weight) {
  STD_TORCH_CHECK(tokens.dim() == 4 && weight.dim() == 4,
                  "project: expected tokens (B, H, N, d) and weight (1 or B, heads, outputs, d)");
  STD_TORCH_CHECK(is_floating(tokens), "project: expected floating-point tokens");
  STD_TORCH_CHECK(weight.size(3) == tokens.size(3) && (weight.size(0) == 1 || weight.size(0) == tokens.size(0)) &&
                      weight.size(1) > 0 && tokens.size(1) % weight.size(1) == 0,
                  "project: weight must be (1 or B, a divisor of H, outputs, d)");
  STD_TORCH_CHECK(tokens.size(1) > 0 && tokens.size(3) > 0 && weight.size(2) > 0,
                  "project: heads, d and outputs must be at least 1");
  STD_TORCH_CHECK(weight.scalar_type() == accumulation_type(tokens),
                  "project: expected a float32 weight (float64 for float64 tokens)");
}
inline void check_projection_bias(const Tensor& weight, const std::optional<Tensor>& bias) {
  if (!bias) return;
  STD_TORCH_CHECK(
      has_shape(*bias, {weight.size(0), weight.size(1), weight.size(2)}) && bias->scalar_type() == weight.scalar_type(),
      "project: bias must have the dtype of weight and its shape without the last dimension");
}
inline void check_projection_gradient(const Tensor& grad, const Tensor& tokens, const Tensor& weight) {
  STD_TORCH_CHECK(has_shape(grad, {tokens.size(0), tokens.size(1), tokens.size(2), weight.size(2)}) &&
                      grad.scalar_type() == weight.scalar_type(),
                  "project_backward: grad must have the dtype of weight and shape (B, H, N, outputs)");
}

inline void check_int32(const char* op, const char* name, const std::optional<Tensor>& t, int64_t dim) {
  if (t)
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->dim() == dim, op, ": ", name, " must be int32 with ", dim,
                    " dimensions");
}
inline void check_mask(const char* op, const char* name, const std::optional<Tensor>& mask, int64_t batch,
                       int64_t tokens) {
  if (!mask) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && has_shape(*mask, {batch, tokens}), op, ": ", name,
                  " must be bool of shape (", batch, ", ", tokens, ")");
}
// The contents are read on the CPU only: on a device that would wait for it.
inline void check_range(const char* op, const char* name, const std::optional<Tensor>& range, int64_t batch,
                        int64_t tokens) {
  if (!range) return;
  STD_TORCH_CHECK(range->scalar_type() == ScalarType::Int && has_shape(*range, {batch, 2}), op, ": ", name,
                  " must be int32 of shape (", batch, ", 2)");
  if (!range->is_cpu()) return;
  const int32_t* data = static_cast<const int32_t*>(range->data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = data[b * range->stride(0)], end = data[b * range->stride(0) + range->stride(1)];
    STD_TORCH_CHECK(first >= 0 && first <= end && end <= tokens, op, ": ", name, " of batch row ", b,
                    " must be [first, end) within ", tokens, " tokens, got [", first, ", ", end, ")");
  }
}

// What says which tokens of a row exist, the same for attention and routing.
template <class Arguments>
void check_rows(const char* op, const Arguments& a) {
  const int64_t batch = a.query.size(0), q_tokens = a.query.size(2), k_tokens = a.key.size(2);
  STD_TORCH_CHECK(q_tokens < (int64_t(1) << 31) && k_tokens < (int64_t(1) << 31), op, ": more than 2^31 tokens");
  check_mask(op, "query_mask", a.query_mask, batch, q_tokens);
  check_mask(op, "key_mask", a.key_mask, batch, k_tokens);
  check_range(op, "query_range", a.query_range, batch, q_tokens);
  check_range(op, "key_range", a.key_range, batch, k_tokens);
  check_int32(op, "query_offset", a.query_offset, 1);
  if (a.query_offset)
    STD_TORCH_CHECK(a.query_offset->size(0) == batch, op, ": query_offset must have one entry per batch row, expected ",
                    batch);
}

// Lengths are told apart in 64 bits, so that no pair of ends can pretend to be a short span; contents are read on the
// CPU only.
inline void check_span(const Tensor& span, int64_t batch, int64_t blocks, int64_t span_keys) {
  STD_TORCH_CHECK((span.size(0) == 1 || span.size(0) == batch) && span.size(1) == blocks && span.size(2) == 2,
                  "attention: span must be (1 or batch, ", blocks, " query blocks, 2)");
  STD_TORCH_CHECK(span_keys >= 0 && span_keys < (int64_t(1) << 31),
                  "attention: span_keys must be at least 0 and fit into 32 bits, got ", span_keys);
  if (!span.is_cpu()) return;
  const int32_t* data = static_cast<const int32_t*>(span.data_ptr());
  for (int64_t row = 0; row < span.size(0) * blocks; ++row) {
    const int32_t* at = data + row / blocks * span.stride(0) + row % blocks * span.stride(1);
    const int64_t lo = at[0], hi = at[span.stride(2)];
    STD_TORCH_CHECK(hi - lo <= span_keys, "attention: a span of ", hi - lo,
                    " keys is longer than span_keys = ", span_keys);
  }
}

inline void check_attention(const AttentionArguments& a) {
  const Tensor &q = a.query, &k = a.key, &v = a.value;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "attention: query, key and value must be (batch, heads, tokens, head_dim)");
  STD_TORCH_CHECK(is_floating(q) && q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "attention: query, key and value must share one floating-point dtype");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) &&
                      k.size(2) == v.size(2) && k.size(3) == q.size(3),
                  "attention: shapes of query, key and value do not fit together");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0,
                  "attention: the heads of query must be a multiple of those of key");
  STD_TORCH_CHECK(q.size(3) > 0 && v.size(3) > 0, "attention: head_dim must be at least 1");
  constexpr int64_t limit = int64_t(1) << 31;
  STD_TORCH_CHECK(a.block_q >= 1 && a.block_k >= 1 && a.block_q < limit && a.block_k < limit,
                  "attention: block_q and block_k must be at least 1 and fit into 32 bits");
  STD_TORCH_CHECK(a.low_rank >= 0 && a.low_rank <= 2,
                  "attention: low_rank must be 0 (none), 1 (quadratic) or 2 (features)");
  STD_TORCH_CHECK(!a.query_order || !a.is_causal, "attention: query_order needs is_causal=False");
  check_rows("attention", a);
  check_int32("attention", "index", a.index, 4);
  check_int32("attention", "count", a.count, 3);
  check_int32("attention", "span", a.span, 3);
  check_int32("attention", "query_order", a.query_order, 3);
  STD_TORCH_CHECK(a.index.has_value() == a.count.has_value(), "attention: index and count come together");
  const int64_t blocks = (q.size(2) + a.block_q - 1) / a.block_q;
  if (a.index) {
    STD_TORCH_CHECK(a.index->size(0) == q.size(0) && a.index->size(1) > 0 && q.size(1) % a.index->size(1) == 0 &&
                        a.index->size(2) == blocks,
                    "attention: index must be (batch, heads, ", blocks, " query blocks, capacity)");
    STD_TORCH_CHECK(has_shape(*a.count, {a.index->size(0), a.index->size(1), blocks}),
                    "attention: count must have the shape of index without its last dimension");
  }
  if (a.span) check_span(*a.span, q.size(0), blocks, a.span_keys);
  if (a.query_order)
    STD_TORCH_CHECK(a.query_order->size(1) > 0 && q.size(1) % a.query_order->size(1) == 0 &&
                        has_shape(*a.query_order, {q.size(0), a.query_order->size(1), q.size(2)}),
                    "attention: query_order must be (batch, heads, queries)");
  if (a.low_rank == 0) {
    STD_TORCH_CHECK(!a.query_map && !a.key_map,
                    "attention: query_map and key_map need a low-rank kernel, got low_rank 0");
  } else {
    STD_TORCH_CHECK(a.query_map && a.key_map, "attention: a low-rank kernel needs query_map and key_map");
    check_maps("attention", q, k, *a.query_map, *a.key_map, a.low_rank, a.packed_rank, accumulation_type(q));
  }
}

// What the backward pass is given on top: results of the forward pass and their gradients.
inline void check_attention_backward(const AttentionArguments& a, const Tensor& d_out,
                                     const std::optional<Tensor>& d_lse, const Tensor& out, const Tensor& lse) {
  const int64_t batch = a.query.size(0), heads = a.query.size(1), tokens = a.query.size(2), width = a.value.size(3);
  STD_TORCH_CHECK(is_floating(out) && has_shape(out, {batch, heads, tokens, width}) && is_floating(d_out) &&
                      has_shape(d_out, {batch, heads, tokens, width}),
                  "attention_backward: out and d_out must be floating-point of shape (", batch, ", ", heads, ", ",
                  tokens, ", ", width, ")");
  const ScalarType dtype = accumulation_type(a.query);
  STD_TORCH_CHECK(lse.scalar_type() == dtype && has_shape(lse, {batch, heads, tokens}) &&
                      (!d_lse || (d_lse->scalar_type() == dtype && has_shape(*d_lse, {batch, heads, tokens}))),
                  "attention_backward: lse and d_lse must be float32 (float64 for float64 inputs) of shape (", batch,
                  ", ", heads, ", ", tokens, ")");
  STD_TORCH_CHECK(a.low_rank != 0 || (!a.query_weight && !a.key_weight),
                  "attention_backward: query_weight and key_weight need a low-rank kernel, got low_rank 0");
  const auto check_weight = [&](const std::optional<Tensor>& weight, const Tensor& of, const Tensor& map) {
    if (!weight) return;
    check_projection(of, *weight);
    STD_TORCH_CHECK(weight->size(2) == (a.packed_rank ? a.packed_rank + 1 : map.size(3)),
                    "attention_backward: query_weight and key_weight must have a row for every column of the map");
  };
  if (a.low_rank != 0)
    check_weight(a.query_weight, a.query, *a.query_map), check_weight(a.key_weight, a.key, *a.key_map);
}

inline void check_route(const RouteArguments& a) {
  const Tensor &q = a.query, &k = a.key;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "route: query and key must be (batch, heads, tokens, head_dim)");
  STD_TORCH_CHECK(is_floating(q) && is_floating(k), "route: query and key must be floating-point");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3) && q.size(3) > 0 && k.size(1) > 0 && q.size(1) > 0 &&
                      q.size(1) % k.size(1) == 0,
                  "route: shapes of query and key do not fit together");
  STD_TORCH_CHECK(a.keys < (int64_t(1) << 31), "route: keys must fit into 32 bits, got ", a.keys);
  const bool pooled =
      a.block_k == 1 && (a.block_q == 8 || a.block_q == 16 || a.block_q == 32) && a.window == 0 && a.keys >= a.block_q;
  const bool per_query = a.block_k == 8 && a.block_q == 1 && a.window >= 0 && a.keys >= a.window && a.keys >= 8 &&
                         a.keys % 8 == 0 && a.window % 8 == 0;
  STD_TORCH_CHECK(pooled || per_query,
                  "route: expected block_q 8, 16 or 32 with block_k 1, window 0 and keys >= block_q, or block_q 1 with "
                  "block_k 8 and multiples of 8, keys >= window >= 0");
  STD_TORCH_CHECK(a.low_rank >= 0 && a.low_rank <= 2,
                  "route: low_rank must be 0 (none), 1 (quadratic) or 2 (features)");
  check_rows("route", a);
  if (a.low_rank != 0 && pooled) {
    STD_TORCH_CHECK(a.query_map && a.key_map, "route: a low-rank kernel needs query_map and key_map");
    check_maps("route", q, k, *a.query_map, *a.key_map, a.low_rank, a.packed_rank, ScalarType::Float);
  }
}

}  // namespace sb

// Second line of argument checks, once, for every device. The first line is scatterbrain.functional, which raises ValueError and TypeError before anything
// runs; these hold for callers of the operators themselves.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace sb {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// Names of the operator schema; a field that is empty was not given.
struct AttentionArguments {
  Tensor query, key, value;
  std::optional<Tensor> query_map, key_map, index, count, span, query_order, query_mask, key_mask, query_range, key_range, query_offset;
  int64_t low_rank, block_q, block_k, span_keys;
  bool is_causal;
  double scale;
};

struct RouteArguments {
  Tensor query, key;
  std::optional<Tensor> query_map, key_map, query_mask, key_mask, query_range, key_range, query_offset;
  int64_t low_rank, keys, block_q, block_k, window;
  bool is_causal;
  double scale;
};

inline bool is_floating(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  return s == ScalarType::Float || s == ScalarType::Double || s == ScalarType::BFloat16 || s == ScalarType::Half;
}
inline ScalarType accumulation_type(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline void check_projection(const Tensor& tokens, const Tensor& weight) {
  STD_TORCH_CHECK(tokens.dim() == 4 && weight.dim() == 4, "project: expected tokens (B, H, N, d) and weight (1 or B, heads, outputs, d)");
  STD_TORCH_CHECK(is_floating(tokens), "project: expected floating-point tokens");
  STD_TORCH_CHECK(weight.size(3) == tokens.size(3) && (weight.size(0) == 1 || weight.size(0) == tokens.size(0)) && weight.size(1) > 0 &&
                      tokens.size(1) % weight.size(1) == 0,
                  "project: weight must be (1 or B, a divisor of H, outputs, d)");
  STD_TORCH_CHECK(weight.scalar_type() == accumulation_type(tokens), "project: expected a float32 weight (float64 for float64 tokens)");
}

inline void check_mask(const char* name, const std::optional<Tensor>& mask, int64_t batch, int64_t tokens) {
  if (!mask) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == tokens, "attention: ", name,
                  " must be bool of shape (", batch, ", ", tokens, ")");
}
inline void check_int32(const char* name, const std::optional<Tensor>& t, int64_t dim) {
  if (t) STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->dim() == dim, "attention: ", name, " must be int32 with ", dim, " dimensions");
}

inline void check_attention(const AttentionArguments& a) {
  const Tensor &q = a.query, &k = a.key, &v = a.value;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: query, key and value must be (batch, heads, tokens, head_dim)");
  STD_TORCH_CHECK(is_floating(q) && q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "attention: query, key and value must share one floating-point dtype");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) && k.size(3) == q.size(3),
                  "attention: shapes of query, key and value do not fit together");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "attention: the heads of query must be a multiple of those of key");
  STD_TORCH_CHECK(q.size(2) < (int64_t(1) << 31) && k.size(2) < (int64_t(1) << 31), "attention: more than 2^31 tokens");
  STD_TORCH_CHECK(a.block_q >= 1 && a.block_k >= 1, "attention: block_q and block_k must be at least 1");
  STD_TORCH_CHECK(a.low_rank >= 0 && a.low_rank <= 2, "attention: low_rank must be 0 (none), 1 (quadratic) or 2 (features)");
  STD_TORCH_CHECK(!a.query_order || !a.is_causal, "attention: query_order needs is_causal=False");
  check_mask("query_mask", a.query_mask, q.size(0), q.size(2));
  check_mask("key_mask", a.key_mask, q.size(0), k.size(2));
  check_int32("query_range", a.query_range, 2);
  check_int32("key_range", a.key_range, 2);
  check_int32("query_offset", a.query_offset, 1);
  check_int32("index", a.index, 4);
  check_int32("count", a.count, 3);
  check_int32("span", a.span, 3);
  check_int32("query_order", a.query_order, 3);
  const int64_t blocks = (q.size(2) + a.block_q - 1) / a.block_q;
  if (a.index) {
    STD_TORCH_CHECK(a.count.has_value(), "attention: index needs count");
    STD_TORCH_CHECK(a.index->size(0) == q.size(0) && a.index->size(1) > 0 && q.size(1) % a.index->size(1) == 0 && a.index->size(2) == blocks,
                    "attention: index must be (batch, heads, ", blocks, " query blocks, capacity)");
    for (int64_t i = 0; i < 3; ++i) STD_TORCH_CHECK(a.count->size(i) == a.index->size(i), "attention: count must have the shape of index without its last dimension");
  }
  if (a.span)
    STD_TORCH_CHECK((a.span->size(0) == 1 || a.span->size(0) == q.size(0)) && a.span->size(1) == blocks && a.span->size(2) == 2, "attention: span must be (1 or batch, ",
                    blocks, " query blocks, 2)");
  if (a.low_rank != 0) {
    STD_TORCH_CHECK(a.query_map && a.key_map, "attention: a low-rank kernel needs query_map and key_map");
    const Tensor &x = *a.query_map, &y = *a.key_map;
    STD_TORCH_CHECK(x.dim() == 4 && y.dim() == 4 && x.size(3) == y.size(3) && x.size(3) >= 2, "attention: query_map and key_map must be (B, H, N, rank + 1)");
    for (int64_t i = 0; i < 3; ++i)
      STD_TORCH_CHECK(x.size(i) == q.size(i) && y.size(i) == k.size(i), "attention: query_map and key_map must have the batch, heads and tokens of query and key");
    STD_TORCH_CHECK(x.scalar_type() == accumulation_type(q) && y.scalar_type() == accumulation_type(q),
                    "attention: query_map and key_map must be float32 (float64 for float64 inputs)");
  }
}

inline void check_route(const RouteArguments& a) {
  const Tensor &q = a.query, &k = a.key;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "route: query and key must be (batch, heads, tokens, head_dim)");
  STD_TORCH_CHECK(is_floating(q) && is_floating(k), "route: query and key must be floating-point");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3) && q.size(3) > 0 && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                  "route: shapes of query and key do not fit together");
  STD_TORCH_CHECK(q.size(2) < (int64_t(1) << 31) && k.size(2) < (int64_t(1) << 31), "route: more than 2^31 tokens");
  const bool pooled = a.block_k == 1 && (a.block_q == 8 || a.block_q == 16 || a.block_q == 32) && a.window == 0 && a.keys >= a.block_q;
  const bool per_query = a.block_k == 8 && a.block_q == 1 && a.window >= 0 && a.keys >= a.window && a.keys >= 8 && a.keys % 8 == 0 && a.window % 8 == 0;
  STD_TORCH_CHECK(pooled || per_query,
                  "route: expected block_q 8, 16 or 32 with block_k 1, window 0 and keys >= block_q, or block_q 1 with block_k 8 and multiples of 8, keys >= window >= 0");
  STD_TORCH_CHECK(a.low_rank >= 0 && a.low_rank <= 2, "route: low_rank must be 0 (none), 1 (quadratic) or 2 (features)");
  check_mask("query_mask", a.query_mask, q.size(0), q.size(2));
  check_mask("key_mask", a.key_mask, q.size(0), k.size(2));
  check_int32("query_range", a.query_range, 2);
  check_int32("key_range", a.key_range, 2);
  check_int32("query_offset", a.query_offset, 1);
  if (a.low_rank != 0 && pooled) {
    STD_TORCH_CHECK(a.query_map && a.key_map, "route: a low-rank kernel needs query_map and key_map");
    const Tensor &x = *a.query_map, &y = *a.key_map;
    STD_TORCH_CHECK(x.dim() == 4 && y.dim() == 4 && x.size(3) == y.size(3) && x.size(3) >= 2 && x.scalar_type() == ScalarType::Float &&
                        y.scalar_type() == ScalarType::Float,
                    "route: query_map and key_map must be float32 of shape (B, H, N, rank + 1)");
    for (int64_t i = 0; i < 3; ++i)
      STD_TORCH_CHECK(x.size(i) == q.size(i) && y.size(i) == k.size(i), "route: query_map and key_map must have the batch, heads and tokens of query and key");
  }
}

}  // namespace sb

#include "second_pass.h"

namespace sb::cpu {

Tensor head_of(Tensor t, int64_t b, int64_t h) {
  t = torch::stable::narrow(t, 0, b, 1);
  return torch::stable::narrow(t, 1, h, 1);
}

AttentionArguments one_head(const AttentionArguments& a, int64_t b, int64_t h, const uint8_t* flags) {
  const int64_t q_heads = a.query.size(1), kv_heads = a.key.size(1), kv = h / (q_heads / kv_heads);
  const auto take_row = [&](MaybeTensor& t) {
    if (t && t->size(0) > 1) t = torch::stable::narrow(*t, 0, b, 1);
  };
  // The tensor may have one row for the whole batch, and fewer heads, each for several of the `heads`.
  const auto take_head = [&](MaybeTensor& t, int64_t head, int64_t heads) {
    if (t) t = head_of(*t, t->size(0) == 1 ? 0 : b, head * t->size(1) / heads);
  };
  AttentionArguments one = a;
  one.state = one.scores = std::nullopt;  // they hold other queries too, in another type
  one.query = head_of(a.query, b, h), one.key = head_of(a.key, b, kv), one.value = head_of(a.value, b, kv);
  take_head(one.query_map, h, q_heads), take_head(one.query_weight, h, q_heads);
  take_head(one.key_map, kv, kv_heads), take_head(one.key_weight, kv, kv_heads);
  take_head(one.cluster_index, kv, kv_heads), take_head(one.representatives, kv, kv_heads);
  take_head(one.log_mass, kv, kv_heads), take_head(one.query_mean, kv, kv_heads);
  take_head(one.index, h, q_heads), take_head(one.count, h, q_heads), take_head(one.query_order, h, q_heads);
  take_row(one.span), take_row(one.key_mask);
  take_row(one.query_range), take_row(one.key_range), take_row(one.query_offset);
  one.query_mask = torch::stable::empty({1, a.query.size(2)}, ScalarType::Byte);
  auto* mask = static_cast<uint8_t*>(one.query_mask->data_ptr());
  for (int64_t i = 0; i < a.query.size(2); ++i) mask[i] = !flags[i];
  return one;
}

}  // namespace sb::cpu

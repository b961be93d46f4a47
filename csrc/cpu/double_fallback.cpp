#include "double_fallback.h"

namespace sb {

template <class T>
CancelledQueries<T>::CancelledQueries(AttentionParams& p) : heads(p.q_heads), tokens(p.q_tokens) {
  if (std::is_same_v<T, double> || p.low_rank == LowRank::kNone) return;
  flags.resize(size_t(p.batch * heads * tokens));
  p.needs_double = flags.data();
}
template class CancelledQueries<float>;
template class CancelledQueries<double>;

Tensor head_of(Tensor t, int64_t b, int64_t h) {
  t = torch::stable::narrow(t, 0, b, 1);
  return torch::stable::narrow(t, 1, h, 1);
}

AttentionArguments one_head(const AttentionArguments& a, int64_t b, int64_t h, const uint8_t* flags) {
  const int64_t q_heads = a.query.size(1), kv = h / (q_heads / a.key.size(1));
  const auto per_row = [&](std::optional<Tensor>& t) {
    if (t && t->size(0) > 1) t = torch::stable::narrow(*t, 0, b, 1);
  };
  const auto per_head = [&](std::optional<Tensor>& t) {  // of as many heads as the list has
    if (t) t = head_of(*t, b, h * t->size(1) / q_heads);
  };
  AttentionArguments one = a;
  one.state = one.scores = std::nullopt;  // of other queries, and in another type
  one.query = head_of(a.query, b, h), one.key = head_of(a.key, b, kv), one.value = head_of(a.value, b, kv);
  const auto of_head = [&](std::optional<Tensor>& t, int64_t head, int64_t heads) {
    if (t) t = head_of(*t, t->size(0) == 1 ? 0 : b, head * t->size(1) / heads);
  };
  of_head(one.query_weight, h, q_heads), of_head(one.key_weight, kv, a.key.size(1));
  per_head(one.query_map), per_head(one.index), per_head(one.count), per_head(one.query_order);
  if (one.key_map) one.key_map = head_of(*a.key_map, b, kv);
  per_row(one.span), per_row(one.key_mask), per_row(one.query_range), per_row(one.key_range), per_row(one.query_offset);
  one.query_mask = torch::stable::empty({1, a.query.size(2)}, ScalarType::Byte);
  auto* mask = static_cast<uint8_t*>(one.query_mask->data_ptr());
  for (int64_t i = 0; i < a.query.size(2); ++i) mask[i] = !flags[i];
  return one;
}

}  // namespace sb

#include "attention_call.h"

#include "../error.h"
#include "../math/low_rank_kernels.h"
#include "../profile.h"
#include "../tensor_traits.h"

#include <cstring>

namespace sb::cpu {

template <class E>
AttentionParams AttentionCall<E>::params_of(const AttentionArguments& a, const AttentionShape& shape) {
  AttentionParams p{};
  p.batch = shape.batch, p.q_heads = shape.q_heads, p.kv_heads = shape.kv_heads, p.q_tokens = shape.q_tokens;
  p.k_tokens = shape.k_tokens, p.head_dim = shape.head_dim, p.head_pad = pad_to(shape.head_dim, kPad);
  p.value_pad = pad_to(shape.value_dim, kPad);
  const bool exact = a.query.scalar_type() == ScalarType::Double;
  p.fallback_bound = std::is_same_v<T, double> && !exact ? kFallbackBoundInDouble : kFallbackBound;
  p.low_rank = static_cast<LowRank>(a.low_rank), p.rank = shape.rank, p.is_causal = a.is_causal, p.scale = a.scale;
  const StateLayout states = state_layout(shape);
  p.segment = states.segment, p.slots = states.slots, p.features = states.features, p.slot_size = states.slot_size;
  p.units = p.is_causal ? p.slots : std::max<int64_t>(1, ceil_div(p.q_tokens, queries_per_unit(p)));
  const ScoreLayout scores = score_layout(shape);
  p.kept_lanes = scores.lanes, p.kept_slots = scores.slots, p.kept_keys = scores.keys,
  p.kept_clusters = scores.clusters;
  return p;
}

template <class E>
AttentionCall<E>::AttentionCall(const AttentionArguments& a)
    : shape(shape_of(a, kScalar<T>)),
      p(params_of(a, shape)),
      padding(a, p),
      lists(a, p),
      q(as_rows<E>(a.query, p.head_pad, p.q_mask)),
      k(as_rows<E>(a.key, p.head_pad)),
      v(as_rows<E>(a.value, p.value_pad)),
      zero_row(std::max({p.head_pad, p.value_pad, a.query_map ? pad_to(a.query_map->size(3) + 1, kPad) : kPad})),
      given_state(a.state),
      given_scores(a.scores) {
  p.q = q.rows, p.k = k.rows, p.v = v.rows;
  if (p.has_low_rank()) {
    p.map_pad = map_width(p.low_rank, p.rank);
    if (p.has_clusters())
      clusters.set<T>(a, p), clusters.set_query_mean<T>(a, p);
    else
      maps.set<T>(a, p, p.head_dim < kNarrowHead, false);
    count_valid();
    p.valid_before = valid_before.data();
  }
  int64_t by_key = kByKeyLimit;  // keys of the largest complement that is summed key by key
  for (const RowRange& row : padding.rows) by_key = std::max(by_key, by_key_limit(p, row));
  const int64_t longest = longest_list(p);
  p.max_keys = pad_to(longest + kChunk + by_key + 2 * kPad, kPad);
  p.uses_kv_state = p.has_low_rank() && any_state(longest);
  p.most_held = std::clamp(longest, kLeastHeld, kMostHeld);
  if (p.uses_kv_state) {
    centres.set(p);
    // A representative is near a key that outweighs all others of its cluster, so lists may take that back.
    if (p.has_maps()) held.set(p, attention_kernels<E>(), zero_row.data());
    p.max_keys += pad_to(held.most, kPad);
  }
  take_scores();
}

template <class E>
void AttentionCall<E>::count_valid() {
  valid_before.resize(size_t(p.batch * p.slots));
  if (p.k_mask) valid_keys.resize(size_t(p.batch * p.k_tokens)), p.valid_keys = valid_keys.data();
  for (int64_t b = 0; b < p.batch; ++b) {
    const RowRange& row = padding.rows[size_t(b)];
    int32_t valid = 0;
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      valid_before[size_t(b * p.slots + slot)] = valid;
      const int64_t begin = row.k_first + slot * p.segment, end = std::min<int64_t>(begin + p.segment, row.k_end);
      if (!p.k_mask) valid += int32_t(std::max<int64_t>(end - begin, 0));
      for (int64_t j = begin; j < end && p.k_mask; ++j)
        if (!p.k_mask[b * p.k_tokens + j]) valid_keys[size_t(b * p.k_tokens + valid++)] = int32_t(j);
    }
  }
}

// Whether any query's complement is too large to be summed key by key.
template <class E>
bool AttentionCall<E>::any_state(int64_t longest) const {
  for (int64_t b = 0; b < p.batch; ++b) {
    const RowRange& row = padding.rows[size_t(b)];
    const int64_t length = row.k_end - row.k_first;
    if (length <= 0) continue;
    const int64_t before = valid_before[size_t(b * p.slots + (p.is_causal ? (length - 1) / kChunk : p.slots - 1))];
    if (before <= by_key_limit(p, row)) continue;
    if (p.is_causal || before - longest > by_key_limit(p, row)) return true;
    if (before - shortest_list(p, b) > by_key_limit(p, row)) return true;
  }
  return false;
}

template <class E>
Tensor AttentionCall<E>::room_for_scores() {
  if (p.kept_rows() == 0) return empty({0}, kScalar<T>);
  Tensor scores = empty({p.batch, p.q_heads, p.kept_slots, p.kept_rows()}, kScalar<T>);
  p.scores = scores.data_ptr();
  return scores;
}

template <class E>
void AttentionCall<E>::take_scores() {
  if (!given_scores || given_scores->numel() == 0 || given_scores->scalar_type() != kScalar<T>) return;
  SB_CHECK(has_shape(*given_scores, {p.batch, p.q_heads, p.kept_slots, p.kept_rows()}) && p.kept_rows() > 0 &&
               given_scores->is_contiguous(),
           "attention_backward: scores must be what attention_with_state returned for the same arguments");
  p.scores = given_scores->data_ptr();
}

template <class E>
void AttentionCall<E>::take_states() {
  if (!p.has_low_rank()) return;
  if (given_state && given_state->numel() > 0 && given_state->scalar_type() == kScalar<T>) {
    const std::initializer_list<int64_t> sizes = {p.batch, p.kv_heads, p.slots, p.slot_size};
    SB_CHECK(has_shape(*given_state, sizes) && given_state->is_contiguous(),
             "attention_backward: state must be what attention_with_state returned for the same arguments");
    state = given_state, p.kv_state = state->data_ptr(), has_state = true;
    return;
  }
  state = empty({p.batch, p.kv_heads, p.slots, p.slot_size}, kScalar<T>);
  p.kv_state = state->data_ptr();
  if (p.uses_kv_state) return;
  std::memset(p.kv_state, 0, size_t(state->numel()) * sizeof(T));
  has_state = true;
}

template <class E>
void AttentionCall<E>::build_states(const HeadRange& range) {
  if (!p.has_low_rank() || has_state) return;
  const Stage stage("states");
  const AttentionKernels& kernel = attention_kernels<E>();
  for_each_unit(range, 1, 0, [&](int64_t b, int64_t h, int64_t, void*) { kernel.kv_state_references(p, b, h); });
  for_each_unit(range, p.slots - 1, kernel.kv_state_segment(p, 0, 0, 0, nullptr, nullptr),
                [&](int64_t b, int64_t h, int64_t segment, void* scratch) {
                  kernel.kv_state_segment(p, b, h, segment, scratch, zero_row.data());
                });
  for_each_unit(range, 1, 0, [&](int64_t b, int64_t h, int64_t, void*) { kernel.kv_state_scan(p, b, h); });
}

template <class E>
Tensor AttentionCall<E>::saved_state() const {
  return saves_state(shape) ? *state : empty({0}, kScalar<T>);
}

template <class E>
bool AttentionCall<E>::all_of(int32_t RowRange::* first, int32_t RowRange::* end, int64_t tokens) const {
  return std::all_of(padding.rows.begin(), padding.rows.end(),
                     [&](const RowRange& row) { return row.*first == 0 && row.*end == tokens; });
}

template struct AttentionCall<float>;
template struct AttentionCall<double>;
template struct AttentionCall<Bfloat16>;

}  // namespace sb::cpu

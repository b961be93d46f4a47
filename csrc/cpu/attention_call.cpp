#include "attention_call.h"

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
  p.cancelling = std::is_same_v<T, double> && !exact ? kCancellingInDouble : kCancelling;
  p.low_rank = static_cast<LowRank>(a.low_rank), p.rank = shape.rank, p.is_causal = a.is_causal, p.scale = a.scale;
  const StateLayout states = state_layout(shape);
  p.segment = states.segment, p.slots = states.slots, p.features = states.features, p.slot_size = states.slot_size;
  p.units = p.is_causal ? p.slots : std::max<int64_t>(1, ceil_div(p.q_tokens, kQueriesPerUnit));
  const ScoreLayout scores = score_layout(shape);
  p.kept_lanes = scores.lanes, p.kept_slots = scores.slots, p.kept_keys = scores.keys;
  return p;
}

template <class E>
AttentionCall<E>::AttentionCall(const AttentionArguments& a)
    : shape(shape_of(a, kScalar<T>)),
      p(params_of(a, shape)),
      padding(a, p),
      q(as_rows<E>(a.query, p.head_pad)),
      k(as_rows<E>(a.key, p.head_pad)),
      v(as_rows<E>(a.value, p.value_pad)),
      zero_row(std::max({p.head_pad, p.value_pad, a.query_map ? pad_to(a.query_map->size(3) + 1, kPad) : kPad})),
      given_state(a.state),
      given_scores(a.scores) {
  p.q = q.rows, p.k = k.rows, p.v = v.rows;
  if (p.low_rank != LowRank::kNone) {
    p.map_pad = p.low_rank == LowRank::kQuadratic ? packed_width(p.rank) : pad_to(p.rank, kPad);
    maps.set<T>(a, p, p.head_dim < kNarrowHead);
    count_valid();
    p.valid_before = valid_before.data();
  }
  set_lists(a);
  int64_t by_key = kDirectKeys;  // keys of the largest complement that is summed key by key
  for (const RowRange& row : padding.rows) by_key = std::max(by_key, p.direct_keys(row));
  const int64_t longest = longest_list();
  p.max_pairs = pad_to(longest + kChunk + by_key + 2 * kPad, kPad);
  p.uses_state = p.low_rank != LowRank::kNone && any_state(longest);
  take_scores();
}

template <class E>
void AttentionCall<E>::count_valid() {
  valid_before.resize(size_t(p.batch * p.slots));
  for (int64_t b = 0; b < p.batch; ++b) {
    const RowRange& row = padding.rows[size_t(b)];
    int32_t valid = 0;
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      valid_before[size_t(b * p.slots + slot)] = valid;
      const int64_t begin = row.k_first + slot * p.segment, end = std::min<int64_t>(begin + p.segment, row.k_end);
      for (int64_t j = begin; j < end; ++j) valid += !(p.k_mask && p.k_mask[b * p.k_tokens + j]);
    }
  }
}

template <class E>
void AttentionCall<E>::set_lists(const AttentionArguments& a) {
  p.block_q = a.block_q, p.block_k = a.block_k, p.blocks = ceil_div(p.q_tokens, p.block_q);
  if (a.index) {
    index = as_contiguous(*a.index), count = as_contiguous(*a.count);
    p.index = static_cast<const int32_t*>(index->data_ptr()), p.count = static_cast<const int32_t*>(count->data_ptr());
    p.list_heads = index->size(1), p.capacity = index->size(3);
    check_index(a.is_causal);
  }
  if (a.span) {
    span = as_contiguous(*a.span);
    p.span = static_cast<const int32_t*>(span->data_ptr());
    p.span_batch = span->size(0) == 1 ? 0 : p.blocks * 2, p.span_keys = a.span_keys;
  }
  if (a.query_order) {
    order = as_contiguous(*a.query_order);
    p.order = static_cast<const int32_t*>(order->data_ptr()), p.order_heads = order->size(1);
    for (int64_t i = 0; i < order->numel(); ++i)
      STD_TORCH_CHECK(p.order[i] >= -1 && p.order[i] < p.q_tokens, "attention: query_order names query ", p.order[i],
                      " of ", p.q_tokens);
  }
}

template <class E>
void AttentionCall<E>::check_index(bool is_causal) const {
  for (int64_t row = 0; row < p.batch * p.list_heads * p.blocks; ++row) {
    const RowRange& range = padding.rows[size_t(row / (p.list_heads * p.blocks))];
    const int64_t used = p.count[row], key_blocks = ceil_div(range.k_end - range.k_first, p.block_k),
                  block = row % p.blocks;
    STD_TORCH_CHECK(used >= 0 && used <= p.capacity, "attention: count must be between 0 and the capacity ", p.capacity,
                    ", got ", used);
    const int32_t* entry = p.index + row * p.capacity;
    // One pass without branches; only a wrong list is read again, to say what is wrong.
    bool wrong = used > 0 && (entry[0] < 0 || entry[used - 1] >= key_blocks);
    for (int64_t i = 1; i < used; ++i) wrong |= entry[i - 1] >= entry[i];
    for (int64_t i = 0; wrong && i < used; ++i) {
      STD_TORCH_CHECK(entry[i] >= 0 && entry[i] < key_blocks, "attention: index names key block ", entry[i], " of ",
                      key_blocks, " (blocks of ", p.block_k, " keys)");
      STD_TORCH_CHECK(i == 0 || entry[i - 1] < entry[i],
                      "attention: each list of index must be strictly ascending, got ",
                      entry[std::max<int64_t>(i, 1) - 1], " before ", entry[i]);
    }
    if (is_causal && used > 0) {
      const int64_t last_query = std::min<int64_t>(range.q_first + (block + 1) * p.block_q, range.q_end) - 1;
      STD_TORCH_CHECK(range.k_first + int64_t(entry[used - 1]) * p.block_k <= last_query + range.offset,
                      "attention: index of query block ", block,
                      " lists a key block after the block's last query, which causal attention must not see");
    }
  }
}

template <class E>
int64_t AttentionCall<E>::longest_list() const {
  int64_t longest_index = 0;
  for (int64_t row = 0; p.index && row < p.batch * p.list_heads * p.blocks; ++row)
    longest_index = std::max<int64_t>(longest_index, p.count[row]);
  return std::min((p.span ? p.span_keys : 0) + longest_index * p.block_k, p.k_tokens);
}

// A lower bound of the keys that any query of a row lists, without a causal edge. The window of a block lies inside the
// row; of its list only the last key block may be cut.
template <class E>
int64_t AttentionCall<E>::shortest_list(int64_t b) const {
  if (p.k_mask || p.order) return 0;
  const RowRange& row = padding.rows[size_t(b)];
  const int64_t length = row.k_end - row.k_first, cut = pad_to(length, p.block_k) - length;
  int64_t shortest = p.k_tokens;
  for (int64_t h = 0; h < std::max<int64_t>(p.list_heads, 1); ++h)
    for (int64_t block = 0; block * p.block_q < row.q_end - row.q_first; ++block) {
      int64_t keys = 0;
      if (p.span) {
        const int32_t* span = p.span + b * p.span_batch + block * 2;
        keys = std::min(span[1], row.k_end) - std::max(span[0], row.k_first);
      }
      if (p.index) {
        const int64_t listed = p.count[(b * p.list_heads + h) * p.blocks + block];
        keys = std::max(keys, listed * p.block_k - cut);
      }
      shortest = std::min(shortest, keys);
    }
  return shortest;
}

// Whether any query's complement is too large to be summed key by key.
template <class E>
bool AttentionCall<E>::any_state(int64_t longest) const {
  for (int64_t b = 0; b < p.batch; ++b) {
    const RowRange& row = padding.rows[size_t(b)];
    const int64_t length = row.k_end - row.k_first;
    if (length <= 0) continue;
    const int64_t before = valid_before[size_t(b * p.slots + (p.is_causal ? (length - 1) / kChunk : p.slots - 1))];
    if (before <= p.direct_keys(row)) continue;
    if (p.is_causal || before - longest > p.direct_keys(row)) return true;
    if (before - shortest_list(b) > p.direct_keys(row)) return true;
  }
  return false;
}

template <class E>
Tensor AttentionCall<E>::room_for_scores() {
  if (p.kept_keys == 0) return empty({0}, kScalar<T>);
  Tensor scores = empty({p.batch, p.q_heads, p.kept_slots, p.kept_keys}, kScalar<T>);
  p.scores = scores.data_ptr();
  return scores;
}

template <class E>
void AttentionCall<E>::take_scores() {
  if (!given_scores || given_scores->numel() == 0 || given_scores->scalar_type() != kScalar<T>) return;
  STD_TORCH_CHECK(has_shape(*given_scores, {p.batch, p.q_heads, p.kept_slots, p.kept_keys}) && p.kept_keys > 0 &&
                      given_scores->is_contiguous(),
                  "attention_backward: scores must be what attention_with_state returned for the same arguments");
  p.scores = given_scores->data_ptr();
}

template <class E>
void AttentionCall<E>::take_states() {
  if (p.low_rank == LowRank::kNone) return;
  if (given_state && given_state->numel() > 0 && given_state->scalar_type() == kScalar<T>) {
    const std::initializer_list<int64_t> sizes = {p.batch, p.kv_heads, p.slots, p.slot_size};
    STD_TORCH_CHECK(has_shape(*given_state, sizes) && given_state->is_contiguous(),
                    "attention_backward: state must be what attention_with_state returned for the same arguments");
    state = given_state, p.state = state->data_ptr(), has_state = true;
    return;
  }
  state = empty({p.batch, p.kv_heads, p.slots, p.slot_size}, kScalar<T>);
  p.state = state->data_ptr();
  if (p.uses_state) return;
  std::memset(p.state, 0, size_t(state->numel()) * sizeof(T));
  has_state = true;
}

template <class E>
void AttentionCall<E>::build_states(const HeadRange& range) {
  if (p.low_rank == LowRank::kNone || has_state) return;
  const Stage stage("states");
  const AttentionKernels& kernel = attention_kernels<E>();
  for_each_unit(range, 1, 0, [&](int64_t b, int64_t h, int64_t, void*) { kernel.state_references(p, b, h); });
  for_each_unit(range, p.slots - 1, kernel.state_segment(p, 0, 0, 0, nullptr, nullptr),
                [&](int64_t b, int64_t h, int64_t segment, void* scratch) {
                  kernel.state_segment(p, b, h, segment, scratch, zero_row.data());
                });
  for_each_unit(range, 1, 0, [&](int64_t b, int64_t h, int64_t, void*) { kernel.state_scan(p, b, h); });
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

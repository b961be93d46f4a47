#include "attention_call.h"

#include "../math/low_rank_kernels.h"
#include "../profile.h"

#include <algorithm>

namespace sb {

template <class E>
AttentionCall<E>::AttentionCall(const AttentionArguments& a)
    : zero_row(std::max({pad_to(a.query.size(3), kPad), pad_to(a.value.size(3), kPad),
                         a.query_map ? pad_to(a.query_map->size(3) + 1, kPad) : kPad})),
      given_state(a.state),
      given_scores(a.scores) {
  p.batch = a.query.size(0), p.q_heads = a.query.size(1), p.kv_heads = a.key.size(1), p.q_tokens = a.query.size(2),
  p.k_tokens = a.key.size(2);
  p.head_dim = a.query.size(3), p.head_pad = pad_to(p.head_dim, kPad), p.value_pad = pad_to(a.value.size(3), kPad);
  const bool exact = a.query.scalar_type() == ScalarType::Double;
  p.fallback_bound = std::is_same_v<T, double> && !exact ? kFallbackBoundInDouble : kFallbackBound;
  p.low_rank = static_cast<LowRank>(a.low_rank), p.is_causal = a.is_causal, p.scale = a.scale;
  rows = row_ranges(p.batch, p.q_tokens, p.k_tokens, a.query_range, a.key_range, a.query_offset);
  p.rows = rows.data();
  q_mask = as_mask(a.query_mask), k_mask = as_mask(a.key_mask);
  p.q_mask = q_mask.data, p.k_mask = k_mask.data;
  q = as_rows<E>(a.query, p.head_pad), k = as_rows<E>(a.key, p.head_pad), v = as_rows<E>(a.value, p.value_pad);
  p.q = q.rows, p.k = k.rows, p.v = v.rows;

  p.segment = p.is_causal ? kChunk : kSegment;
  p.slots = ceil_div(p.k_tokens, p.segment) + 1;
  p.units = p.is_causal ? p.slots : std::max<int64_t>(1, ceil_div(p.q_tokens, kQueriesPerUnit));
  if (p.low_rank != LowRank::kNone) {
    p.rank = a.packed_rank ? a.packed_rank : a.query_map->size(3) - 1;
    p.features = feature_count(p.low_rank, p.rank), p.map_pad = map_width(p.low_rank, p.rank);
    const MapKind kind = map_kind(a.low_rank, a.packed_rank);
    const bool fine = p.head_dim < kNarrowHead;
    x = as_map<T>(*a.query_map, kind, p.rank, fine), y = as_map<T>(*a.key_map, kind, p.rank, fine);
    p.x = x.coordinates, p.y = y.coordinates, p.rho = x.log_scales, p.kappa = y.log_scales;
    p.slot_size = p.kv_state_size() + kPad;
    count_valid();
    p.valid_before = valid_before.data();
  }
  set_lists(a);
  int64_t direct = kByKeyLimit;
  for (const RowRange& row : rows) direct = std::max(direct, by_key_limit(p, row));
  const int64_t longest = longest_list();
  p.max_keys = pad_to(longest + kChunk + direct + 2 * kPad, kPad);
  p.uses_kv_state = p.low_rank != LowRank::kNone && any_state(longest);
  set_kept();
  take_scores();
}

template <class E>
void AttentionCall<E>::count_valid() {
  valid_before.resize(size_t(p.batch * p.slots));
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t valid = 0;
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      valid_before[size_t(b * p.slots + slot)] = valid;
      const int64_t begin = rows[size_t(b)].k_first + slot * p.segment,
                    end = std::min<int64_t>(begin + p.segment, rows[size_t(b)].k_end);
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
    check_lists(a);
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
void AttentionCall<E>::check_lists(const AttentionArguments& a) const {
  for (int64_t row = 0; row < p.batch * p.list_heads * p.blocks; ++row) {
    const RowRange& range = rows[size_t(row / (p.list_heads * p.blocks))];
    const int64_t used = p.count[row], key_blocks = ceil_div(range.k_end - range.k_first, p.block_k),
                  block = row % p.blocks;
    STD_TORCH_CHECK(used >= 0 && used <= p.capacity, "attention: count must be between 0 and the capacity ", p.capacity,
                    ", got ", used);
    const int32_t* entry = p.index + row * p.capacity;
    // One pass without branches; only a wrong list is looked at again.
    bool wrong = used > 0 && (entry[0] < 0 || entry[used - 1] >= key_blocks);
    for (int64_t i = 1; i < used; ++i) wrong |= entry[i - 1] >= entry[i];
    for (int64_t i = 0; wrong && i < used; ++i) {
      STD_TORCH_CHECK(entry[i] >= 0 && entry[i] < key_blocks, "attention: index names key block ", entry[i], " of ",
                      key_blocks, " (blocks of ", p.block_k, " keys)");
      STD_TORCH_CHECK(i == 0 || entry[i - 1] < entry[i],
                      "attention: each list of index must be strictly ascending, got ",
                      entry[std::max<int64_t>(i, 1) - 1], " before ", entry[i]);
    }
    if (a.is_causal && used > 0) {
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

// Keys that every query of a row lists at least, without a causal edge. The window of a block lies inside the row; of
// its list only the last block may be cut.
template <class E>
int64_t AttentionCall<E>::shortest_list(int64_t b) const {
  if (p.k_mask || p.order) return 0;
  const int64_t length = rows[size_t(b)].k_end - rows[size_t(b)].k_first, cut = pad_to(length, p.block_k) - length;
  int64_t shortest = p.k_tokens;
  for (int64_t h = 0; h < std::max<int64_t>(p.list_heads, 1); ++h)
    for (int64_t block = 0; block * p.block_q < rows[size_t(b)].q_end - rows[size_t(b)].q_first; ++block) {
      int64_t keys = 0;
      if (p.span) {
        const int32_t* span = p.span + b * p.span_batch + block * 2;
        keys = std::min(span[1], rows[size_t(b)].k_end) - std::max(span[0], rows[size_t(b)].k_first);
      }
      if (p.index) {
        const int64_t listed = p.count[(b * p.list_heads + h) * p.blocks + block];
        keys = std::max(keys, listed * p.block_k - cut);
      }
      shortest = std::min(shortest, keys);
    }
  return shortest;
}

// Whether any query's complement is too large to be evaluated pair by pair (collect_keys).
template <class E>
bool AttentionCall<E>::any_state(int64_t longest) const {
  for (int64_t b = 0; b < p.batch; ++b) {
    const RowRange& row = rows[size_t(b)];
    const int64_t length = row.k_end - row.k_first;
    if (length <= 0) continue;
    const int64_t before = valid_before[size_t(b * p.slots + (p.is_causal ? (length - 1) / kChunk : p.slots - 1))];
    if (before <= by_key_limit(p, row)) continue;
    if (p.is_causal || before - longest > by_key_limit(p, row)) return true;
    if (before - shortest_list(b) > by_key_limit(p, row)) return true;
  }
  return false;
}

// Where scores are kept, and for how many keys: never by what the lists hold, which a graph does not know.
template <class E>
void AttentionCall<E>::set_kept() {
  p.kept_lanes = p.block_q == 1 ? 1 : p.block_q <= 8 ? 8 : p.block_q < 32 ? 16 : 32;
  p.kept_slots = pad_to(p.blocks * p.block_q, kPad);
  if (p.is_causal || p.block_q % p.kept_lanes != 0 || std::is_same_v<T, double>) return;
  const bool dense = p.block_q == 1 && p.low_rank != LowRank::kNone && p.k_tokens <= kBitmaskKeys;
  const int64_t listed = (p.span ? p.span_keys : 0) + p.capacity * p.block_k;
  const int64_t keys = pad_to(dense ? p.k_tokens : std::min(listed, p.k_tokens), kPad);
  if (dense || keys <= kKeptKeys) p.kept_keys = keys;
}

template <class E>
Tensor AttentionCall<E>::room_for_scores() {
  if (p.kept_keys == 0) return empty_cpu({0}, kScalar<T>);
  Tensor scores = empty_cpu({p.batch, p.q_heads, p.kept_slots, p.kept_keys}, kScalar<T>);
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
    state = *given_state, p.kv_state = state.data_ptr(), has_state = true;
    return;
  }
  state = empty_cpu({p.batch, p.kv_heads, p.slots, p.slot_size}, kScalar<T>);
  p.kv_state = state.data_ptr();
  if (p.uses_kv_state) return;
  std::memset(p.kv_state, 0, size_t(state.numel()) * sizeof(T));
  has_state = true;
}

template <class E>
void AttentionCall<E>::build_states(const Wave& wave) {
  if (p.low_rank == LowRank::kNone || has_state) return;
  const Stage stage("states");
  const AttentionKernels& kernel = attention_kernels<E>();
  for_each_unit(wave, 1, 0, [&](int64_t b, int64_t h, int64_t, void*) { kernel.kv_state_references(p, b, h); });
  for_each_unit(wave, p.slots - 1, kernel.kv_state_segment(p, 0, 0, 0, nullptr, nullptr),
                [&](int64_t b, int64_t h, int64_t segment, void* scratch) {
                  kernel.kv_state_segment(p, b, h, segment, scratch, zero_row.data());
                });
  for_each_unit(wave, 1, 0, [&](int64_t b, int64_t h, int64_t, void*) { kernel.kv_state_scan(p, b, h); });
}

template <class E>
Tensor AttentionCall<E>::state_to_keep() const {
  return p.low_rank == LowRank::kNone || p.is_causal ? empty_cpu({0}, kScalar<T>) : state;
}

template <class E>
bool AttentionCall<E>::all_of(int32_t RowRange::* first, int32_t RowRange::* end, int64_t tokens) const {
  return std::all_of(rows.begin(), rows.end(),
                     [&](const RowRange& row) { return row.*first == 0 && row.*end == tokens; });
}

template struct AttentionCall<float>;
template struct AttentionCall<double>;
template struct AttentionCall<Bfloat16>;

}  // namespace sb

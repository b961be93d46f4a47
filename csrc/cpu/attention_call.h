// What the forward and the backward launcher share: operands in place, lists checked, states built.
#pragma once
#include <algorithm>

#include "../checks.h"
#include "tensor_rows.h"

namespace sb {

// Whether a call is computed in double: float64 inputs, and narrow heads of any dtype.
inline bool in_double(const AttentionArguments& a) {
  return a.query.scalar_type() == ScalarType::Double || a.query.size(3) < kNarrowHead;
}

// Whether rows of bfloat16 are what the kernels read, in place.
inline bool in_bfloat16(const AttentionArguments& a) {
  return a.query.scalar_type() == ScalarType::BFloat16 && instruction_set().bf16;
}
// Calls visit(pointer to the element of the rows that kernels read).
template <class Visit>
auto with_rows_of(const AttentionArguments& a, const Visit& visit) {
  if (in_double(a)) return visit(static_cast<double*>(nullptr));
  if (in_bfloat16(a)) return visit(static_cast<Bfloat16*>(nullptr));
  return visit(static_cast<float*>(nullptr));
}

// Runs body(b, head, unit) for every unit of every head, each thread with its own scratch of `bytes`.
template <class Body>
void parallel_units(int64_t batch, int64_t heads, int64_t units, int64_t bytes, const Body& body) {
  parallel_ranges(batch * heads * units, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    for (int64_t at = begin; at < end; ++at) body(at / (heads * units), at / units % heads, at % units, scratch.data());
  });
}

// Key/value heads [first, first + count) of all batch rows, numbered row after row.
struct Wave {
  int64_t first, count;
};
// What one stage of a head leaves is still in a shared cache for the next one: heads go through all stages together
// until they have this many tokens, or are as many as threads.
inline int64_t heads_of_wave(int64_t heads, int64_t tokens) {
  const int64_t most =
      std::max<int64_t>(torch::stable::get_num_threads(), kTokensPerWave / std::max<int64_t>(1, tokens));
  return std::min(heads, most);
}
template <class Body>
void for_each_wave(int64_t heads, int64_t tokens, const Body& body) {
  const int64_t many = heads_of_wave(heads, tokens);
  for (int64_t first = 0; first < heads; first += many) body(Wave{first, std::min(many, heads - first)});
}

// Rows of q, k, v, o and dO are of E; all else is of the type T that sums over them are in.
template <class E>
struct AttentionCall {
  typedef AccType<E> T;
  explicit AttentionCall(const AttentionArguments& a);
  // Room for the states, or those that were given.
  void take_states();
  // Fills the states of the key/value heads of a wave where none were given, in parallel over segments.
  void build_states(const Wave& wave);
  // Room for the scores that a trained call keeps; empty where it keeps none.
  Tensor room_for_scores();
  // States that are worth keeping from the forward to the backward pass: a few per head. Those of a causal call are one
  // for every 64 keys, as large as the rest of what is kept.
  Tensor state_to_keep() const;

  // Whether every query and every key is one that the kernels write results for.
  bool every_query() const { return !p.q_mask && !p.order && all_of(&RowRange::q_first, &RowRange::q_end, p.q_tokens); }
  bool every_key() const { return !p.k_mask && all_of(&RowRange::k_first, &RowRange::k_end, p.k_tokens); }

  AttentionParams p{};
  std::vector<RowRange> rows;
  std::vector<int32_t> valid_before;
  Operand q, k, v;
  MapOperand x, y;
  MaskOperand q_mask, k_mask;
  std::optional<Tensor> index, count, span, order;  // contiguous
  Tensor state;
  ZeroRow<T> zero_row;

  // Calls body(b, key/value head, unit, scratch) for every unit of the heads of a wave, in parallel, each thread with
  // `bytes` of scratch.
  template <class Body>
  void for_each_unit(const Wave& wave, int64_t units, int64_t bytes, const Body& body) const {
    parallel_units(1, wave.count, units, bytes, [&](int64_t, int64_t at, int64_t unit, void* scratch) {
      const int64_t head = wave.first + at;
      body(head / p.kv_heads, head % p.kv_heads, unit, scratch);
    });
  }
  // Calls body(wave) until every key/value head had its turn.
  template <class Body>
  void for_each_wave(const Body& body) const {
    const int64_t group = p.q_heads / p.kv_heads;
    sb::for_each_wave(p.batch * p.kv_heads, std::max(p.k_tokens, group * p.q_tokens), body);
  }

 private:
  void set_lists(const AttentionArguments& a);
  void check_lists(const AttentionArguments& a) const;
  void count_valid();
  void set_kept();
  void take_scores();
  int64_t longest_list() const;
  int64_t shortest_list(int64_t b) const;
  bool any_state(int64_t longest) const;
  bool all_of(int32_t RowRange::* first, int32_t RowRange::* end, int64_t tokens) const;
  std::optional<Tensor> given_state, given_scores;
  bool has_state = false;
};

}  // namespace sb

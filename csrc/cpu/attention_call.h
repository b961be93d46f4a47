// What the forward and the backward launcher share: tensors as rows, checked lists, states, saved scores.
#pragma once
#include "block_lists.h"
#include "cluster_rows.h"
#include "held_keys.h"
#include "key_centres.h"
#include "map_rows.h"
#include "padding.h"
#include "saved_sizes.h"

namespace sb::cpu {

// Calls visit(pointer to the element of the rows that kernels read): double, bfloat16 where the instruction set
// multiplies it, else float.
template <class Visit>
auto with_row_element(const AttentionArguments& a, const Visit& visit) {
  const ScalarType dtype = a.query.scalar_type();
  if (dtype == ScalarType::Double || a.query.size(3) < kNarrowHead) return visit(static_cast<double*>(nullptr));
  if (dtype == ScalarType::BFloat16 && instruction_set().bf16) return visit(static_cast<Bfloat16*>(nullptr));
  return visit(static_cast<float*>(nullptr));
}

// Rows of q, k, v, out and d_out hold E; all else holds T, the type of sums over them.
template <class E>
struct AttentionCall {
  typedef AccType<E> T;
  explicit AttentionCall(const AttentionArguments& a);

  // Takes the given states, or makes room for them.
  void take_states();
  // Computes the states of the key/value heads in a range, unless they were given, in parallel over segments.
  void build_states(const HeadRange& range);
  // Room for the scores that a trained call saves; empty where it saves none.
  Tensor room_for_scores();
  // The states, where they are saved for the backward pass.
  Tensor saved_state() const;

  // Whether the kernels write results for every query, or every key.
  bool every_query() const { return !p.q_mask && !p.order && all_of(&RowRange::q_first, &RowRange::q_end, p.q_tokens); }
  bool every_key() const { return !p.k_mask && all_of(&RowRange::k_first, &RowRange::k_end, p.k_tokens); }

  const AttentionShape shape;
  AttentionParams p{};
  const Padding padding;
  const BlockLists lists;
  std::vector<int32_t> valid_before, valid_keys;
  KeyCentres<T> centres;
  HeldKeys held;
  TensorRows q, k, v;
  Maps maps;
  ClusterRows clusters;
  MaybeTensor state;
  ZeroRow<T> zero_row;

  // Calls body(b, key/value head, unit, scratch) for every unit of the heads in a range, in parallel, each thread with
  // `bytes` of scratch of its own.
  template <class Body>
  void for_each_unit(const HeadRange& range, int64_t units, int64_t bytes, const Body& body) const {
    parallel_units(1, range.count, units, bytes, [&](int64_t, int64_t at, int64_t unit, void* scratch) {
      const int64_t head = range.first + at;
      body(head / p.kv_heads, head % p.kv_heads, unit, scratch);
    });
  }
  // Calls body(range) for ranges of all key/value heads.
  template <class Body>
  void for_each_head_range(const Body& body) const {
    const int64_t group = p.q_heads / p.kv_heads;
    cpu::for_each_head_range(p.batch * p.kv_heads, std::max(p.k_tokens, group * p.q_tokens), body);
  }

 private:
  static AttentionParams params_of(const AttentionArguments& a, const AttentionShape& shape);
  void count_valid();
  void take_scores();
  bool any_state(int64_t longest) const;
  bool all_of(int32_t RowRange::* first, int32_t RowRange::* end, int64_t tokens) const;
  MaybeTensor given_state, given_scores;
  bool has_state = false;
};

}  // namespace sb::cpu

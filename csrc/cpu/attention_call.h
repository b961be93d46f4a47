// What the forward and the backward launcher share: operands in place, lists checked, states built.
#pragma once
#include "../checks.h"
#include "operands.h"

namespace sb {

// Whether a call is computed in double: float64 inputs, and narrow heads of any dtype.
inline bool in_double(const AttentionArguments& a) {
  return a.query.scalar_type() == ScalarType::Double || a.query.size(3) < kNarrowHead;
}

template <class T>
struct AttentionCall {
  explicit AttentionCall(const AttentionArguments& a);
  // Fills the prefix states of every key/value head, in parallel over segments.
  void build_states();

  AttentionParams p{};
  std::vector<RowRange> rows;
  std::vector<int32_t> valid_before;
  Operand q, k, v;
  MapOperand<T> x, y;
  MaskOperand q_mask, k_mask;
  std::optional<Tensor> index, count, span, order;  // contiguous
  Tensor state;
  ZeroRow<T> zero_row;

 private:
  void set_lists(const AttentionArguments& a);
  void check_lists(const AttentionArguments& a) const;
  void count_valid();
  int64_t longest_list() const;
};

// Runs body(b, head, unit) for every unit of every head, each thread with its own scratch of `bytes`.
template <class Body>
void parallel_units(int64_t batch, int64_t heads, int64_t units, int64_t bytes, const Body& body) {
  torch::stable::parallel_for(0, batch * heads * units, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    for (int64_t at = begin; at < end; ++at) body(at / (heads * units), at / units % heads, at % units, scratch.data());
  });
}

}  // namespace sb

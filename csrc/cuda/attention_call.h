// What the launchers of the forward and the backward pass share: the parameters of a call.
#pragma once
#include "call.h"
#include "kernels.h"

namespace sb::cuda {

class AttentionCall {
 public:
  // `by_tiles`: whether the first pass computes on tensor cores.
  AttentionCall(const AttentionArguments& a, bool is_forward, bool by_tiles);

  Element element() const { return element_of(a.query); }
  // Gives `p` maps or clusters, and room for states, in the type of sums of a pass.
  void set_low_rank(ForwardParams& p, bool in_double);
  // Computes the states of a pass that reads any.
  void make_states(ForwardParams& p, bool in_double);
  // The parameters of the pass that computes what the first one flagged.
  template <class Params>
  Params of_flagged(const Params& p) {
    Params again = p;
    again.only_flagged = true, again.fallback_bound = kFallbackBoundInDouble;
    set_low_rank(again, true);
    return again;
  }
  // Room for `sizes` numbers of a pass, and for integers.
  void* room(std::initializer_list<int64_t> sizes, ScalarType dtype) { return call.write(call.empty(sizes, dtype)); }

  const AttentionArguments& a;
  Call call;
  const bool by_tiles, has_few_queries;  // the latter in the forward pass alone
  const ScalarType map_dtype;            // of maps and of lse
  const bool is_wide;                    // whether the first pass computes in double
  const ScalarType dtype;                // of its sums
  ForwardParams p{};
  RowsParams row_params{};

 private:
  void set_shape();
  void set_lists();
  void set_rows();
  void set_flags();
  void set_held_keys(ForwardParams& p);
  MapView map_view(const Tensor& map, bool in_double);
};

}  // namespace sb::cuda

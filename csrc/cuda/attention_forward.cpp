// Launcher of the forward pass: rows, states, queries. Nothing waits for the device, and nothing on the host reads what
// a tensor holds.
#include <limits>

#include "attention_call.h"
#include "attention_tile.h"
#include "launchers.h"

namespace sb::cuda {
namespace {

class Forward : AttentionCall {
 public:
  explicit Forward(const AttentionArguments& a)
      : AttentionCall(a, true, fits_float_tiles(a) || fits_tiles(a)), is_float(fits_float_tiles(a)) {}

  Results run() {
    const Tensor out = call.empty_like_tokens(a.query, p.value_pad),
                 lse = call.empty({p.batch, p.q_heads, p.q_tokens}, map_dtype);
    if (a.query_mask || a.query_range || a.query_order) {  // some queries may not be computed
      Tensor zeroed = out, filled = lse;
      torch::stable::zero_(zeroed), torch::stable::fill_(filled, -std::numeric_limits<double>::infinity());
    }
    p.out = call.write_rows(out), p.lse = call.write(lse);
    launch_rows(row_params, call.stream());
    if (by_tiles)
      compute_by_tiles();
    else
      compute(p, is_wide);
    if (p.flags) compute(of_flagged(p), true);
    return {out, lse, call.empty({0}, dtype), call.empty({0}, dtype)};
  }

 private:
  void compute(ForwardParams params, bool in_double) {
    make_states(params, in_double);
    launch_attention_forward(params, element(), in_double, call.stream());
  }

  void compute_by_tiles() {
    make_states(p, false);
    const TileParams params = tile_params(p, a, call, true);
    launch_tile_operands(params, element(), call.stream());
    if (!is_float &&
        (p.is_causal ? launch_causal_attention_window : launch_attention_window)(params, element(), call.stream()))
      return;
    if (is_float)
      (params.is_ragged() ? launch_ragged_float_attention_tile : launch_float_attention_tile)(params, call.stream());
    else
      (params.is_ragged() ? launch_ragged_attention_tile : launch_attention_tile)(params, element(), call.stream());
  }

  const bool is_float;  // in products of float32
};

}  // namespace

Results attention(const AttentionArguments& a) { return Forward(a).run(); }

}  // namespace sb::cuda

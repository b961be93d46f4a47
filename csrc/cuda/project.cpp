// Launcher of the projections.
#include "../tensor_traits.h"
#include "call.h"
#include "kernels.h"
#include "launchers.h"
#include "../math/low_rank_kernels.h"

#include <limits>

namespace sb::cuda {
namespace {

ProjectParams params_of(Call& call, const Tensor& tokens, const Tensor& weight) {
  ProjectParams p{};
  p.batch = tokens.size(0), p.heads = tokens.size(1), p.tokens = tokens.size(2), p.head_dim = tokens.size(3);
  p.outputs = weight.size(2), p.weight_batch = weight.size(0), p.weight_heads = weight.size(1);
  p.x = tokens.element_size() == 2 && p.has_products() ? call.read_aligned_rows(tokens) : call.read_rows(tokens);
  p.weight = call.read(Call::contiguous(weight));
  return p;
}

Tensor forward(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias, bool is_packed) {
  Call call(tokens);
  ProjectParams p = params_of(call, tokens, weight);
  p.bias = call.read_contiguous<void>(bias);
  p.width = is_packed ? packed_width(p.outputs - 1) : p.outputs, p.last = is_packed ? p.outputs : p.outputs - 1;
  p.last_factor = is_packed ? kLog2e : 1;
  p.coordinate_limit = p.log_limit = std::numeric_limits<double>::infinity();  // who reads the map limits it
  const ScalarType dtype = accumulation_type(tokens);
  if (is_packed && dtype == ScalarType::Double) {
    const MapLimits<double> limits = map_limits<double>(LowRank::kQuadratic);
    p.coordinate_limit = limits.coordinate, p.log_limit = limits.log;
  } else if (is_packed) {
    const MapLimits<float> limits = map_limits<float>(LowRank::kQuadratic);
    p.coordinate_limit = limits.coordinate, p.log_limit = limits.log;
  }
  const Tensor z = call.empty({p.batch, p.heads, p.tokens, p.width}, dtype);
  p.z = call.write(z);
  launch_project(p, element_of(tokens), call.stream());
  return z;
}

}  // namespace

Tensor project(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias) {
  return forward(tokens, weight, bias, false);
}

Tensor project_packed(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias) {
  return forward(tokens, weight, bias, true);
}

std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight) {
  Call call(tokens);
  ProjectParams p = params_of(call, tokens, weight);
  const ScalarType dtype = accumulation_type(tokens);
  p.grad = call.read(Call::contiguous(grad));
  const Tensor d_tokens = call.empty_like_tokens(tokens, p.head_dim),
               d_weight = call.empty({p.weight_batch, p.weight_heads, p.outputs, p.head_dim}, dtype),
               d_bias = call.empty({p.weight_batch, p.weight_heads, p.outputs}, dtype);
  p.parts = ceil_div(p.tokens, kTokensPerPart);
  const Tensor partial = call.empty({p.batch, p.heads, p.parts, p.outputs, p.head_dim + 1}, dtype);
  p.dx = call.write_rows(d_tokens), p.partial = call.write(partial);
  p.d_weight = call.write(d_weight), p.d_bias = call.write(d_bias);
  launch_project_backward(p, element_of(tokens), call.stream());
  return {d_tokens, d_weight, d_bias};
}

}  // namespace sb::cuda

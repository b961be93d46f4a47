// The launchers of the CPU.
#pragma once
#include "../launchers.h"

namespace sb::cpu {

Results attention(const AttentionArguments&);
Gradients attention_backward(const AttentionArguments&, const Tensor& out, const Tensor& lse, const Tensor& d_out,
                             const MaybeTensor& d_lse);
std::tuple<Tensor, Tensor> route(const RouteArguments&);
Clusters cluster(const ClusterArguments&);
Tensor project(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
Tensor project_packed(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight);

}  // namespace sb::cpu

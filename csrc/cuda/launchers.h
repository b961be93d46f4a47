// The launchers of CUDA devices.
#pragma once
#include "../launchers.h"

namespace sb::cuda {

Results attention(const AttentionArguments&);
Gradients attention_backward(const AttentionArguments&, const Tensor& out, const Tensor& lse, const Tensor& d_out,
                             const MaybeTensor& d_lse);
Clusters cluster(const ClusterArguments&);
std::tuple<Tensor, Tensor> route(const RouteArguments&);
Tensor project(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
Tensor project_packed(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight);

// Stored arguments are compared by their bytes to see whether a prepared call is stale. The host would have to wait for
// those of a device, so what has any counts as changed.
bool equal_bytes(const Tensors& a, const Tensors& b);
Tensor empty(const Tensor& on, std::initializer_list<int64_t> sizes, ScalarType dtype);
SavedSizes saved_sizes(const AttentionShape&);

// Puts these launchers into a device's table, and leaves what is not written yet as it stands there.
void fill(Launchers& table);

}  // namespace sb::cuda

// The launchers of CUDA devices, as far as they exist. While operators are missing the table is not registered: CUDA
// tensors get the error of a build without CUDA.
#pragma once
#include "../launchers.h"

namespace sb::cuda {

Results attention(const AttentionArguments&);
Tensor project(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
Tensor project_packed(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight);

// Puts these launchers into a device's table, and leaves what is not written yet as it stands there.
void fill(Launchers& table);

}  // namespace sb::cuda

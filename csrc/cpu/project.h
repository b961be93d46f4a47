// Weights of projections as rows.
#pragma once
#include "tensor_rows.h"

namespace sb::cpu {

// A weight (1 or B, heads, outputs, d) of float32 or float64 as rows of T, padded with zeros to a multiple of kPad.
template <class T>
std::vector<T> padded_weight(const Tensor& weight);

}  // namespace sb::cpu

// Tensors that the launchers make. These functions do what torch's do, without the look-up of an operator by name: on a
// few hundred tokens that shows.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <type_traits>

#include "../arguments.h"
#include "kernels.h"

namespace sb::cpu {

// The dtype of elements T.
template <class T>
inline constexpr ScalarType kScalar = std::is_same_v<T, double>     ? ScalarType::Double
                                      : std::is_same_v<T, Bfloat16> ? ScalarType::BFloat16
                                                                    : ScalarType::Float;

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType dtype);

// Uninitialised (B, heads, tokens, width) of the batch, heads and number of `tokens`, and in its memory order: with the
// heads of a token next to each other, or head after head.
Tensor empty_like_tokens(const Tensor& tokens, int64_t width, ScalarType dtype);

Tensor as_contiguous(const Tensor& t);

bool equal_bytes(const Tensors& a, const Tensors& b);

}  // namespace sb::cpu

// Dtypes and shapes of tensors on any device.
#pragma once
#include "arguments.h"

namespace sb {

inline bool is_floating(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  return s == ScalarType::Float || s == ScalarType::Double || s == ScalarType::BFloat16 || s == ScalarType::Half;
}

inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != int64_t(sizes.size())) return false;
  int64_t i = 0;
  for (const int64_t size : sizes)
    if (t.size(i++) != size) return false;
  return true;
}

}  // namespace sb

#include "allocation.h"

#include <algorithm>
#include <cstring>

#include "../error.h"

namespace sb::cpu {
namespace {

int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    default: SB_CHECK(false, "expected float32, float64, bfloat16, float16 or int32");
  }
}

bool have_equal_bytes(const Tensor& a, const Tensor& b) {
  if (!a.is_cpu() || a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  const Tensor x = as_contiguous(a), y = as_contiguous(b);
  return std::memcmp(x.data_ptr(), y.data_ptr(), size_t(x.numel()) * x.element_size()) == 0;
}

}  // namespace

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8], stride = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, std::data(sizes)[d]);
  }
  AtenTensorHandle handle;
  const int32_t error = aoti_torch_empty_strided(int64_t(sizes.size()), std::data(sizes), strides, code_of(dtype),
                                                 aoti_torch_device_type_cpu(), 0, &handle);
  SB_CHECK(error == 0, "scatterbrain: could not allocate a tensor of ", stride, " elements");
  return Tensor(handle);
}

Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor t = empty(sizes, dtype);
  if (t.numel() > 0) std::memset(t.data_ptr(), 0, size_t(t.numel()) * t.element_size());
  return t;
}

Tensor empty_like_tokens(const Tensor& tokens, int64_t width, ScalarType dtype) {
  const int64_t batch = tokens.size(0), heads = tokens.size(1), n = tokens.size(2);
  if (tokens.stride(1) >= tokens.stride(2)) return empty({batch, heads, n, width}, dtype);
  return torch::stable::transpose(empty({batch, n, heads, width}, dtype), 1, 2);
}

Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

bool equal_bytes(const Tensors& a, const Tensors& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), have_equal_bytes);
}

}  // namespace sb::cpu

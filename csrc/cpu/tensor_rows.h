// Tensors as kernels read and write them: rows of T whose last dimension is contiguous and padded with zeros to a
// multiple of kPad. A tensor in that form is used in place; any other dtype, stride or width is converted once.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../error.h"
#include "allocation.h"
#include "parallel.h"

namespace sb::cpu {

struct TensorRows {
  MaybeTensor storage;  // keeps the rows alive
  StridedTensor rows;
  bool in_place = false;  // the rows are the tensor's own memory
};

// (B, H, N, width) of any floating dtype and strides -> rows of T padded to `width_pad`. Rows of tokens that `ignored`
// (B, N) marks may hold anything: they are not converted, so few rows of many cost little.
template <class T>
TensorRows as_rows(const Tensor& t, int64_t width_pad, const uint8_t* ignored = nullptr);

// Rows first .. first + n - 1 of one head alone, in place or in `scratch` (n * width_pad).
template <class T>
struct BlockRows {
  const T* data;
  int64_t row;
};
template <class T>
BlockRows<T> rows_of_block(const Tensor& t, int64_t width_pad, int64_t b, int64_t h, int64_t first, int64_t n,
                           T* scratch);

// The rows of one head that a list names, copied to `to` (n * width_pad).
template <class T>
void gather_rows(const Tensor& t, int64_t width_pad, int64_t b, int64_t h, const std::vector<int32_t>& list, T* to);

// Rows for a result: the tensor's own memory if it is in the form of rows of T, else a padded buffer. Zeros, unless the
// kernels write every row (`fully_written`).
template <class T>
TensorRows result_rows(const Tensor& result, int64_t width_pad, bool fully_written = false);

// Copies a padded buffer into the result that it stands for; nothing to do if the rows are in place.
template <class T>
void write_back(const TensorRows& from, const Tensor& result);

// A contiguous float32 or float64 tensor in the other of the two dtypes, or itself.
Tensor as_dtype(const Tensor& t, ScalarType dtype);

// A double as an element of rows of E.
template <class E>
E narrowed(double x) {
  if constexpr (std::is_same_v<E, Bfloat16>)
    return {torch::headeronly::BFloat16(float(x)).x};
  else
    return E(x);
}

// -------------------- for conversions

inline StridedTensor rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// Whether kernels can use a tensor in place, as rows of T padded to `width_pad`.
template <class T>
bool is_in_form(const Tensor& t, int64_t width_pad) {
  return t.scalar_type() == kScalar<T> && t.size(3) == width_pad && (t.stride(3) == 1 || width_pad == 1);
}

// Calls visit(pointer to a C++ element type) for the tensor's dtype.
template <class Visit>
void with_element(ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Float: return visit(static_cast<float*>(nullptr));
    case ScalarType::Double: return visit(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return visit(static_cast<torch::headeronly::BFloat16*>(nullptr));
    case ScalarType::Half: return visit(static_cast<torch::headeronly::Half*>(nullptr));
    default: SB_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

// Calls visit(b, h, i) for every row, in parallel.
template <class Visit>
void for_each_row(const Tensor& t, int64_t row_bytes, const Visit& visit) {
  constexpr int64_t kGrainBytes = 1 << 16;
  const int64_t heads = t.size(1), tokens = t.size(2);
  parallel_ranges(t.size(0) * heads * tokens, std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)),
                  [&](int64_t begin, int64_t end) {
                    int64_t i = begin % tokens, h = begin / tokens % heads, b = begin / tokens / heads;
                    for (int64_t at = begin; at < end; ++at) {
                      visit(b, h, i);
                      if (++i == tokens) i = 0, ++h;
                      if (h == heads) h = 0, ++b;
                    }
                  });
}

}  // namespace sb::cpu

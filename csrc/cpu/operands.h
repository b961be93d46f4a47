// Tensors as kernels want them: rows of T whose last dimension is contiguous and padded with zeros to a multiple of
// kPad. A tensor that already is that way is used where it lies; any other dtype, stride or width is converted once.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "../params.h"
#include "kernels.h"

namespace sb {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
inline constexpr ScalarType kScalar = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor zeros_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype);

// Uninitialised (B, heads, tokens, width) of `tokens`' batch, heads and number, in memory as `tokens` is: with the
// heads of a token next to each other, or head after head.
Tensor empty_like_tokens(const Tensor& tokens, int64_t width, ScalarType dtype);

struct Operand {
  Tensor storage;  // keeps the rows alive
  Rows rows;
  bool in_place;  // the rows are the tensor's own memory
};

// (B, H, N, width) of any floating dtype and strides -> rows of T padded to `width_pad`.
template <class T>
Operand as_rows(const Tensor& t, int64_t width_pad);
// Rows for a result of dtype `dtype`: the tensor's own memory if that is T and needs no padding, else a padded buffer;
// zeros.
template <class T>
Operand result_rows(const Tensor& result, int64_t width_pad);
// Copies a padded buffer back into the result it stands for; nothing to do if it was in place.
template <class T>
void write_back(const Operand& from, const Tensor& result);

// A contiguous float32 or float64 tensor in the other of the two, or itself.
Tensor as_dtype(const Tensor& t, ScalarType dtype);

// (B, H, N, r + 1) coordinates, the last column a natural log scale -> rows of r coordinates (with `ones` a 1 behind
// them) and log scales in base 2. Masked tokens get zeros, whatever they hold.
template <class T>
struct MapOperand {
  Operand coordinates;
  Tensor log_scale;
};
template <class T>
MapOperand<T> as_map(const Tensor& map, int64_t width_pad, bool ones, const uint8_t* mask);

// The mask as (B, N) bytes, contiguous; null without a mask.
struct MaskOperand {
  std::optional<Tensor> storage;
  const uint8_t* data = nullptr;
};
MaskOperand as_mask(const std::optional<Tensor>& mask);

// Per batch row what exists, from optional (B, 2) ranges and (B) offsets.
std::vector<RowRange> row_ranges(int64_t batch, int64_t q_tokens, int64_t k_tokens,
                                 const std::optional<Tensor>& query_range, const std::optional<Tensor>& key_range,
                                 const std::optional<Tensor>& query_offset);

// Memory for one thread, aligned to a cache line.
struct Scratch {
  explicit Scratch(int64_t bytes) : memory(new char[size_t(bytes) + 64]) {}
  void* data() const { return reinterpret_cast<void*>(pad_to(reinterpret_cast<int64_t>(memory.get()), 64)); }
  std::unique_ptr<char[]> memory;
};

// A row of zeros that ignored tokens point at, wide enough for every operand of any width here.
template <class T>
struct ZeroRow {
  explicit ZeroRow(int64_t width) : memory(size_t(width), T(0)) {}
  const void* data() const { return memory.data(); }
  std::vector<T> memory;
};

}  // namespace sb

// Tensors as kernels want them: rows of T whose last dimension is contiguous and padded with zeros to a multiple of
// kPad. A tensor that already is that way is used where it lies; any other dtype, stride or width is converted once.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

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
inline constexpr ScalarType kScalar = std::is_same_v<T, double>     ? ScalarType::Double
                                      : std::is_same_v<T, Bfloat16> ? ScalarType::BFloat16
                                                                    : ScalarType::Float;

// These, and empty_cpu, are what torch's functions do without the operators that those look up by name, or with one
// thread: on few hundred tokens that shows.
Tensor as_contiguous(const Tensor& t);
// Calls body(begin, end) for parts of [0, n), of at least `grain`, on several threads.
template <class Body>
void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (n <= grain || torch::stable::get_num_threads() == 1)
    body(int64_t(0), n);
  else
    torch::stable::parallel_for(0, n, grain, body);
}

Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor zeros_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype);

// Uninitialised (B, heads, tokens, width) of `tokens`' batch, heads and number, in memory as `tokens` is: with the
// heads of a token next to each other, or head after head.
Tensor empty_like_tokens(const Tensor& tokens, int64_t width, ScalarType dtype);

struct Operand {
  Tensor storage;  // keeps the rows alive
  StridedTensor rows;
  bool in_place;  // the rows are the tensor's own memory
};

// (B, H, N, width) of any floating dtype and strides -> rows of T padded to `width_pad`.
template <class T>
Operand as_rows(const Tensor& t, int64_t width_pad);
// Rows first .. first + n - 1 of one head alone, in place or in `scratch` (n * width_pad).
template <class T>
struct BlockRows {
  const T* data;
  int64_t row;
};
template <class T>
BlockRows<T> rows_of_block(const Tensor& t, int64_t width_pad, int64_t b, int64_t h, int64_t first, int64_t n,
                           T* scratch);
// Rows for a result of dtype `dtype`: the tensor's own memory if that is T and needs no padding, else a padded buffer;
// zeros, unless every row is going to be `written`.
template <class T>
Operand result_rows(const Tensor& result, int64_t width_pad, bool written = false);
// A double as an element of such rows.
template <class E>
E narrowed(double x) {
  if constexpr (std::is_same_v<E, Bfloat16>)
    return {torch::headeronly::BFloat16(float(x)).x};
  else
    return E(x);
}
// Copies a padded buffer back into the result it stands for; nothing to do if it was in place.
template <class T>
void write_back(const Operand& from, const Tensor& result);

// A contiguous float32 or float64 tensor in the other of the two, or itself.
Tensor as_dtype(const Tensor& t, ScalarType dtype);

// Coordinates and log scales in base 2. Of the quadratic kernel both are columns of packed rows (packed_width), which
// are used where they lie; a map (B, H, N, r + 1), whose last column is a natural log scale, is packed first. General
// features are rows of their own and their log scales one array.
struct MapOperand {
  Tensor storage, log_storage;
  StridedTensor coordinates, log_scales;
};
enum class MapKind { kMap, kPacked, kFeatures };
inline MapKind map_kind(int64_t low_rank, int64_t packed_rank) {
  return low_rank == int64_t(LowRank::kFeatures) ? MapKind::kFeatures : packed_rank ? MapKind::kPacked : MapKind::kMap;
}
// `fine`: log scales brought to base 2 in T, where T is wider than the map.
template <class T>
MapOperand as_map(const Tensor& map, MapKind kind, int64_t rank, bool fine);

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

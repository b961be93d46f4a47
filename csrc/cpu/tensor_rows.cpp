#include "tensor_rows.h"

#include "../profile.h"

#include <algorithm>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace sb {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;

// Calls visit(pointer to a C++ element type) for the tensor's dtype.
template <class Visit>
void with_element(ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Float: return visit(static_cast<float*>(nullptr));
    case ScalarType::Double: return visit(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return visit(static_cast<torch::headeronly::BFloat16*>(nullptr));
    case ScalarType::Half: return visit(static_cast<torch::headeronly::Half*>(nullptr));
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

StridedTensor rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// Calls visit(b, h, i) for every row, in parallel.
template <class Visit>
void for_each_row(const Tensor& t, int64_t row_bytes, const Visit& visit) {
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

template <class T>
bool usable(const Tensor& t, int64_t width_pad) {
  return t.scalar_type() == kScalar<T> && t.size(3) == width_pad && (t.stride(3) == 1 || width_pad == 1);
}

// The conversions of the instruction set in use between elements E and float32; null where there is none.
template <class E>
auto widen_of() -> void (*)(const uint16_t*, int64_t, float*) {
  const ConvertKernels& kernels = instruction_set().convert;
  if constexpr (std::is_same_v<E, torch::headeronly::BFloat16>) return kernels.widen_bfloat16;
  if constexpr (std::is_same_v<E, torch::headeronly::Half>) return kernels.widen_float16;
  return nullptr;
}
template <class E>
auto narrow_of() -> void (*)(const float*, int64_t, uint16_t*) {
  const ConvertKernels& kernels = instruction_set().convert;
  if constexpr (std::is_same_v<E, torch::headeronly::BFloat16>) return kernels.narrow_bfloat16;
  if constexpr (std::is_same_v<E, torch::headeronly::Half>) return kernels.narrow_float16;
  return nullptr;
}

}  // namespace

Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

namespace {
int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16, float16 or int32");
  }
}
}  // namespace

Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8], stride = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, std::data(sizes)[d]);
  }
  AtenTensorHandle handle;
  const int32_t error = aoti_torch_empty_strided(int64_t(sizes.size()), std::data(sizes), strides, code_of(dtype),
                                                 aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(error == 0, "scatterbrain: could not allocate a tensor of ", stride, " elements");
  return Tensor(handle);
}
Tensor zeros_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor t = empty_cpu(sizes, dtype);
  if (t.numel() > 0) std::memset(t.data_ptr(), 0, size_t(t.numel()) * t.element_size());
  return t;
}

Tensor empty_like_tokens(const Tensor& tokens, int64_t width, ScalarType dtype) {
  const int64_t batch = tokens.size(0), heads = tokens.size(1), n = tokens.size(2);
  if (tokens.stride(1) >= tokens.stride(2)) return empty_cpu({batch, heads, n, width}, dtype);
  return torch::stable::transpose(empty_cpu({batch, n, heads, width}, dtype), 1, 2);
}

// One row of elements E, `step` apart, as a row of T padded with zeros.
template <class T, class E>
struct RowCopy {
  int64_t width, width_pad, step;
  void (*widen)(const uint16_t*, int64_t, float*);
  RowCopy(const Tensor& t, int64_t width_pad)
      : width(t.size(3)), width_pad(width_pad), step(t.stride(3)), widen(step == 1 ? widen_of<E>() : nullptr) {}
  void operator()(const E* source, T* target) const {
    if constexpr (std::is_same_v<T, Bfloat16>)  // mostly of the same type, to be padded or brought together
      for (int64_t e = 0; e < width; ++e)
        target[e].bits = torch::headeronly::BFloat16(static_cast<float>(source[e * step])).x;
    else if (std::is_same_v<T, float> && widen)
      widen(reinterpret_cast<const uint16_t*>(source), width, reinterpret_cast<float*>(target));
    else
      for (int64_t e = 0; e < width; ++e) target[e] = static_cast<T>(source[e * step]);
    std::fill(target + width, target + width_pad, T{});
  }
};

template <class T>
Operand as_rows(const Tensor& t, int64_t width_pad) {
  if (usable<T>(t, width_pad)) return {t, rows_of(t), true};
  const Stage stage("conversion of tensors");
  Tensor packed = empty_cpu({t.size(0), t.size(1), t.size(2), width_pad}, kScalar<T>);
  const StridedTensor to = rows_of(packed);
  with_element(t.scalar_type(), [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const StridedTensor from = rows_of(t);
    const RowCopy<T, E> copy(t, width_pad);
    for_each_row(t, width_pad * int64_t(sizeof(T)),
                 [&](int64_t b, int64_t h, int64_t i) { copy(from.at<const E>(b, h, i), to.at<T>(b, h, i)); });
  });
  return {packed, to, false};
}

template <class T>
BlockRows<T> rows_of_block(const Tensor& t, int64_t width_pad, int64_t b, int64_t h, int64_t first, int64_t n,
                           T* scratch) {
  const StridedTensor from = rows_of(t);
  if (usable<T>(t, width_pad)) return {from.at<const T>(b, h, first), from.row};
  with_element(t.scalar_type(), [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const RowCopy<T, E> copy(t, width_pad);
    if (std::is_same_v<T, float> && copy.widen && from.row == width_pad && copy.width == width_pad)  // all at once
      return copy.widen(reinterpret_cast<const uint16_t*>(from.at<const E>(b, h, first)), n * width_pad,
                        reinterpret_cast<float*>(scratch));
    for (int64_t i = 0; i < n; ++i) copy(from.at<const E>(b, h, first + i), scratch + i * width_pad);
  });
  return {scratch, width_pad};
}

template <class T>
Operand result_rows(const Tensor& result, int64_t width_pad, bool written) {
  const Stage stage("zeros");
  if (usable<T>(result, width_pad)) {
    if (result.numel() > 0 && !written) std::memset(result.data_ptr(), 0, size_t(result.numel()) * sizeof(T));
    return {result, rows_of(result), true};
  }
  const std::initializer_list<int64_t> sizes = {result.size(0), result.size(1), result.size(2), width_pad};
  Tensor padded = written ? empty_cpu(sizes, kScalar<T>) : zeros_cpu(sizes, kScalar<T>);
  return {padded, rows_of(padded), false};
}

template <class T>
void write_back(const Operand& from, const Tensor& result) {
  if (from.in_place) return;
  const Stage stage("conversion of tensors");
  const int64_t width = result.size(3);
  with_element(result.scalar_type(), [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const StridedTensor to = rows_of(result);
    const auto narrow = narrow_of<E>();
    for_each_row(result, width * int64_t(sizeof(T)), [&](int64_t b, int64_t h, int64_t i) {
      const T* source = from.rows.at<const T>(b, h, i);
      E* target = to.at<E>(b, h, i);
      if constexpr (std::is_same_v<T, Bfloat16>)  // results have the type of the query
        std::memcpy(target, source, size_t(width) * sizeof(T));
      else if (std::is_same_v<T, float> && narrow)
        narrow(reinterpret_cast<const float*>(source), width, reinterpret_cast<uint16_t*>(target));
      else
        for (int64_t e = 0; e < width; ++e) target[e] = static_cast<E>(source[e]);
    });
  });
}

Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  Tensor converted = torch::stable::empty(t.sizes(), dtype);
  with_element(dtype, [&](auto* to) {
    with_element(t.scalar_type(), [&](auto* from) {
      using From = std::remove_pointer_t<decltype(from)>;
      using To = std::remove_pointer_t<decltype(to)>;
      const From* source = static_cast<const From*>(t.data_ptr());
      std::transform(source, source + t.numel(), static_cast<To*>(converted.data_ptr()),
                     [](From x) { return static_cast<To>(x); });
    });
  });
  return converted;
}

template <class T>
MapOperand as_map(const Tensor& map, MapKind kind, int64_t rank, bool fine) {
  const bool packed = kind == MapKind::kPacked, features = kind == MapKind::kFeatures;
  if (packed && usable<T>(map, packed_width(rank))) {
    StridedTensor logs = rows_of(map);
    logs.data = logs.at<T>(0, 0, 0) + rank + 1;
    return {map, map, rows_of(map), logs};
  }
  const Stage stage("conversion of coordinates");
  const int64_t step = map.stride(3), width = features ? pad_to(rank, kPad) : packed_width(rank);
  Tensor rows = empty_cpu({map.size(0), map.size(1), map.size(2), width}, kScalar<T>);
  Tensor logs = features ? empty_cpu({map.size(0), map.size(1), map.size(2), 1}, kScalar<T>) : rows;
  const StridedTensor from = rows_of(map), to = rows_of(rows);
  StridedTensor log_to = rows_of(logs);
  if (!features) log_to.data = to.at<T>(0, 0, 0) + rank + 1;
  with_element(map.scalar_type(), [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    for_each_row(map, width * int64_t(sizeof(T)), [&](int64_t b, int64_t h, int64_t i) {
      const E* source = from.at<const E>(b, h, i);
      T* target = to.at<T>(b, h, i);
      for (int64_t e = 0; e < rank; ++e) target[e] = static_cast<T>(source[e * step]);
      for (int64_t e = rank; e < width; ++e) target[e] = T(0);
      if (!features) target[rank] = T(1);
      constexpr double log2e = 1.44269504088896340736;
      *log_to.at<T>(b, h, i) = packed ? static_cast<T>(source[(rank + 1) * step])
                               : fine ? static_cast<T>(source[rank * step]) * T(log2e)
                                      : static_cast<T>(source[rank * step] * static_cast<E>(log2e));
    });
  });
  return {rows, logs, to, log_to};
}

MaskOperand as_mask(const std::optional<Tensor>& mask) {
  if (!mask) return {};
  Tensor bytes = as_contiguous(*mask);
  return {bytes, static_cast<const uint8_t*>(bytes.data_ptr())};
}

std::vector<RowRange> row_ranges(int64_t batch, int64_t q_tokens, int64_t k_tokens,
                                 const std::optional<Tensor>& query_range, const std::optional<Tensor>& key_range,
                                 const std::optional<Tensor>& query_offset) {
  std::vector<RowRange> rows(static_cast<size_t>(batch), RowRange{0, int32_t(q_tokens), 0, int32_t(k_tokens), 0});
  for (int64_t b = 0; b < batch; ++b) {
    RowRange& row = rows[size_t(b)];
    const auto element = [&](const Tensor& t, int64_t column) {
      return static_cast<const int32_t*>(t.data_ptr())[b * t.stride(0) + (t.dim() > 1 ? column * t.stride(1) : 0)];
    };
    if (query_range) row.q_first = element(*query_range, 0), row.q_end = element(*query_range, 1);
    if (key_range) row.k_first = element(*key_range, 0), row.k_end = element(*key_range, 1);
    if (query_offset) row.offset = element(*query_offset, 0);
  }
  return rows;
}

#define SB_INSTANTIATE(T)                                                                                 \
  template Operand as_rows<T>(const Tensor&, int64_t);                                                    \
  template BlockRows<T> rows_of_block<T>(const Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t, T*); \
  template Operand result_rows<T>(const Tensor&, int64_t, bool);                                          \
  template void write_back<T>(const Operand&, const Tensor&);                                             \
  template MapOperand as_map<T>(const Tensor&, MapKind, int64_t, bool);
SB_INSTANTIATE(float)
SB_INSTANTIATE(double)
template Operand as_rows<Bfloat16>(const Tensor&, int64_t);
template Operand result_rows<Bfloat16>(const Tensor&, int64_t, bool);
template void write_back<Bfloat16>(const Operand&, const Tensor&);

}  // namespace sb

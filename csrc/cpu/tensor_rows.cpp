#include "tensor_rows.h"

#include "../profile.h"

#include <cstring>

namespace sb::cpu {
namespace {

// The conversions between elements E and float32 of the instruction set in use; null where it has none.
template <class E>
HalfConversion conversion_of() {
  const InstructionSet& set = instruction_set();
  if constexpr (std::is_same_v<E, torch::headeronly::BFloat16>) return set.bfloat16;
  if constexpr (std::is_same_v<E, torch::headeronly::Half>) return set.float16;
  return {};
}

// Copies a row of elements E, `step` apart, to a row of T padded with zeros.
template <class T, class E>
struct RowCopy {
  int64_t width, width_pad, step;
  decltype(HalfConversion::widen) widen;
  RowCopy(const Tensor& t, int64_t width_pad)
      : width(t.size(3)),
        width_pad(width_pad),
        step(t.stride(3)),
        widen(step == 1 ? conversion_of<E>().widen : nullptr) {}
  void operator()(const E* source, T* target) const {
    if constexpr (std::is_same_v<T, Bfloat16>)  // mostly bfloat16 too, whose rows are padded or made contiguous
      for (int64_t e = 0; e < width; ++e)
        target[e].bits = torch::headeronly::BFloat16(static_cast<float>(source[e * step])).x;
    else if (std::is_same_v<T, float> && widen)
      widen(source, width, reinterpret_cast<float*>(target));
    else
      for (int64_t e = 0; e < width; ++e) target[e] = static_cast<T>(source[e * step]);
    std::fill(target + width, target + width_pad, T{});
  }
};

}  // namespace

template <class T>
TensorRows as_rows(const Tensor& t, int64_t width_pad, const uint8_t* ignored) {
  if (is_in_form<T>(t, width_pad)) return {t, rows_of(t), true};
  const Stage stage("conversion of tensors");
  Tensor packed = empty({t.size(0), t.size(1), t.size(2), width_pad}, kScalar<T>);
  const StridedTensor to = rows_of(packed);
  with_element(t.scalar_type(), [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const StridedTensor from = rows_of(t);
    const RowCopy<T, E> copy(t, width_pad);
    for_each_row(t, width_pad * int64_t(sizeof(T)), [&](int64_t b, int64_t h, int64_t i) {
      if (!(ignored && ignored[b * t.size(2) + i])) copy(from.at<const E>(b, h, i), to.at<T>(b, h, i));
    });
  });
  return {packed, to, false};
}

template <class T>
BlockRows<T> rows_of_block(const Tensor& t, int64_t width_pad, int64_t b, int64_t h, int64_t first, int64_t n,
                           T* scratch) {
  const StridedTensor from = rows_of(t);
  if (is_in_form<T>(t, width_pad)) return {from.at<const T>(b, h, first), from.row};
  with_element(t.scalar_type(), [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const RowCopy<T, E> copy(t, width_pad);
    if (std::is_same_v<T, float> && copy.widen && from.row == width_pad && copy.width == width_pad)  // all at once
      return copy.widen(from.at<const E>(b, h, first), n * width_pad, reinterpret_cast<float*>(scratch));
    for (int64_t i = 0; i < n; ++i) copy(from.at<const E>(b, h, first + i), scratch + i * width_pad);
  });
  return {scratch, width_pad};
}

template <class T>
void gather_rows(const Tensor& t, int64_t width_pad, int64_t b, int64_t h, const std::vector<int32_t>& list, T* to) {
  const StridedTensor from = rows_of(t);
  with_element(t.scalar_type(), [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const RowCopy<T, E> copy(t, width_pad);
    for (size_t i = 0; i < list.size(); ++i) copy(from.at<const E>(b, h, list[i]), to + int64_t(i) * width_pad);
  });
}

template <class T>
TensorRows result_rows(const Tensor& result, int64_t width_pad, bool fully_written) {
  const Stage stage("zeros");
  if (is_in_form<T>(result, width_pad)) {
    if (result.numel() > 0 && !fully_written) std::memset(result.data_ptr(), 0, size_t(result.numel()) * sizeof(T));
    return {result, rows_of(result), true};
  }
  const std::initializer_list<int64_t> sizes = {result.size(0), result.size(1), result.size(2), width_pad};
  Tensor padded = fully_written ? empty(sizes, kScalar<T>) : zeros(sizes, kScalar<T>);
  return {padded, rows_of(padded), false};
}

template <class T>
void write_back(const TensorRows& from, const Tensor& result) {
  if (from.in_place) return;
  const Stage stage("conversion of tensors");
  const int64_t width = result.size(3);
  with_element(result.scalar_type(), [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const StridedTensor to = rows_of(result);
    const auto narrow = conversion_of<E>().narrow;
    for_each_row(result, width * int64_t(sizeof(T)), [&](int64_t b, int64_t h, int64_t i) {
      const T* source = from.rows.at<const T>(b, h, i);
      E* target = to.at<E>(b, h, i);
      if constexpr (std::is_same_v<T, Bfloat16>)  // the result is bfloat16 too: it has the dtype of the query
        std::memcpy(target, source, size_t(width) * sizeof(T));
      else if (std::is_same_v<T, float> && narrow)
        narrow(reinterpret_cast<const float*>(source), width, target);
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

#define SB_INSTANTIATE(T)                                                 \
  template TensorRows as_rows<T>(const Tensor&, int64_t, const uint8_t*); \
  template TensorRows result_rows<T>(const Tensor&, int64_t, bool);       \
  template void write_back<T>(const TensorRows&, const Tensor&);
SB_INSTANTIATE(float)
SB_INSTANTIATE(double)
SB_INSTANTIATE(Bfloat16)
template BlockRows<float> rows_of_block(const Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
template BlockRows<double> rows_of_block(const Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t, double*);

template void gather_rows(const Tensor&, int64_t, int64_t, int64_t, const std::vector<int32_t>&, float*);
template void gather_rows(const Tensor&, int64_t, int64_t, int64_t, const std::vector<int32_t>&, double*);

}  // namespace sb::cpu

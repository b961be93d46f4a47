// One call of an operator on a device: its device is the current one and its stream the current stream while this
// lives. Launchers take every pointer that a kernel gets from here, so that the emulator knows what a kernel may touch.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "../launchers.h"
#include "params.h"

namespace sb::cuda {

template <class T>
inline constexpr ScalarType kScalar = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

class Call {
 public:
  explicit Call(const Tensor& on);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Stream stream() const { return current_stream; }
  // An uninitialised tensor on the device of the call, by default of the call's tensors. The allocator keeps memory for
  // kernels that run on the stream after the tensor is gone.
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const;
  // (B, heads, tokens, width) in the memory order of `tokens`.
  Tensor empty_like_tokens(const Tensor& tokens, int64_t width) const;

  // Memory that kernels read, and memory that they write too. The tensor lives as long as the call.
  const void* read(const Tensor& t);
  const void* read(const MaybeTensor& t) { return t ? read(*t) : nullptr; }
  void* write(const Tensor& t);
  // The same of rows (B, heads, tokens, width), in place where elements of a row are neighbours, else a copy.
  StridedTensor read_rows(const Tensor& t);
  // Such rows too, and every one begins at a multiple of 16 bytes; for widths that are multiples of it. From one row to
  // the next it is less than 4 GB.
  StridedTensor read_aligned_rows(const Tensor& t);
  StridedTensor write_rows(const Tensor& t);
  template <class T>
  const T* read_contiguous(const MaybeTensor& t) {
    return t ? static_cast<const T*>(read(contiguous(*t))) : nullptr;
  }
  static Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
  static Tensor converted(const Tensor& t, ScalarType dtype) {
    return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  }

 private:
  void expose(const Tensor& t, bool is_writable);
  const Tensor on;
  Stream current_stream{};
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  std::vector<Tensor> alive;
};

Element element_of(const Tensor& t);

}  // namespace sb::cuda

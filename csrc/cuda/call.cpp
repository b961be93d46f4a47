#if !defined(USE_CUDA)
#define USE_CUDA  // by which torch's headers declare its functions for CUDA
#endif
#include "call.h"

#include "../error.h"
#if defined(SB_EMULATOR)
#include "../emulator/emulator.h"
#endif

namespace sb::cuda {

Call::Call(const Tensor& on) : on(on) {
#if defined(SB_EMULATOR)
  emulator::withdraw_all();  // what a call that failed left
#else
  const auto device = on.device();
  guard.emplace(device.index());
  SB_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &current_stream.handle) == 0,
           "scatterbrain: expected a current stream of CUDA device ", int(device.index()), ", and torch has none");
#endif
}

Call::~Call() {
#if defined(SB_EMULATOR)
  emulator::withdraw_all();
#endif
}

Tensor Call::empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
  Tensor made = torch::stable::new_empty(on, {std::data(sizes), sizes.size()}, dtype);
#if defined(SB_EMULATOR)
  emulator::fill_unwritten(made.data_ptr(), made.numel() * int64_t(made.element_size()), int(made.scalar_type()));
#endif
  return made;
}

Tensor Call::empty_like_tokens(const Tensor& tokens, int64_t width) const {
  const int64_t batch = tokens.size(0), heads = tokens.size(1), n = tokens.size(2);
  if (tokens.stride(1) >= tokens.stride(2)) return empty({batch, heads, n, width}, tokens.scalar_type());
  return torch::stable::transpose(empty({batch, n, heads, width}, tokens.scalar_type()), 1, 2);
}

void Call::expose(const Tensor& t, [[maybe_unused]] bool is_writable) {
  SB_CHECK(t.device() == on.device(), "scatterbrain: expected all tensors of a call on CUDA device ",
           int(on.device().index()), ", where its first is, got one elsewhere; move it there");
#if defined(SB_EMULATOR)
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  if (t.numel() > 0)
    emulator::expose(t.data_ptr(), (last + 1) * int64_t(t.element_size()), is_writable, int(t.scalar_type()),
                     int64_t(t.element_size()));
#endif
  alive.push_back(t);
}

const void* Call::read(const Tensor& t) {
  expose(t, false);
  return t.data_ptr();
}
void* Call::write(const Tensor& t) {
  expose(t, true);
  return t.data_ptr();
}

StridedTensor Call::read_rows(const Tensor& t) {
  const Tensor dense = t.stride(3) == 1 || t.size(3) == 1 ? t : contiguous(t);
  return {const_cast<void*>(read(dense)), dense.stride(0), dense.stride(1), dense.stride(2)};
}
StridedTensor Call::read_aligned_rows(const Tensor& t) {
  const auto is_aligned = [&](int64_t bytes) { return bytes % 16 == 0; };
  bool in_place = t.stride(3) == 1 && is_aligned(int64_t(reinterpret_cast<uintptr_t>(t.data_ptr())));
  for (int d = 0; d < 3; ++d) in_place = in_place && is_aligned(t.stride(d) * int64_t(t.element_size()));
  in_place = in_place && t.stride(2) * int64_t(t.element_size()) <= int64_t(UINT32_MAX);
  if (in_place) return read_rows(t);
  Tensor copy = empty({t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
  torch::stable::copy_(copy, t);
  return read_rows(copy);
}
StridedTensor Call::write_rows(const Tensor& t) { return {write(t), t.stride(0), t.stride(1), t.stride(2)}; }

Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::BFloat16: return Element::kBfloat16;
    case ScalarType::Half: return Element::kHalf;
    default: SB_CHECK(false, "expected float32, float64, bfloat16 or float16 tokens");
  }
}

}  // namespace sb::cuda

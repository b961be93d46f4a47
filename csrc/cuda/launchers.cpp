#include "launchers.h"

#include <torch/csrc/stable/ops.h>

#include "../params.h"

namespace sb::cuda {

bool equal_bytes(const Tensors& a, const Tensors& b) { return a.empty() && b.empty(); }

Tensor empty(const Tensor& on, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(on, {std::data(sizes), sizes.size()}, dtype);
}

// The backward pass makes the states again.
SavedSizes saved_sizes(const AttentionShape& s) {
  const bool is_wide = s.dtype == ScalarType::Double || s.head_dim < kNarrowHead;
  return {{0}, {0}, is_wide ? ScalarType::Double : ScalarType::Float};
}

void fill(Launchers& table) {
  table.attention = &attention;
  table.attention_backward = &attention_backward;
  table.cluster = &cluster;
  table.route = &route;
  table.project = &project;
  table.project_packed = &project_packed;
  table.project_backward = &project_backward;
  table.equal_bytes = &equal_bytes;
  table.empty = &empty;
  table.saved_sizes = &saved_sizes;
}

#if !defined(SB_EMULATOR)
namespace {

Launchers table = [] {
  Launchers filled{};
  fill(filled);
  return filled;
}();

}  // namespace

SB_REGISTER_DEVICE(CUDA, table)
#endif

}  // namespace sb::cuda

#include "launchers.h"

#include "allocation.h"
#include "saved_sizes.h"

namespace sb::cpu {
namespace {

Launchers table{
    .attention = &attention,
    .attention_backward = &attention_backward,
    .route = &route,
    .cluster = &cluster,
    .project = &project,
    .project_packed = &project_packed,
    .project_backward = &project_backward,
    .equal_bytes = &equal_bytes,
    .empty = [](const Tensor&, std::initializer_list<int64_t> sizes, ScalarType dtype) { return empty(sizes, dtype); },
    .saved_sizes = &saved_sizes,
};

std::string instruction_set_name() { return instruction_set().name; }

}  // namespace

SB_REGISTER_DEVICE(CPU, table)

STABLE_TORCH_LIBRARY_FRAGMENT(scatterbrain, library) {
  library.def("instruction_set() -> str");
  library.def(
      "cluster_lists(Tensor query_cluster, Tensor key_cluster, Tensor? query_range, Tensor? key_range, int largest) -> "
      "(Tensor index, Tensor count)");
  library.def("input_projection(" SB_INPUT_PROJECTION(SB_SCHEMA, SB_SCHEMA_COMMA) ") -> (Tensor query_weight, Tensor "
              "query_bias, Tensor key_weight, Tensor key_bias)");
}
STABLE_TORCH_LIBRARY_IMPL(scatterbrain, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&instruction_set_name));
}
STABLE_TORCH_LIBRARY_IMPL(scatterbrain, CPU, library) {
  library.impl("cluster_lists", TORCH_BOX(&cluster_lists));
  library.impl("input_projection", TORCH_BOX(&input_projection));
}

}  // namespace sb::cpu

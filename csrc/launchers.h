// What a device provides. ops.cpp reaches every device through its table of launchers and through nothing else.
#pragma once
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <tuple>

#include "arguments.h"

namespace sb {

// Shapes and dtype of what the forward pass saves for the backward pass; {0} where it saves nothing.
struct SavedSizes {
  std::vector<int64_t> state, scores;
  ScalarType dtype;
};

// out, lse, state and scores. The last two are of saved_sizes where the call is trained.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// Of query, key, value, query_map and key_map. Those of the maps have no rows without maps, and where the projections
// that made the maps are given. That of key holds what reaches the keys through their clusters.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// index, representatives, log_mass and query_mean.
using Clusters = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Launchers {
  Results (*attention)(const AttentionArguments&);
  Gradients (*attention_backward)(const AttentionArguments&, const Tensor& out, const Tensor& lse, const Tensor& d_out,
                                  const MaybeTensor& d_lse);
  std::tuple<Tensor, Tensor> (*route)(const RouteArguments&);
  Clusters (*cluster)(const ClusterArguments&);
  Tensor (*project)(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
  Tensor (*project_packed)(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
  std::tuple<Tensor, Tensor, Tensor> (*project_backward)(const Tensor& grad, const Tensor& tokens,
                                                         const Tensor& weight);
  // Whether the tensors of `a` have the dtypes, shapes and bytes of those of `b`.
  bool (*equal_bytes)(const Tensors& a, const Tensors& b);
  // Uninitialised, on the device of `on`.
  Tensor (*empty)(const Tensor& on, std::initializer_list<int64_t> sizes, ScalarType dtype);
  SavedSizes (*saved_sizes)(const AttentionShape&);
};

// The table of a device; an error where this build has none. A test may overwrite what the table holds.
Launchers& launchers(DeviceType device);
inline Launchers& launchers(const Tensor& tensor) { return launchers(tensor.device().type()); }

void register_launchers(DeviceType device, Launchers& table);

// Registers the operators that run on a device for the dispatch key of `library`.
void implement_operators(torch::stable::detail::StableLibrary& library);

// Registers a device: stands once, in the device's own folder. KEY: its dispatch key and DeviceType.
#define SB_REGISTER_DEVICE(KEY, table)                                 \
  STABLE_TORCH_LIBRARY_IMPL(scatterbrain, KEY, library) {              \
    sb::register_launchers(torch::headeronly::DeviceType::KEY, table); \
    sb::implement_operators(library);                                  \
  }

}  // namespace sb

// Clusters of the keys as kernels read them: log masses in base 2, counted from the largest of their cluster.
#pragma once
#include "tensor_rows.h"

namespace sb::cpu {

// Holds what the parameters of a kernel point at.
struct ClusterRows {
  template <class T, class Arguments, class Params>
  void set(const Arguments& a, Params& p);
  template <class T>
  void set_query_mean(const AttentionArguments& a, AttentionParams& p);
  MaybeTensor index, logs, largest, mean;
  TensorRows representatives;
};

}  // namespace sb::cpu

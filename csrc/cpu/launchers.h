// The launchers of the CPU.
#pragma once
#include "../launchers.h"

namespace sb::cpu {

Results attention(const AttentionArguments&);
Gradients attention_backward(const AttentionArguments&, const Tensor& out, const Tensor& lse, const Tensor& d_out,
                             const MaybeTensor& d_lse);
std::tuple<Tensor, Tensor> route(const RouteArguments&);
Clusters cluster(const ClusterArguments&);
Tensor project(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
Tensor project_packed(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias);
std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight);

// For supports that sort tokens into clusters; on other devices they make their lists of torch's own operations. index
// and count, as attention takes them with block_q = block_k = 1, of queries and keys whose cluster in each round is
// given, (B, H, rounds, tokens), -1 for ignored tokens: a query's list is the union over the rounds of the keys in its
// cluster. No cluster has more than `largest` keys. Lists count from the start of query_range and key_range.
std::tuple<Tensor, Tensor> cluster_lists(const Tensor& query_cluster, const Tensor& key_cluster,
                                         const MaybeTensor& query_range, const MaybeTensor& key_range, int64_t largest);

// The projections of Quadratic(statistics="input"), which on other devices are made of torch's own operations:
// query_weight, query_bias, key_weight and key_bias, (B, Hkv, rank + 1, d) and without the last dimension. NaN for
// heads where anything is not finite.
using InputProjection = std::tuple<Tensor, Tensor, Tensor, Tensor>;
InputProjection input_projection(SB_INPUT_PROJECTION(SB_PARAMETER, SB_COMMA));

}  // namespace sb::cpu

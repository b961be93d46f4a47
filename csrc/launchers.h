// What a device provides, by operator. ops.cpp calls through this table and nothing else; a test module can put its own
// in place.
#pragma once
#include <optional>
#include <tuple>

#include "checks.h"

namespace sb {

struct Launchers {
  // out, lse, and, where the call is trained, states and scores for the backward pass: empty where it makes them again.
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*attention)(const AttentionArguments&);
  // Gradients of query, key, value, query_map and key_map; the last two are empty without a low-rank kernel,
  // and where the projections that made the maps are given.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> (*attention_backward)(const AttentionArguments&, const Tensor& out,
                                                                           const Tensor& lse, const Tensor& d_out,
                                                                           const std::optional<Tensor>& d_lse);
  std::tuple<Tensor, Tensor> (*route)(const RouteArguments&);
  Tensor (*project)(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& bias);
  Tensor (*project_packed)(const Tensor& tokens, const Tensor& weight, const Tensor& bias);
  std::tuple<Tensor, Tensor, Tensor> (*project_backward)(const Tensor& grad, const Tensor& tokens,
                                                         const Tensor& weight);
};

Launchers& cpu_launchers();

namespace cpu {
std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const AttentionArguments&);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const AttentionArguments&, const Tensor& out,
                                                                      const Tensor& lse, const Tensor& d_out,
                                                                      const std::optional<Tensor>& d_lse);
std::tuple<Tensor, Tensor> route(const RouteArguments&);
Tensor project(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& bias);
Tensor project_packed(const Tensor& tokens, const Tensor& weight, const Tensor& bias);
std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight);
}  // namespace cpu

}  // namespace sb

// Every operator: the table of contents. Shapes and meanings are in scatterbrain/ops.py, checks in checks.h, devices
// behind launchers.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tensor_rows.h"
#include "launchers.h"
#include "prepared_calls.h"
#include "profile.h"

namespace sb {

Launchers& cpu_launchers() {
  static Launchers table{&cpu::attention, &cpu::attention_backward, &cpu::route,
                         &cpu::project,   &cpu::project_packed,     &cpu::project_backward};
  return table;
}

namespace {

using MaybeTensor = std::optional<Tensor>;

// Arguments of SB_ATTENTION_SCHEMA below, in its order.
#define SB_ATTENTION_ARGUMENTS                                                                                     \
  Tensor query, Tensor key, Tensor value, MaybeTensor query_map, MaybeTensor key_map, MaybeTensor index,           \
      MaybeTensor count, MaybeTensor span, MaybeTensor query_order, MaybeTensor query_mask, MaybeTensor key_mask,  \
      MaybeTensor query_range, MaybeTensor key_range, MaybeTensor query_offset, int64_t low_rank, int64_t block_q, \
      int64_t block_k, int64_t span_keys, bool is_causal, double scale, int64_t packed_rank
#define SB_ATTENTION_VALUES                                                                                  \
  query, key, value, query_map, key_map, index, count, span, query_order, query_mask, key_mask, query_range, \
      key_range, query_offset, low_rank, block_q, block_k, span_keys, is_causal, scale, packed_rank

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_with_state(SB_ATTENTION_ARGUMENTS) {
  AttentionArguments a{SB_ATTENTION_VALUES};
  a.is_trained = true;
  check_attention(a);
  return cpu_launchers().attention(a);
}

std::tuple<Tensor, Tensor> attention(SB_ATTENTION_ARGUMENTS) {
  const AttentionArguments a{SB_ATTENTION_VALUES};
  check_attention(a);
  auto [out, lse, state, scores] = cpu_launchers().attention(a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(Tensor d_out, MaybeTensor d_lse, Tensor out,
                                                                      Tensor lse, SB_ATTENTION_ARGUMENTS,
                                                                      MaybeTensor state, MaybeTensor scores,
                                                                      MaybeTensor query_weight,
                                                                      MaybeTensor key_weight) {
  AttentionArguments a{SB_ATTENTION_VALUES};
  a.state = state, a.scores = scores, a.query_weight = query_weight, a.key_weight = key_weight;
  check_attention(a);
  check_attention_backward(a, d_out, d_lse, out, lse);
  return cpu_launchers().attention_backward(a, out, lse, d_out, d_lse);
}

std::tuple<Tensor, Tensor> route(Tensor query, Tensor key, MaybeTensor query_map, MaybeTensor key_map,
                                 MaybeTensor query_mask, MaybeTensor key_mask, MaybeTensor query_range,
                                 MaybeTensor key_range, MaybeTensor query_offset, int64_t low_rank, int64_t keys,
                                 int64_t block_q, int64_t block_k, int64_t window, bool is_causal, double scale,
                                 int64_t packed_rank) {
  const RouteArguments a{query,       key,       query_map,    key_map,  query_mask, key_mask,
                         query_range, key_range, query_offset, low_rank, keys,       block_q,
                         block_k,     window,    is_causal,    scale,    packed_rank};
  check_route(a);
  return cpu_launchers().route(a);
}

Tensor project(Tensor tokens, Tensor weight, MaybeTensor bias) {
  check_projection(tokens, weight);
  check_projection_bias(weight, bias);
  return cpu_launchers().project(tokens, weight, bias);
}

Tensor project_packed(Tensor tokens, Tensor weight, Tensor bias) {
  check_projection(tokens, weight);
  check_projection_bias(weight, bias);
  STD_TORCH_CHECK(weight.size(2) >= 2, "project_packed: weight needs rows for coordinates and one for the log scale");
  return cpu_launchers().project_packed(tokens, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> project_backward(Tensor grad, Tensor tokens, Tensor weight) {
  check_projection(tokens, weight);
  check_projection_gradient(grad, tokens, weight);
  return cpu_launchers().project_backward(grad, tokens, weight);
}

// Whether tensors hold the bytes of others.
bool equal_bytes(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (i >= b.size() || !a[i].is_cpu() || a[i].scalar_type() != b[i].scalar_type() || a[i].dim() != b[i].dim())
      return false;
    for (int64_t d = 0; d < a[i].dim(); ++d)
      if (a[i].size(d) != b[i].size(d)) return false;
    const Tensor x = as_contiguous(a[i]), y = as_contiguous(b[i]);
    if (std::memcmp(x.data_ptr(), y.data_ptr(), size_t(x.numel()) * x.element_size()) != 0) return false;
  }
  return a.size() == b.size();
}

// Everything from projections to attention with the quadratic kernel in one call: what five operators would do, without
// four times the way from the interpreter and back.
#define SB_QUADRATIC_ARGUMENTS                                                                                      \
  Tensor query_weight, Tensor query_bias, Tensor key_weight, Tensor key_bias, MaybeTensor index, MaybeTensor count, \
      MaybeTensor span, MaybeTensor query_order, MaybeTensor query_mask, MaybeTensor key_mask,                      \
      MaybeTensor query_range, MaybeTensor key_range, MaybeTensor query_offset, int64_t keys, int64_t window,       \
      int64_t block_q, int64_t block_k, int64_t span_keys, bool is_causal, double scale, int64_t packed_rank
#define SB_QUADRATIC_VALUES                                                                                           \
  query_weight, query_bias, key_weight, key_bias, index, count, span, query_order, query_mask, key_mask, query_range, \
      key_range, query_offset, keys, window, block_q, block_k, span_keys, is_causal, scale, packed_rank

QuadraticArguments quadratic_arguments(SB_QUADRATIC_ARGUMENTS) {
  constexpr int64_t low_rank = int64_t(LowRank::kQuadratic);
  const Tensor query, key, value;
  const MaybeTensor query_map, key_map;
  return {query_weight, query_bias, key_weight, key_bias, keys, window, AttentionArguments{SB_ATTENTION_VALUES}};
}

// The arguments of attention: maps projected, and lists routed where `keys` says so.
AttentionArguments project_and_route(const QuadraticArguments& of, const Tensor& query, const Tensor& key,
                                     const Tensor& value) {
  AttentionArguments a = of.attention;
  a.query = query, a.key = key, a.value = value;
  const auto map_of = [&](const Tensor& tokens, const Tensor& weight, const Tensor& bias) {
    return a.packed_rank > 0 ? project_packed(tokens, weight, bias) : project(tokens, weight, bias);
  };
  a.query_map = map_of(query, of.query_weight, of.query_bias);
  a.key_map = map_of(key, of.key_weight, of.key_bias);
  if (of.keys > 0)
    std::tie(a.index, a.count) =
        route(query, key, a.query_map, a.key_map, a.query_mask, a.key_mask, a.query_range, a.key_range, a.query_offset,
              a.low_rank, of.keys, a.block_q, a.block_k, of.window, a.is_causal, a.scale, a.packed_rank);
  check_attention(a);
  return a;
}

typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> TrainedResults;
Tensor nothing() { return empty_cpu({0}, ScalarType::Int); }

std::tuple<Tensor, Tensor> quadratic(const QuadraticArguments& of, const Tensor& query, const Tensor& key,
                                     const Tensor& value) {
  auto [out, lse, state, scores] = cpu_launchers().attention(project_and_route(of, query, key, value));
  return {out, lse};
}
TrainedResults quadratic_with_state(const QuadraticArguments& of, const Tensor& query, const Tensor& key,
                                    const Tensor& value) {
  AttentionArguments a = project_and_route(of, query, key, value);
  a.is_trained = true;
  auto [out, lse, state, scores] = cpu_launchers().attention(a);
  const bool routed = of.keys > 0;
  return {
      out, lse, state, scores, *a.query_map, *a.key_map, routed ? *a.index : nothing(), routed ? *a.count : nothing()};
}

std::tuple<Tensor, Tensor> quadratic_attention(Tensor query, Tensor key, Tensor value, SB_QUADRATIC_ARGUMENTS) {
  return quadratic(quadratic_arguments(SB_QUADRATIC_VALUES), query, key, value);
}
TrainedResults quadratic_attention_with_state(Tensor query, Tensor key, Tensor value, SB_QUADRATIC_ARGUMENTS) {
  return quadratic_with_state(quadratic_arguments(SB_QUADRATIC_VALUES), query, key, value);
}

// The same of a plan. Where what its projections were made from has changed since, all results are empty.
int64_t plan(SB_QUADRATIC_ARGUMENTS, std::vector<Tensor> sources, std::vector<Tensor> copies) {
  return keep_plan({quadratic_arguments(SB_QUADRATIC_VALUES), std::move(sources), std::move(copies)});
}
void forget_plan(int64_t number) { drop_plan(number); }

Tensor planned_attention(Tensor query, Tensor key, Tensor value, int64_t number) {
  const std::shared_ptr<const Plan> plan = plan_of(number);
  if (!equal_bytes(plan->sources, plan->copies)) return nothing();
  return std::get<0>(quadratic(plan->arguments, query, key, value));
}
TrainedResults planned_attention_with_state(Tensor query, Tensor key, Tensor value, int64_t number) {
  const std::shared_ptr<const Plan> plan = plan_of(number);
  if (!equal_bytes(plan->sources, plan->copies))
    return {nothing(), nothing(), nothing(), nothing(), nothing(), nothing(), nothing(), nothing()};
  return quadratic_with_state(plan->arguments, query, key, value);
}
// From d_out and what the forward pass returned; through the maps.
std::tuple<Tensor, Tensor, Tensor> planned_attention_backward(Tensor d_out, Tensor out, Tensor lse, Tensor state,
                                                              Tensor scores, Tensor query_map, Tensor key_map,
                                                              Tensor query, Tensor key, Tensor value, int64_t number,
                                                              MaybeTensor index, MaybeTensor count) {
  const std::shared_ptr<const Plan> plan = plan_of(number);
  AttentionArguments a = plan->arguments.attention;
  a.query = query, a.key = key, a.value = value, a.query_map = query_map, a.key_map = key_map;
  if (plan->arguments.keys > 0) a.index = index, a.count = count;
  a.state = state, a.scores = scores;
  a.query_weight = plan->arguments.query_weight, a.key_weight = plan->arguments.key_weight;
  check_attention(a);
  check_attention_backward(a, d_out, std::nullopt, out, lse);
  auto [dq, dk, dv, d_query_map, d_key_map] = cpu_launchers().attention_backward(a, out, lse, d_out, std::nullopt);
  return {dq, dk, dv};
}

std::string stages(bool on) { return record_stages(on); }

std::string instruction_set_name() { return instruction_set().name; }

}  // namespace
}  // namespace sb

#define SB_ROWS_SCHEMA \
  "Tensor? query_mask, Tensor? key_mask, Tensor? query_range, Tensor? key_range, Tensor? query_offset, int low_rank, "
#define SB_ATTENTION_SCHEMA                                                                             \
  "Tensor query, Tensor key, Tensor value, Tensor? query_map, Tensor? key_map, Tensor? index, Tensor? " \
  "count, Tensor? span, Tensor? query_order, " SB_ROWS_SCHEMA                                           \
  "int block_q, int block_k, int span_keys, bool is_causal, float scale, int packed_rank=0"

#define SB_QUADRATIC_SCHEMA                                                                                          \
  "Tensor query_weight, Tensor query_bias, Tensor key_weight, Tensor key_bias, Tensor? index, Tensor? count, "       \
  "Tensor? span, Tensor? query_order, Tensor? query_mask, Tensor? key_mask, Tensor? query_range, Tensor? "           \
  "key_range, Tensor? query_offset, int keys, int window, int block_q, int block_k, int span_keys, bool is_causal, " \
  "float scale, int packed_rank"
#define SB_TOKENS_SCHEMA "Tensor query, Tensor key, Tensor value, "
#define SB_TRAINED_SCHEMA                                                                                         \
  "(Tensor out, Tensor lse, Tensor state, Tensor scores, Tensor query_map, Tensor key_map, Tensor index, Tensor " \
  "count)"

STABLE_TORCH_LIBRARY(scatterbrain, m) {
  m.def("instruction_set() -> str");
  m.def("stages(bool on) -> str");
  m.def("route(Tensor query, Tensor key, Tensor? query_map, Tensor? key_map, " SB_ROWS_SCHEMA
        "int keys, int block_q, int block_k, int window, bool is_causal, float scale, int packed_rank=0) -> (Tensor "
        "index, Tensor count)");
  m.def("project(Tensor tokens, Tensor weight, Tensor? bias) -> Tensor");
  m.def("project_packed(Tensor tokens, Tensor weight, Tensor bias) -> Tensor");
  m.def("project_backward(Tensor grad, Tensor tokens, Tensor weight) -> (Tensor, Tensor, Tensor)");
  m.def("attention(" SB_ATTENTION_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("attention_with_state(" SB_ATTENTION_SCHEMA ") -> (Tensor out, Tensor lse, Tensor state, Tensor scores)");
  m.def("quadratic_attention(" SB_TOKENS_SCHEMA SB_QUADRATIC_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("quadratic_attention_with_state(" SB_TOKENS_SCHEMA SB_QUADRATIC_SCHEMA ") -> " SB_TRAINED_SCHEMA);
  m.def("plan(" SB_QUADRATIC_SCHEMA ", Tensor[] sources, Tensor[] copies) -> int");
  m.def("forget_plan(int plan) -> ()");
  m.def("planned_attention(" SB_TOKENS_SCHEMA "int plan) -> Tensor");
  m.def("planned_attention_with_state(" SB_TOKENS_SCHEMA "int plan) -> " SB_TRAINED_SCHEMA);
  m.def(
      "planned_attention_backward(Tensor d_out, Tensor out, Tensor lse, Tensor state, Tensor scores, Tensor query_map, "
      "Tensor key_map, " SB_TOKENS_SCHEMA
      "int plan, Tensor? index=None, Tensor? count=None) -> (Tensor, Tensor, Tensor)");
  m.def("equal_bytes(Tensor[] a, Tensor[] b) -> bool");
  m.def("attention_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, " SB_ATTENTION_SCHEMA
        ", Tensor? state=None, Tensor? scores=None, Tensor? query_weight=None, Tensor? key_weight=None) -> (Tensor, "
        "Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(scatterbrain, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&sb::instruction_set_name));
  m.impl("stages", TORCH_BOX(&sb::stages));
  m.impl("forget_plan", TORCH_BOX(&sb::forget_plan));
}

STABLE_TORCH_LIBRARY_IMPL(scatterbrain, CPU, m) {
  m.impl("route", TORCH_BOX(&sb::route));
  m.impl("project", TORCH_BOX(&sb::project));
  m.impl("project_packed", TORCH_BOX(&sb::project_packed));
  m.impl("project_backward", TORCH_BOX(&sb::project_backward));
  m.impl("attention", TORCH_BOX(&sb::attention));
  m.impl("attention_with_state", TORCH_BOX(&sb::attention_with_state));
  m.impl("quadratic_attention", TORCH_BOX(&sb::quadratic_attention));
  m.impl("quadratic_attention_with_state", TORCH_BOX(&sb::quadratic_attention_with_state));
  m.impl("plan", TORCH_BOX(&sb::plan));
  m.impl("planned_attention", TORCH_BOX(&sb::planned_attention));
  m.impl("planned_attention_with_state", TORCH_BOX(&sb::planned_attention_with_state));
  m.impl("planned_attention_backward", TORCH_BOX(&sb::planned_attention_backward));
  m.impl("equal_bytes", TORCH_BOX(&sb::equal_bytes));
  m.impl("attention_backward", TORCH_BOX(&sb::attention_backward));
}

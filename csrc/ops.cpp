// Every operator: the table of contents. Shapes and meanings are in scatterbrain/ops.py, checks in checks.h, devices
// behind launchers.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/operands.h"
#include "launchers.h"
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
    if (i >= b.size() || a[i].scalar_type() != b[i].scalar_type() || a[i].dim() != b[i].dim()) return false;
    for (int64_t d = 0; d < a[i].dim(); ++d)
      if (a[i].size(d) != b[i].size(d)) return false;
    const Tensor x = as_contiguous(a[i]), y = as_contiguous(b[i]);
    if (std::memcmp(x.data_ptr(), y.data_ptr(), size_t(x.numel()) * x.element_size()) != 0) return false;
  }
  return a.size() == b.size();
}

// Everything from projections to attention with the quadratic kernel in one call: what five operators would do, without
// four times the way from the interpreter and back. Where `sources` no longer hold the bytes of `copies`, from which
// the projections were made, all results are empty.
#define SB_QUADRATIC_ARGUMENTS                                                                                        \
  Tensor query, Tensor key, Tensor value, Tensor query_weight, Tensor query_bias, Tensor key_weight, Tensor key_bias, \
      MaybeTensor index, MaybeTensor count, MaybeTensor span, MaybeTensor query_order, MaybeTensor query_mask,        \
      MaybeTensor key_mask, MaybeTensor query_range, MaybeTensor key_range, MaybeTensor query_offset, int64_t keys,   \
      int64_t window, int64_t block_q, int64_t block_k, int64_t span_keys, bool is_causal, double scale,              \
      int64_t packed_rank, std::vector<Tensor> sources, std::vector<Tensor> copies
#define SB_QUADRATIC_VALUES                                                                                        \
  query, key, value, query_weight, query_bias, key_weight, key_bias, index, count, span, query_order, query_mask,  \
      key_mask, query_range, key_range, query_offset, keys, window, block_q, block_k, span_keys, is_causal, scale, \
      packed_rank, sources, copies

Tensor nothing() { return empty_cpu({0}, ScalarType::Int); }

// The arguments of attention: maps projected, and lists routed where `keys` says so. None where the projections are
// stale.
std::optional<AttentionArguments> project_and_route(SB_QUADRATIC_ARGUMENTS) {
  if (!equal_bytes(sources, copies)) return std::nullopt;
  constexpr int64_t low_rank = int64_t(LowRank::kQuadratic);
  const bool packed = packed_rank > 0;
  const MaybeTensor query_map = packed ? project_packed(query, query_weight, query_bias)
                                       : project(query, query_weight, query_bias),
                    key_map = packed ? project_packed(key, key_weight, key_bias) : project(key, key_weight, key_bias);
  if (keys > 0)
    std::tie(index, count) =
        route(query, key, query_map, key_map, query_mask, key_mask, query_range, key_range, query_offset, low_rank,
              keys, block_q, block_k, window, is_causal, scale, packed_rank);
  return AttentionArguments{SB_ATTENTION_VALUES};
}

std::tuple<Tensor, Tensor> quadratic_attention(SB_QUADRATIC_ARGUMENTS) {
  const std::optional<AttentionArguments> a = project_and_route(SB_QUADRATIC_VALUES);
  if (!a) return {nothing(), nothing()};
  check_attention(*a);
  auto [out, lse, state, scores] = cpu_launchers().attention(*a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quadratic_attention_with_state(
    SB_QUADRATIC_ARGUMENTS) {
  std::optional<AttentionArguments> a = project_and_route(SB_QUADRATIC_VALUES);
  if (!a) return {nothing(), nothing(), nothing(), nothing(), nothing(), nothing(), nothing(), nothing()};
  a->is_trained = true;
  check_attention(*a);
  auto [out, lse, state, scores] = cpu_launchers().attention(*a);
  Tensor routed_index = keys > 0 ? *a->index : nothing(), routed_count = keys > 0 ? *a->count : nothing();
  return {out, lse, state, scores, *a->query_map, *a->key_map, routed_index, routed_count};
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

#define SB_QUADRATIC_SCHEMA                                                                                         \
  "Tensor query, Tensor key, Tensor value, Tensor query_weight, Tensor query_bias, Tensor key_weight, Tensor "      \
  "key_bias, Tensor? index, Tensor? count, Tensor? span, Tensor? query_order, Tensor? query_mask, Tensor? "         \
  "key_mask, Tensor? query_range, Tensor? key_range, Tensor? query_offset, int keys, int window, int block_q, int " \
  "block_k, int span_keys, bool is_causal, float scale, int packed_rank, Tensor[] sources, Tensor[] copies"

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
  m.def("quadratic_attention(" SB_QUADRATIC_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("quadratic_attention_with_state(" SB_QUADRATIC_SCHEMA
        ") -> (Tensor out, Tensor lse, Tensor state, Tensor scores, Tensor query_map, Tensor key_map, Tensor index, "
        "Tensor count)");
  m.def("equal_bytes(Tensor[] a, Tensor[] b) -> bool");
  m.def("attention_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, " SB_ATTENTION_SCHEMA
        ", Tensor? state=None, Tensor? scores=None, Tensor? query_weight=None, Tensor? key_weight=None) -> (Tensor, "
        "Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(scatterbrain, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&sb::instruction_set_name));
  m.impl("stages", TORCH_BOX(&sb::stages));
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
  m.impl("equal_bytes", TORCH_BOX(&sb::equal_bytes));
  m.impl("attention_backward", TORCH_BOX(&sb::attention_backward));
}

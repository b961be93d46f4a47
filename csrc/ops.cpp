// The operators: their schemas, and functions that check the arguments and call the launcher of the tensors' device.
// scatterbrain/ops.py says what the arguments mean; arguments.h lists them, checks.h checks them.

#include "checks.h"
#include "launchers.h"
#include "math/routing.h"
#include "prepared_calls.h"
#include "profile.h"

namespace sb {
namespace {

// -------------------- attention, routing, clustering, projections

Results attention_with_state(SB_ATTENTION(SB_PARAMETER, SB_COMMA)) {
  AttentionArguments a{SB_ATTENTION(SB_VALUE, SB_COMMA)};
  a.is_trained = true;
  check_attention(a);
  return launchers(a.query).attention(a);
}

std::tuple<Tensor, Tensor> attention(SB_ATTENTION(SB_PARAMETER, SB_COMMA)) {
  const AttentionArguments a{SB_ATTENTION(SB_VALUE, SB_COMMA)};
  check_attention(a);
  auto [out, lse, state, scores] = launchers(a.query).attention(a);
  return {out, lse};
}

Gradients attention_backward(Tensor d_out, MaybeTensor d_lse, Tensor out, Tensor lse,
                             SB_ATTENTION(SB_PARAMETER, SB_COMMA), SB_SAVED(SB_PARAMETER, SB_COMMA)) {
  const AttentionArguments a{SB_ATTENTION(SB_VALUE, SB_COMMA), SB_SAVED(SB_VALUE, SB_COMMA)};
  check_attention_backward(a, d_out, d_lse, out, lse);
  return launchers(a.query).attention_backward(a, out, lse, d_out, d_lse);
}

std::tuple<Tensor, Tensor> route(SB_ROUTE(SB_PARAMETER, SB_COMMA)) {
  const RouteArguments a{SB_ROUTE(SB_VALUE, SB_COMMA)};
  check_route(a);
  return launchers(a.query).route(a);
}

Clusters cluster(SB_CLUSTER(SB_PARAMETER, SB_COMMA)) {
  const ClusterArguments a{SB_CLUSTER(SB_VALUE, SB_COMMA)};
  check_cluster(a);
  return launchers(a.query).cluster(a);
}

Tensor project(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias) {
  check_projection(tokens, weight, bias);
  return launchers(tokens).project(tokens, weight, bias);
}

Tensor project_packed(const Tensor& tokens, const Tensor& weight, const Tensor& bias) {
  check_packed_projection(tokens, weight, bias);
  return launchers(tokens).project_packed(tokens, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight) {
  check_projection_backward(grad, tokens, weight);
  return launchers(tokens).project_backward(grad, tokens, weight);
}

bool equal_bytes(const Tensors& a, const Tensors& b) {
  return a.empty() ? b.empty() : launchers(a[0]).equal_bytes(a, b);
}

// -------------------- attention and all that it is made from in one call, since the way from the interpreter to an
// operator and back takes long where tokens are few

QuadraticArguments quadratic_arguments(SB_QUADRATIC(SB_PARAMETER, SB_COMMA)) {
  constexpr int64_t low_rank = int64_t(LowRank::kQuadratic);
  const Tensor query, key, value;
  const MaybeTensor query_map, key_map, cluster_index, representatives, log_mass, query_mean;
  return {SB_PROJECTIONS(SB_VALUE, SB_COMMA), {SB_BUDGET(SB_VALUE, SB_COMMA)}, {SB_ATTENTION(SB_VALUE, SB_COMMA)}};
}

CentroidArguments centroid_arguments(SB_CENTROID(SB_PARAMETER, SB_COMMA)) {
  constexpr int64_t low_rank = int64_t(LowRank::kCentroid);
  const Tensor query, key, value;
  const MaybeTensor query_map, key_map, cluster_index, representatives, log_mass, query_mean;
  return {clusters, {SB_BUDGET(SB_VALUE, SB_COMMA)}, {SB_ATTENTION(SB_VALUE, SB_COMMA)}};
}

#define SB_LOCAL(type, name, ...) [[maybe_unused]] const type& name = a.name
#define SB_OF_BUDGET(type, name, ...) [[maybe_unused]] const type& name = budget.name
#define SB_NAME(type, name, ...) name

// Routes the lists of `a`, whose low-rank inputs are complete, where keys > 0.
void route_lists(const Budget& budget, AttentionArguments& a) {
  if (budget.keys == 0) return;
  SB_ATTENTION(SB_LOCAL, SB_SEMICOLON);
  SB_BUDGET(SB_OF_BUDGET, SB_SEMICOLON);
  const RouteArguments r{SB_ROUTE(SB_NAME, SB_COMMA)};
  check_route(r);
  std::tie(a.index, a.count) = launchers(query).route(r);
}

// The arguments of attention: with maps from the projections, and with routed lists. `fitted` are projections in place
// of the given ones, or none.
AttentionArguments complete(const QuadraticArguments& given, const Tensors& fitted, const Tensor& query,
                            const Tensor& key, const Tensor& value) {
  SB_CHECK(fitted.empty() || fitted.size() == 4,
           "attention: expected a projection of query_weight, query_bias, key_weight and key_bias, or none, got ",
           fitted.size(), " tensors");
  AttentionArguments a = given.attention;
  a.query = query, a.key = key, a.value = value;
  const auto map_of = [&](const Tensor& tokens, const Tensor& weight, const Tensor& bias) {
    return a.packed_rank > 0 ? project_packed(tokens, weight, bias) : project(tokens, weight, bias);
  };
  const auto weight = [&](size_t i, const Tensor& stored) -> const Tensor& {
    return fitted.empty() ? stored : fitted[i];
  };
  a.query_map = map_of(query, weight(0, given.query_weight), weight(1, given.query_bias));
  a.key_map = map_of(key, weight(2, given.key_weight), weight(3, given.key_bias));
  route_lists(given.budget, a);
  check_attention(a);
  return a;
}

// The same with the keys' clusters.
AttentionArguments complete(const CentroidArguments& given, const Tensors& fitted, const Tensor& query,
                            const Tensor& key, const Tensor& value) {
  SB_CHECK(fitted.empty(), "attention: the centroid kernel has no projection, got ", fitted.size(), " tensors of one");
  AttentionArguments a = given.attention;
  a.query = query, a.key = key, a.value = value;
  const auto cluster_arguments = [&] {
    SB_ATTENTION(SB_LOCAL, SB_SEMICOLON);
    const int64_t clusters = given.clusters;
    return ClusterArguments{SB_CLUSTER(SB_NAME, SB_COMMA)};
  };
  const ClusterArguments c = cluster_arguments();
  check_cluster(c);
  std::tie(a.cluster_index, a.representatives, a.log_mass, a.query_mean) = launchers(query).cluster(c);
  route_lists(given.budget, a);
  check_attention(a);
  return a;
}

#undef SB_LOCAL
#undef SB_OF_BUDGET
#undef SB_NAME

// What the low-rank kernel made of the tokens.
Tensors made_by(const QuadraticArguments&, const AttentionArguments& a) { return {*a.query_map, *a.key_map}; }
Tensors made_by(const CentroidArguments&, const AttentionArguments& a) {
  return {*a.cluster_index, *a.representatives, *a.log_mass, *a.query_mean};
}
// The inverse. Behind the maps stand the weights that made them, where those are not the given ones.
void take_made(const QuadraticArguments& given, const Tensors& made, AttentionArguments& a) {
  SB_CHECK(made.size() == 2 || made.size() == 4,
           "attention: expected two maps, or two maps and the weights that made them, got ", made.size(), " tensors");
  a.query_map = made[0], a.key_map = made[1];
  a.query_weight = made.size() == 4 ? made[2] : given.query_weight;
  a.key_weight = made.size() == 4 ? made[3] : given.key_weight;
}
void take_made(const CentroidArguments&, const Tensors& made, AttentionArguments& a) {
  SB_CHECK(made.size() == 4, "attention: expected the four tensors of clusters, got ", made.size());
  a.cluster_index = made[0], a.representatives = made[1], a.log_mass = made[2], a.query_mean = made[3];
}

template <class Given>
std::tuple<Tensor, Tensor> run_complete(const Given& given, const Tensors& fitted, const Tensor& query,
                                        const Tensor& key, const Tensor& value) {
  auto [out, lse, state, scores] = launchers(query).attention(complete(given, fitted, query, key, value));
  return {out, lse};
}

Tensor empty_result(const Tensor& tokens) { return launchers(tokens).empty(tokens, {0}, ScalarType::Int); }

// out, lse, state, scores, what the low-rank kernel made of the tokens, index and count. The last two are empty where
// nothing was routed.
using TrainedResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors, Tensor, Tensor>;

template <class Given>
TrainedResults train_complete(const Given& given, const Tensors& fitted, const Tensor& query, const Tensor& key,
                              const Tensor& value) {
  AttentionArguments a = complete(given, fitted, query, key, value);
  a.is_trained = true;
  auto [out, lse, state, scores] = launchers(query).attention(a);
  const auto routed = [&](const MaybeTensor& list) { return given.budget.keys > 0 ? *list : empty_result(query); };
  return {out, lse, state, scores, made_by(given, a), routed(a.index), routed(a.count)};
}

std::tuple<Tensor, Tensor> quadratic_attention(SB_TOKENS(SB_PARAMETER, SB_COMMA),
                                               SB_QUADRATIC(SB_PARAMETER, SB_COMMA)) {
  return run_complete(quadratic_arguments(SB_QUADRATIC(SB_VALUE, SB_COMMA)), {}, query, key, value);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quadratic_attention_with_state(
    SB_TOKENS(SB_PARAMETER, SB_COMMA), SB_QUADRATIC(SB_PARAMETER, SB_COMMA)) {
  auto [out, lse, state, scores, maps, routed, counts] =
      train_complete(quadratic_arguments(SB_QUADRATIC(SB_VALUE, SB_COMMA)), {}, query, key, value);
  return {out, lse, state, scores, maps[0], maps[1], routed, counts};
}

// -------------------- prepared calls: the same with stored arguments. `fitted`: projections that were fitted to these
// tokens, in place of stored ones

int64_t prepare(SB_QUADRATIC(SB_PARAMETER, SB_COMMA), Tensors sources, Tensors copies) {
  return keep_prepared({quadratic_arguments(SB_QUADRATIC(SB_VALUE, SB_COMMA)), std::move(sources), std::move(copies)});
}

int64_t prepare_centroid(SB_CENTROID(SB_PARAMETER, SB_COMMA)) {
  return keep_prepared({centroid_arguments(SB_CENTROID(SB_VALUE, SB_COMMA)), {}, {}});
}

// Whether the tensors that the projections were made from have changed since. The results of a stale call are empty.
bool is_stale(const PreparedCall& call, const Tensor& query) {
  return !launchers(query).equal_bytes(call.sources, call.copies);
}

Tensor prepared_attention(SB_TOKENS(SB_PARAMETER, SB_COMMA), int64_t call, Tensors fitted) {
  const std::shared_ptr<const PreparedCall> prepared = prepared_call(call);
  if (is_stale(*prepared, query)) return empty_result(query);
  return std::visit([&](const auto& given) { return std::get<0>(run_complete(given, fitted, query, key, value)); },
                    prepared->arguments);
}

TrainedResults prepared_attention_with_state(SB_TOKENS(SB_PARAMETER, SB_COMMA), int64_t call, Tensors fitted) {
  const std::shared_ptr<const PreparedCall> prepared = prepared_call(call);
  const auto empty = [&] { return empty_result(query); };
  if (is_stale(*prepared, query)) return {empty(), empty(), empty(), empty(), {}, empty(), empty()};
  return std::visit([&](const auto& given) { return train_complete(given, fitted, query, key, value); },
                    prepared->arguments);
}

// The gradients go through what the low-rank kernel made of query and key.
std::tuple<Tensor, Tensor, Tensor> prepared_attention_backward(Tensor d_out, Tensor out, Tensor lse, Tensor state,
                                                               Tensor scores, SB_TOKENS(SB_PARAMETER, SB_COMMA),
                                                               Tensors made, int64_t call, MaybeTensor index,
                                                               MaybeTensor count) {
  const std::shared_ptr<const PreparedCall> prepared = prepared_call(call);
  return std::visit(
      [&](const auto& given) -> std::tuple<Tensor, Tensor, Tensor> {
        AttentionArguments a = given.attention;
        a.query = query, a.key = key, a.value = value;
        take_made(given, made, a);
        if (given.budget.keys > 0) a.index = index, a.count = count;
        a.state = state, a.scores = scores;
        check_attention_backward(a, d_out, std::nullopt, out, lse);
        auto [dq, dk, dv, d_query_map, d_key_map] =
            launchers(query).attention_backward(a, out, lse, d_out, std::nullopt);
        return {dq, dk, dv};
      },
      prepared->arguments);
}

// -------------------- facts and tools

std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::string> saved_sizes(Device device,
                                                                                SB_SHAPE(SB_PARAMETER, SB_COMMA)) {
  const AttentionShape shape{SB_SHAPE(SB_VALUE, SB_COMMA)};
  check_shape(shape);
  const SavedSizes sizes = launchers(device.type()).saved_sizes(shape);
  return {sizes.state, sizes.scores, sizes.dtype == ScalarType::Double ? "float64" : "float32"};
}

int64_t narrow_head() { return kNarrowHead; }

// For tests that put other launchers into a table.
int64_t launchers_bytes() { return sizeof(Launchers); }
int64_t launchers_address(Device device) { return reinterpret_cast<int64_t>(&launchers(device.type())); }

}  // namespace

// -------------------- registration

#define SB_IMPLEMENT(name) library.impl(#name, TORCH_BOX(&name))

void implement_operators(torch::stable::detail::StableLibrary& library) {
  SB_IMPLEMENT(route), SB_IMPLEMENT(cluster), SB_IMPLEMENT(project), SB_IMPLEMENT(project_packed),
      SB_IMPLEMENT(project_backward);
  SB_IMPLEMENT(attention), SB_IMPLEMENT(attention_with_state), SB_IMPLEMENT(attention_backward);
  SB_IMPLEMENT(quadratic_attention), SB_IMPLEMENT(quadratic_attention_with_state);
  SB_IMPLEMENT(prepare), SB_IMPLEMENT(prepared_attention), SB_IMPLEMENT(prepared_attention_with_state);
  SB_IMPLEMENT(prepared_attention_backward), SB_IMPLEMENT(equal_bytes);
}

STABLE_TORCH_LIBRARY_IMPL(scatterbrain, CompositeExplicitAutograd, library) {
  library.impl("stages", TORCH_BOX(&record_stages));
  SB_IMPLEMENT(prepare_centroid), SB_IMPLEMENT(discard_prepared), SB_IMPLEMENT(saved_sizes), SB_IMPLEMENT(narrow_head),
      SB_IMPLEMENT(packed_width);
  SB_IMPLEMENT(list_capacity), SB_IMPLEMENT(launchers_address), SB_IMPLEMENT(launchers_bytes);
}

#define SB_ATTENTION_SCHEMA SB_ATTENTION(SB_SCHEMA, SB_SCHEMA_COMMA)
#define SB_QUADRATIC_SCHEMA SB_QUADRATIC(SB_SCHEMA_REQUIRED, SB_SCHEMA_COMMA)
#define SB_CENTROID_SCHEMA SB_CENTROID(SB_SCHEMA_REQUIRED, SB_SCHEMA_COMMA)
#define SB_TOKENS_SCHEMA SB_TOKENS(SB_SCHEMA, SB_SCHEMA_COMMA)

STABLE_TORCH_LIBRARY(scatterbrain, library) {
  library.def("route(" SB_ROUTE(SB_SCHEMA, SB_SCHEMA_COMMA) ") -> (Tensor index, Tensor count)");
  library.def("cluster(" SB_CLUSTER(
      SB_SCHEMA, SB_SCHEMA_COMMA) ") -> (Tensor index, Tensor representatives, Tensor log_mass, Tensor query_mean)");
  library.def("project(Tensor tokens, Tensor weight, Tensor? bias) -> Tensor");
  library.def("project_packed(Tensor tokens, Tensor weight, Tensor bias) -> Tensor");
  library.def("project_backward(Tensor grad, Tensor tokens, Tensor weight) -> (Tensor, Tensor, Tensor)");
  library.def("attention(" SB_ATTENTION_SCHEMA ") -> (Tensor out, Tensor lse)");
  library.def("attention_with_state(" SB_ATTENTION_SCHEMA ") -> (Tensor out, Tensor lse, Tensor state, Tensor scores)");
  library.def("attention_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, " SB_ATTENTION_SCHEMA
              ", " SB_SAVED(SB_SCHEMA, SB_SCHEMA_COMMA) ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("quadratic_attention(" SB_TOKENS_SCHEMA ", " SB_QUADRATIC_SCHEMA ") -> (Tensor out, Tensor lse)");
  library.def("quadratic_attention_with_state(" SB_TOKENS_SCHEMA ", " SB_QUADRATIC_SCHEMA
              ") -> (Tensor out, Tensor lse, Tensor state, Tensor scores, Tensor query_map, Tensor key_map, "
              "Tensor index, Tensor count)");
  library.def("prepare(" SB_QUADRATIC_SCHEMA ", Tensor[] sources, Tensor[] copies) -> int");
  library.def("prepare_centroid(" SB_CENTROID_SCHEMA ") -> int");
  library.def("discard_prepared(int call) -> ()");
  library.def("prepared_attention(" SB_TOKENS_SCHEMA ", int call, Tensor[] fitted) -> Tensor");
  library.def("prepared_attention_with_state(" SB_TOKENS_SCHEMA
              ", int call, Tensor[] fitted) -> (Tensor out, Tensor lse, Tensor state, Tensor scores, Tensor[] made, "
              "Tensor index, Tensor count)");
  library.def(
      "prepared_attention_backward(Tensor d_out, Tensor out, Tensor lse, Tensor state, Tensor scores, " SB_TOKENS_SCHEMA
      ", Tensor[] made, int call, Tensor? index=None, Tensor? count=None) -> (Tensor, Tensor, Tensor)");
  library.def("equal_bytes(Tensor[] a, Tensor[] b) -> bool");
  library.def(
      "saved_sizes(Device device, " SB_SHAPE(SB_SCHEMA, SB_SCHEMA_COMMA) ") -> (int[] state, int[] scores, str dtype)");
  library.def("narrow_head() -> int");
  library.def("packed_width(int rank) -> int");
  library.def("list_capacity(int keys, int block_k) -> int");
  library.def("stages(bool on) -> str");
  library.def("launchers_address(Device device) -> int");
  library.def("launchers_bytes() -> int");
}

}  // namespace sb

#include "kv_state_products.cuh"
#include "project_products.cuh"

#include <limits>

#include "launch.h"

namespace sb::cuda {
namespace {

// Starts what `kernel` names for the products of a width, with as many blocks as make `rows` rows of sums.
template <int kWidest = 128, class Params, class Kernel>
void launch_products(Stream stream, const char* name, const Params& p, Element element, int64_t rows,
                     const SummedFeatures& sums, const Kernel& kernel) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      const auto start = [&](auto* products) {
        using Products = std::remove_pointer_t<decltype(products)>;
        launch(stream, name, rows * ProductTask<Products::kColumns>::blocks(sums), kProductThreads,
               Products::bytes(sums), kernel(e, products), p);
      };
      if (sums.width <= 64 || kWidest == 64) return start(static_cast<FeatureProducts<E, 64>*>(nullptr));
      if constexpr (kWidest > 64) start(static_cast<FeatureProducts<E, kWidest>*>(nullptr));
    }
  });
}
// The instance of a kernel's template for a call's element and width.
#define SB_PRODUCTS(kernel)                                                \
  [](auto* e, auto* products) {                                            \
    using E = std::remove_pointer_t<decltype(e)>;                          \
    return kernel<E, std::remove_pointer_t<decltype(products)>::kColumns>; \
  }

// q.b of every query and cluster, as maps of queries by representatives.
ProjectParams scores_of_clusters(const BackwardParams& of) {
  ProjectParams p{};
  p.batch = p.weight_batch = of.batch, p.heads = of.q_heads, p.weight_heads = of.kv_heads, p.tokens = of.q_tokens;
  p.head_dim = of.head_dim, p.outputs = p.width = of.rank, p.last = of.rank - 1, p.last_factor = 1;
  p.x = of.q, p.weight = of.given_representatives, p.z = of.cluster_scores;
  p.coordinate_limit = p.log_limit = std::numeric_limits<double>::infinity();
  return p;
}

}  // namespace

void launch_feature_products(const ForwardParams& p, Element element, Stream stream) {
  launch_products(stream, "feature_products", p, element, p.batch * p.kv_heads * (p.state_slots - 1),
                  SummedFeatures::of_state(p), SB_PRODUCTS(feature_products));
}

void launch_query_products(const BackwardParams& p, Element element, Stream stream) {
  const int64_t rows = p.batch * p.q_heads * p.query_segments;
  if (!p.has_clusters())
    return launch_products(stream, "query_products", p, element, rows, SummedFeatures::of_state(p),
                           SB_PRODUCTS(query_products));
  launch_project(scores_of_clusters(p), element, stream);
  launch_products(stream, "cluster_query_products", p, element, rows,
                  SummedFeatures::of_given(p.rank, p.value_pad, p.value_pad + 1), SB_PRODUCTS(cluster_query_products));
}

void launch_representative_products(const BackwardParams& p, Element element, Stream stream) {
  launch_products<64>(stream, "representative_products", p, element,
                      p.batch * p.q_heads * ceil_div(p.q_tokens, kSegment),
                      SummedFeatures::of_given(p.rank, p.head_dim, p.head_dim), SB_PRODUCTS(representative_products));
}

void launch_project_parts(const ProjectParams& p, Element element, Stream stream) {
  launch_products<64>(stream, "project_parts_products", p, element, p.batch * p.heads * p.parts,
                      SummedFeatures::of_given(p.outputs, p.head_dim, p.head_dim + 1),
                      SB_PRODUCTS(project_parts_products));
}

}  // namespace sb::cuda

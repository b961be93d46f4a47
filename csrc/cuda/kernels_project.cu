#include "project_products.cuh"

#include "launch.h"

namespace sb::cuda {
namespace {

constexpr int kThreads = 128;

}  // namespace

void launch_project(const ProjectParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      if (p.has_products())
        return launch(stream, "project_products", p.batch * p.heads * ceil_div(p.tokens, kProjectTokens),
                      kProjectWarps * kWarp, 0, project_products<E>, p);
    }
    const int64_t elements = p.batch * p.heads * p.tokens * p.width;
    launch(stream, "project", blocks_for(elements, kThreads), kThreads, 0, project<E>, p);
  });
}

void launch_project_backward(const ProjectParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    const int64_t tokens = p.batch * p.heads * p.tokens * p.head_dim, size = p.outputs * (p.head_dim + 1),
                  parts = p.batch * p.heads * p.parts * size, weights = p.weight_batch * p.weight_heads * size;
    launch(stream, "project_backward_tokens", blocks_for(tokens, kThreads), kThreads, 0, project_backward_tokens<E>, p);
    if (sizeof(E) == 2 && p.has_products())
      launch_project_parts(p, element, stream);
    else
      launch(stream, "project_backward_parts", blocks_for(parts, kThreads), kThreads, 0, project_backward_parts<E>, p);
    launch(stream, "project_backward_weight", blocks_for(weights, kThreads), kThreads, 0,
           project_backward_weight<AccType<E>>, p);
  });
}

}  // namespace sb::cuda

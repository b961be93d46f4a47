#include "attention_tile_operands.cuh"
#include "launch.h"

namespace sb::cuda {
namespace {

constexpr int kThreads = 128;

}  // namespace

void launch_tile_operands(const TileParams& p, Element element, Stream stream) {
  if (!p.has_low_rank()) return;
  const int64_t heads = p.batch * p.kv_heads, lanes = heads * p.features_padded * kWarp;
  const auto launch_keys = [&](void (*kernel)(TileParams), const char* name = "tile_keys") {
    launch(stream, name, blocks_for(heads * p.k_tokens, kThreads), kThreads, 0, kernel, p);
  };
  if (element == Element::kFloat)  // states and representatives are read as they are
    return p.has_clusters() ? launch_keys(tile_keys<LowRank::kCentroid>) : launch_keys(tile_key_rows, "tile_key_rows");
  if (p.state_operand)
    launch(stream, "tile_state", blocks_for(p.operand_slots() * lanes / 16 * p.value_chunks, kThreads), kThreads, 0,
           tile_state, p);
  if (!p.has_clusters()) return launch_keys(tile_keys<LowRank::kQuadratic>);
  launch_keys(tile_keys<LowRank::kCentroid>);
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2)
      launch(stream, "tile_clusters", blocks_for(lanes / 8 * p.head_steps, kThreads), kThreads, 0, tile_clusters<E>, p);
  });
}

}  // namespace sb::cuda

#include "launch.h"
#include "route_per_query.cuh"
#include "route_per_query_tile.cuh"
#include "route_pooled.cuh"
#include "route_pooled_tile.cuh"
#include "route_sketch.cuh"

namespace sb::cuda {
namespace {

template <class E>
void launch_tiles(const RoutingParams& p, Stream stream) {
  const int64_t heads = p.batch * p.kv_heads,
                rows = p.fine_runs + (p.run_parts[1] ? p.coarse_runs : 0) + (p.has_clusters() ? p.rank : 0);
  if (p.block_k == 1)
    launch(stream, "route_key_numbers", ceil_div(heads * p.fine_runs, kRouteWarps), kRouteThreads, 0,
           route_key_numbers<E>, p);
  launch(stream, "route_parts", ceil_div(heads * rows, kRouteWarps), kRouteThreads, 0, route_parts, p);
  if (p.block_k > 1)
    launch(stream, "route_per_query_tile", p.scratch_blocks, kRouteThreads, QueryTileMemory::bytes(p),
           route_per_query_tile<E>, p);
  else
    launch(stream, "route_pooled_tile", p.scratch_blocks, kRouteThreads, PooledTileMemory<E>::bytes(p),
           p.tile_rows <= kMostRouteRows / 2 ? route_pooled_tile<E, int(kMostRouteRows / 2)>
                                             : route_pooled_tile<E, int(kMostRouteRows)>,
           p);
}

template <class E>
void launch_by_sketch(const RoutingParams& p, Stream stream) {
  launch(stream, "route_sketches", ceil_div(p.batch * p.kv_heads * p.k_tokens, kRouteWarps), kRouteThreads,
         kRouteWarps * sketch_width(p.head_dim) * int64_t(sizeof(float)), route_sketches<E>, p);
  launch(stream, "route_by_sketch", p.scratch_blocks, kRouteThreads, SketchMemory::bytes(p), route_by_sketch<E>, p);
}

}  // namespace

void launch_route(const RoutingParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if (p.has_sketches()) return launch_by_sketch<E>(p, stream);
    const int64_t heads = p.batch * p.kv_heads;
    if (p.has_clusters()) {
      launch(stream, "route_segment_tops", heads * ceil_div(p.k_tokens, kTopSegment), kRouteThreads,
             kTopSegment * int64_t(sizeof(float) + sizeof(int32_t)), route_segment_tops, p);
      launch(stream, "route_cluster_tops", blocks_for(heads * p.rank, kRouteThreads), kRouteThreads, 0,
             route_cluster_tops, p);
    }
    launch(stream, "route_fine_runs", ceil_div(heads * p.fine_runs, kRouteWarps), kRouteThreads, 0, route_fine_runs<E>,
           p);
    launch(stream, "route_coarse_runs", ceil_div(heads * p.coarse_runs, kRouteWarps), kRouteThreads, 0,
           route_coarse_runs, p);
    if constexpr (sizeof(E) == 2)
      if (p.tile_rows > 0) return launch_tiles<E>(p, stream);
    if (p.block_k == 1)
      launch(stream, "route_pooled", p.scratch_blocks, kRouteThreads, PooledMemory::bytes(p), route_pooled<E>, p);
    else
      launch(stream, "route_per_query", p.scratch_blocks, kRouteThreads, PerQueryMemory::bytes(p), route_per_query<E>,
             p);
  });
}

int64_t route_scratch_words(const RoutingParams& p) {
  if (p.block_k == 1) return PooledScratch::words(p);
  return p.tile_rows > 0 ? QueryTileScratch::words(p.units) : PerQueryScratch::words(p.units);
}

bool route_tile_fits(const RoutingParams& p, Element element) {
  bool fits = false;
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) fits = PooledTileMemory<E>::bytes(p) <= kMostShared;
  });
  return fits;
}

}  // namespace sb::cuda

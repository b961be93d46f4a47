// Routing: the keys that a query, or a block of queries, reads exactly (docs/algorithm.md, section 3).
#pragma once
#include "route_per_query.h"
#include "route_pooled.h"

namespace sb::SB_ISA {

// Writes the lists of query group `group` of head (b, h), which must be cleared before. Returns the bytes of scratch it
// needs; without scratch it does nothing else.
inline int64_t route_group(const RouteParams& p, int64_t b, int64_t h, int64_t group, const float* panels,
                           void* scratch) {
  if (p.block_k == 1) {
    PooledScratch w(p, scratch);
    if (scratch) route_pooled(p, b, h, group, panels, w);
    return w.bytes;
  }
  PerQueryScratch w(p, scratch);
  if (scratch) route_per_query(p, b, h, group, panels, w);
  return w.bytes;
}

}  // namespace sb::SB_ISA

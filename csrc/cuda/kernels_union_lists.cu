#include "launch.h"
#include "union_lists.cuh"

namespace sb::cuda {

void launch_union_lists(const UnionListsParams& p, Stream stream) {
  launch(stream, "union_lists", ceil_div(p.batch * p.list_heads * p.tiles, kUnionThreads / kWarp), kUnionThreads, 0,
         union_lists, p);
}

}  // namespace sb::cuda

#include "transposed_lists.cuh"

#include "launch.h"

namespace sb::cuda {

void launch_transposed_lists(const BackwardParams& p, Stream stream) {
  for (const bool is_of_span : {true, false}) {
    const TransposeParams of{p, is_of_span};
    const TransposedLists& to = of.result();
    if (to.entries == 0) continue;
    const int64_t rows = p.batch * to.heads, parts = ceil_div(rows * to.parts, kTransposeThreads / kWarp);
    launch(stream, "transpose_count", parts, kTransposeThreads, 0, transpose_count, of);
    launch(stream, "transpose_scan", rows, kScanThreads, kScanThreads * int64_t(sizeof(int32_t)), transpose_scan, of);
    launch(stream, "transpose_place", parts, kTransposeThreads, 0, transpose_place, of);
  }
}

void launch_collect_by_key(const BackwardParams& p, Stream stream) {
  launch(stream, "collect_by_key", p.batch * p.q_heads, kTransposeThreads, kTransposeThreads * int64_t(sizeof(int32_t)),
         collect_by_key, p);
}

}  // namespace sb::cuda

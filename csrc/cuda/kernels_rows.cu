#include "rows.cuh"

#include "launch.h"

namespace sb::cuda {

void launch_rows(const RowsParams& p, Stream stream) {
  launch(stream, "rows", p.batch, kRowsThreads, kRowsThreads * int64_t(sizeof(int32_t)), rows_kernel, p);
}

}  // namespace sb::cuda

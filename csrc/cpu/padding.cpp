#include "padding.h"

namespace sb::cpu {

std::vector<RowRange> row_ranges(int64_t batch, int64_t q_tokens, int64_t k_tokens, const MaybeTensor& query_range,
                                 const MaybeTensor& key_range, const MaybeTensor& query_offset) {
  std::vector<RowRange> rows(static_cast<size_t>(batch), RowRange{0, int32_t(q_tokens), 0, int32_t(k_tokens), 0});
  for (int64_t b = 0; b < batch; ++b) {
    RowRange& row = rows[size_t(b)];
    const auto element = [&](const Tensor& t, int64_t column) {
      return static_cast<const int32_t*>(t.data_ptr())[b * t.stride(0) + (t.dim() > 1 ? column * t.stride(1) : 0)];
    };
    if (query_range) row.q_first = element(*query_range, 0), row.q_end = element(*query_range, 1);
    if (key_range) row.k_first = element(*key_range, 0), row.k_end = element(*key_range, 1);
    if (query_offset) row.offset = element(*query_offset, 0);
  }
  return rows;
}

}  // namespace sb::cpu

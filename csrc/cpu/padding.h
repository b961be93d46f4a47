// Per-row padding masks, valid ranges and causal offset, as kernels read them.
#pragma once
#include "allocation.h"

namespace sb::cpu {

// A mask (B, N) as contiguous bytes; null without a mask.
struct MaskBytes {
  MaskBytes() = default;
  explicit MaskBytes(const MaybeTensor& mask) {
    if (mask) storage = as_contiguous(*mask), data = static_cast<const uint8_t*>(storage->data_ptr());
  }
  MaybeTensor storage;
  const uint8_t* data = nullptr;
};

// The ranges of every batch row, from optional (B, 2) ranges and (B) offsets.
inline std::vector<RowRange> row_ranges(int64_t batch, int64_t q_tokens, int64_t k_tokens,
                                        const MaybeTensor& query_range, const MaybeTensor& key_range,
                                        const MaybeTensor& query_offset) {
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

// Holds what the parameters of a kernel point at.
struct Padding {
  template <class Arguments, class Params>
  Padding(const Arguments& a, Params& p)
      : rows(row_ranges(p.batch, p.q_tokens, p.k_tokens, a.query_range, a.key_range, a.query_offset)),
        query_mask(a.query_mask),
        key_mask(a.key_mask) {
    p.rows = rows.data(), p.q_mask = query_mask.data, p.k_mask = key_mask.data;
  }
  std::vector<RowRange> rows;
  MaskBytes query_mask, key_mask;
};

}  // namespace sb::cpu

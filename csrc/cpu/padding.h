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
std::vector<RowRange> row_ranges(int64_t batch, int64_t q_tokens, int64_t k_tokens, const MaybeTensor& query_range,
                                 const MaybeTensor& key_range, const MaybeTensor& query_offset);

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

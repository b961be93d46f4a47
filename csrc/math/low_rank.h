// Kinds of low-rank kernels; low_rank_kernels.h has their algebra.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "padding.h"

namespace sb {

enum class LowRank : int64_t { kNone = 0, kQuadratic = 1, kFeatures = 2 };

// Width of a packed row of the quadratic kernel: r coordinates, 1, the log scale in base 2, zeros.
SB_HD constexpr int64_t packed_width(int64_t rank) { return pad_to(rank + 2, kPad); }

}  // namespace sb

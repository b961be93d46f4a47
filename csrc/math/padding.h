// Padding arithmetic.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace sb {

inline constexpr int64_t kPad = 16;  // every row operand is padded with zeros to a multiple of this many elements

SB_HD constexpr int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
SB_HD constexpr int64_t pad_to(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Width of a packed row of the quadratic kernel: r coordinates, 1, the log scale in base 2, zeros.
SB_HD constexpr int64_t packed_width(int64_t rank) { return pad_to(rank + 2, kPad); }

}  // namespace sb

// Padding arithmetic.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace sb {

inline constexpr int64_t kPad = 16;  // every row operand is padded with zeros to a multiple of this many elements

SB_HD constexpr int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
SB_HD constexpr int64_t pad_to(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

}  // namespace sb

// Sizes that define clustering (docs/algorithm.md, section 2); the reference implementation uses the same.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace sb {

inline constexpr int kSamples = 256;    // keys that directions and centres are taken from, and the most clusters
inline constexpr int kDirections = 16;  // dimensions in which keys are near or far
// A column with no more than this share of its length off those before it adds no direction.
inline constexpr double kVanishing = 1e-5;

// Position t of `count` positions spread evenly from the first to the last of `length`: t (length - 1) / (count - 1),
// to the nearest integer, halves to the even one.
SB_HD constexpr int64_t spread_position(int64_t t, int64_t count, int64_t length) {
  const int64_t divisor = count > 1 ? count - 1 : 1, product = t * (length - 1);
  const int64_t below = product / divisor, twice = 2 * (product % divisor);
  return below + (twice > divisor || (twice == divisor && below % 2 == 1));
}

}  // namespace sb

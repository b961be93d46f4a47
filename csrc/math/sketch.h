// Sketches of tokens: the signs of kSketchBits random projections (SimHash, Charikar 2002). A projection is a row of
// (H D)^3, where H are Walsh-Hadamard matrices and D random signs (Ailon & Chazelle 2006; Andoni et al. 2015). It takes
// additions alone, in one order, so a float32 token has the same sketch on every machine. A query compares the bits
// alone whose projections are not small: a small one has the sign of a key's own by chance.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace sb {

inline constexpr int kSketchBits = 64, kSketchRounds = 3;
inline constexpr float kSmallShare = 4;  // a projection counts that is more than the largest one divided by this
// The agreement of a key that is no number, or not finite, with any query: no approximation may leave it out.
inline constexpr int kMostAgreement = kSketchBits + 1;

// Columns that a token is filled up to with zeros.
SB_HD int64_t sketch_width(int64_t head_dim) {
  int64_t width = kSketchBits;
  while (width < head_dim) width *= 2;
  return width;
}

// Whether the random sign of a column is negative: a bit of the numbers that SplitMix64 counts through (Steele et al.
// 2014).
SB_HD bool is_sign_negative(int round, int64_t column) {
  uint64_t z = (uint64_t(round) << 32) + uint64_t(column) + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return ((z ^ (z >> 31)) >> 63) != 0;
}

}  // namespace sb

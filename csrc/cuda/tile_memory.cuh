// Shared memory of a tile of 16 query slots: matrices of 16-bit numbers, and the stages of 16 listed keys that pass
// through it.
#pragma once
#include "key_list.cuh"
#include "low_rank.cuh"
#include "matrix.h"

namespace sb::cuda {

inline constexpr int kTile = 16;   // query slots of a tile
inline constexpr int kStage = 16;  // keys of a stage

// Byte of the chunk of 16 bytes `chunk` in row `row` of a matrix in shared memory. Eight rows of one chunk lie in eight
// different groups of banks.
template <int kRowBytes>
SB_HD int swizzled(int row, int chunk) {
  static_assert(kRowBytes % 128 == 0 || kRowBytes == 64);
  if (kRowBytes == 64) return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

}  // namespace sb::cuda

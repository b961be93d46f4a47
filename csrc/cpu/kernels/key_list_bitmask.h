// Key lists as bitmasks: in rows of few keys, queries with lists of their own evaluate all keys of the row together.
#pragma once
#include "features.h"
#include "scores.h"

namespace sb::SB_ISA {

// Bit q of of_key[i]: whether query q of the tile lists key i.
template <bool kBitmask>
struct Bitmasks {
  uint32_t of_key[kBitmaskKeys];
};
template <>
struct Bitmasks<false> {};

// Fills the tile's list with every valid key of the row, and `bitmask` with the queries that list each.
template <class E, int kLanes>
SB_INLINE void collect_bitmask(const AttentionParams& p, QueryTile<E, kLanes>& tile, uint32_t* bitmask) {
  const RowRange& range = p.rows[tile.b];
  KeyList& list = tile.list;
  uint32_t of_key[kBitmaskKeys] = {};
  for (int lane = 0; lane < tile.lanes; ++lane) {
    if (tile.query[lane] < 0) continue;
    collect_keys(p, tile.b, tile.h, tile.first_slot + lane, tile.first_slot + lane, list);
    for (int64_t i = 0; i < list.n_listed; ++i) of_key[list.key[i] - range.k_first] |= uint32_t(1) << lane;
  }
  const uint8_t* mask = p.k_mask ? p.k_mask + tile.b * p.k_tokens + range.k_first : nullptr;
  int64_t n = 0;
  for (int64_t j = 0; j < range.k_end - range.k_first; ++j)
    if (!(mask && mask[j])) bitmask[n] = of_key[j], list.key[n++] = int32_t(range.k_first + j);
  list.n_chunk = 0, list.n_listed = list.n = n, list.uses_kv_state = false, list.bitmask = bitmask;
}

// One key of such a list: the lanes that list it, and each lane's exponent in base 2, s or rho + kappa, where
// `exponents` [key][lane] stand in place of rho if they are given. `is_whole`: lanes whose weight is 2^exponent,
// without a factor K.
template <class E, int kLanes, int N>
struct BitmaskKey {
  typedef AccType<E> T;
  Ints<T, N> listed, is_whole;
  Vector<T, N> exponent;
  SB_INLINE BitmaskKey(const QueryTile<E, kLanes>& tile, const LogScales<T>& kappa, const T* S, int64_t stride,
                       const T* exponents, int64_t i, int v) {
    typedef Ints<T, N> I;
    I bit;
    SB_EACH (lane, N) bit[lane] = 1 << (v * N + lane);
    listed = ((I{} + int32_t(tile.list.bitmask[i])) & bit) != I{};
    is_whole = exponents ? I{} == I{} : listed;
    const auto log = load<T, N>(exponents ? exponents + i * kLanes + v * N : tile.rho + v * N);
    exponent = listed ? load<T, N>(S + i * stride + v * N) : log + kappa(tile.list.key[i]);
  }
};

}  // namespace sb::SB_ISA

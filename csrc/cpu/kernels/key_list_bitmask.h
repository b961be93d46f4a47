// Lists as masks: where a row has few keys, queries that have lists of their own evaluate all of them together.

// Which queries of a group list each key: all keys of the row, of which there are few.
template <bool kDense>
struct DenseLists {
  uint32_t lanes[kDenseKeys];
};
template <>
struct DenseLists<false> {};

// The dense list of queries that have lists of their own: every valid key of the row.
template <class E, int kLanes>
SB_INLINE void collect_dense(const AttentionParams& p, Tile<E, kLanes>& tile, uint32_t* lanes) {
  const Group<E, kLanes>& g = tile.g;
  const RowRange& range = p.rows[g.b];
  KeyList& list = tile.list;
  uint32_t of_key[kDenseKeys] = {};
  for (int lane = 0; lane < g.lanes; ++lane) {
    if (g.query[lane] < 0) continue;
    collect_pairs(p, g.b, g.h, g.first_slot + lane, g.first_slot + lane, list);
    for (int64_t i = 0; i < list.n01; ++i) of_key[list.key[i] - range.k_first] |= uint32_t(1) << lane;
  }
  const uint8_t* mask = p.k_mask ? p.k_mask + g.b * p.k_tokens + range.k_first : nullptr;
  int64_t n = 0;
  for (int64_t j = 0; j < range.k_end - range.k_first; ++j)
    if (!(mask && mask[j])) lanes[n] = of_key[j], list.key[n++] = int32_t(range.k_first + j);
  list.n0 = 0, list.n01 = list.n = n, list.complement = false, list.lanes = lanes;
}

// By what every lane weighs one key of a dense list: which lanes list it, and the exponent in base 2, s or rho + kappa.
template <class E, int kLanes, int N>
struct DenseKey {
  typedef SumOf<E> T;
  typedef typename Vec<T, N>::type V;
  typename Vec<T, N>::ints listed;
  V exponent;
  SB_INLINE DenseKey(const Group<E, kLanes>& g, const KeyList& list, const LogScales<T>& kappa,
                     const ScoreFactor<E>& score, const T* S, int64_t i, int v) {
    typedef typename Vec<T, N>::ints I;
    I bit;
    SB_EACH (lane, N) bit[lane] = 1 << (v * N + lane);
    listed = ((I{} + list.lanes[i]) & bit) != I{};
    exponent = listed ? score(load<T, N>(S + i * kLanes + v * N)) : load<T, N>(g.rho + v * N) + kappa(list.key[i]);
  }
};

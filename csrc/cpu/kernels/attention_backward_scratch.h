// Scratch memory of the backward pass.
#pragma once
#include "dkdv_scatter_shared.h"

namespace sb::SB_ISA {

template <class E, int kLanes>
struct BackwardScratch {
  typedef AccType<E> T;
  StepOf<E>*qT, *gT;    // [d][lanes], dO as [dv][lanes], in steps
  StepOf<E>* W;         // weights [keys][lanes] in steps
  T *wide, *wide_rows;  // dO, or q, in the accumulation type, as [dv][lanes] and as [lanes][dv]
  T *P, *g, *xT;        // P and dO.v - dO.o [keys][lanes], [map][lanes]
  T *exponent, *row;    // [keys], one row of coordinates
  T* net;               // weights before they are rescaled [keys][lanes]
  T *F, *gF, *dQ, *dX;  // [features][lanes] twice, [lanes][d], [map][lanes]
  T lse[kLanes];        // in base 2
  T d_lse[kLanes];
  T delta[kLanes];         // dO.o
  T kv_state_log[kLanes];  // log2 scale of the state, or -1e30
  T weight[kLanes];        // exp of that scale - lse
  const T* centre;         // of the head's states, or null
  T alpha[kLanes];         // root(x.centre)
  T exact[kLanes];         // sum of P and of U summed key by key
  T removed[kLanes];       // sum of the listed keys' U, taken back from the state
  T slope[kLanes];         // sum of weight (dO.v - dO.o)
  T den[kLanes];           // sum of weights
  double squares[kLanes];  // of the terms of the state's part, see squared_terms
  T zero[kLanes];          // 0 unless something is not finite in a row of q, dO or x that pairs with unseen keys read
  T inverse[kLanes];       // 1 / den, or 0
  T correction[kLanes];    // what slope adds to delta, minus d_lse
  const E *d_out[kLanes], *out[kLanes];
};

template <class E, int kLanes>
SB_INLINE void allocate_backward(const AttentionParams& p, Arena& arena, BackwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  typedef StepOf<E> S;
  s.qT = arena.take<S>(p.head_pad * kLanes);
  s.xT = arena.take<T>(p.x_rows() * kLanes);
  s.gT = arena.take<S>(p.value_pad * kLanes);
  if constexpr (kPaired<E>) {
    const int64_t width = p.value_pad > p.head_pad ? p.value_pad : p.head_pad;
    s.wide = arena.take<T>(width * kLanes), s.wide_rows = arena.take<T>(width * kLanes);
    s.P = arena.take<T>(p.max_keys * kLanes), s.g = arena.take<T>(p.max_keys * kLanes);
    s.W = arena.take<S>(p.max_keys * kLanes);
  }
  s.exponent = arena.take<T>(p.max_keys);
  s.row = arena.take<T>(p.map_pad);
  s.F = arena.take<T>(p.features_pad() * kLanes), s.gF = arena.take<T>(p.features_pad() * kLanes);
  s.dQ = arena.take<T>(p.head_pad * kLanes);
  s.dX = arena.take<T>((p.rank < p.map_pad ? p.map_pad : p.rank + 1) * kLanes);
  s.net = arena.take<T>(p.max_keys * kLanes);
}
// Records of one tile: one for all lanes, or (not kShared) one each.
template <class E, int kLanes, bool kShared>
SB_INLINE ScatterRecord<E>* take_records(const AttentionParams& p, Arena& arena) {
  typedef AccType<E> T;
  constexpr int kRecords = kShared ? 1 : kLanes, kOfRecord = kShared ? kLanes : 1;
  ScatterRecord<E>*records = arena.take<ScatterRecord<E>>(kRecords), unused;
  for (int record = 0; record < kRecords; ++record) {
    ScatterRecord<E>& r = records ? records[record] : unused;
    r.key = arena.take<int32_t>(p.max_keys);
    r.w = arena.take<E>(p.max_keys * kOfRecord), r.ds = arena.take<E>(p.max_keys * kOfRecord);
    r.dt = arena.take<T>(p.max_keys * kOfRecord);
    r.q = arena.take<const E*>(kOfRecord), r.d_out = arena.take<const E*>(kOfRecord);
    r.x = arena.take<const T*>(kOfRecord);
    r.last_seen = arena.take<int32_t>(kOfRecord);
    r.by_key = arena.take<ByKeyQuery<E>>(kOfRecord);
    T* z = arena.take<T>(kOfRecord * p.map_pad);
    for (int64_t i = 0; i < kOfRecord && records; ++i) r.by_key[i].z = z + i * p.map_pad;
  }
  return records;
}

}  // namespace sb::SB_ISA

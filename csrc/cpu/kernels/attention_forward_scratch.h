// Scratch memory of the forward pass.
#pragma once
#include "arena.h"
#include "element_types.h"
#include "key_list.h"

namespace sb::SB_ISA {

template <class E, int kLanes>
struct ForwardScratch {
  typedef AccType<E> T;
  StepOf<E>*qT, *W;        // [d][lanes] and weights [keys][lanes], both in steps
  T *xT, *S, *L, *F, *O;   // [map][lanes], [keys][lanes] twice, [features][lanes], [lanes][dv]
  T* wide;                 // [d][lanes] in the accumulation type, for bfloat16
  T *decay, *by_key;       // [keys] (for each query with its own list), and rows of one query: [map], [keys]
  T c[kLanes];             // stabiliser
  T exact[kLanes];         // sum of the listed keys' weights and of L summed key by key
  T removed[kLanes];       // sum of the listed keys' L, taken back from the state
  T kv_state_log[kLanes];  // log2 scale of the state, or -1e30
  T weight[kLanes];        // exp of that scale - c
  KeyList lists[kLanes];   // of queries that do not share one
};

template <class E, int kLanes, bool kShared>
SB_INLINE void allocate_forward(const AttentionParams& p, Arena& arena, ForwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  s.qT = arena.take<StepOf<E>>(p.head_pad * kLanes);
  s.W = arena.take<StepOf<E>>(kPaired<E> ? p.max_keys * kLanes : 0);
  s.xT = arena.take<T>(p.x_rows() * kLanes);
  s.wide = arena.take<T>(kPaired<E> && p.has_clusters() ? p.head_pad * kLanes : 0);
  s.S = arena.take<T>(p.max_keys * kLanes), s.L = arena.take<T>(p.max_keys * kLanes);
  s.F = arena.take<T>(p.features_pad() * kLanes);
  s.O = arena.take<T>(p.value_pad * kLanes);
  for (int64_t i = 0; i < kLanes && !kShared; ++i) s.lists[i].key = arena.take<int32_t>(p.max_keys);
  s.decay = arena.take<T>(p.max_keys * (kShared ? 1 : kLanes));
  s.by_key = arena.take<T>(p.map_pad + p.max_keys);
}

}  // namespace sb::SB_ISA

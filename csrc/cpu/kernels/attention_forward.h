// The forward pass (docs/algorithm.md, sections 1, 5 and 7).
#pragma once
#include "attention_forward_per_query.h"
#include "attention_forward_shared.h"
#include "complement_by_key.h"

namespace sb::SB_ISA {

// One tile: listed keys, then the state's part, then the common normaliser.
template <class E, int kLanes, bool kShared>
void forward_tile(const AttentionParams& p, QueryTile<E, kLanes>& tile, ForwardScratch<E, kLanes>& s,
                  TilePrefetcher<E, kLanes, false>& prefetcher) {
  typedef AccType<E> T;
  constexpr int N = kLaneWidth<T, kLanes>;
  const bool has_low_rank = p.has_low_rank();
  const auto kappa = log_scales<T>(p.kappa, tile.b, tile.kv);
  const KVState<T> state = has_low_rank ? kv_state_slot<T>(p, tile.b * p.kv_heads + tile.kv, tile.slot) : KVState<T>{};
  const T kappa_ref = has_low_rank ? *state.kappa_ref : T(0);
  if (p.has_clusters())
    weigh_clusters<E, kLanes, false>(p, tile, s.qT, s.wide, s.xT);
  else if (kShared)
    queries_in_lanes<E, kLanes>(p, tile, s.qT);
  if constexpr (kShared) {
    if (p.has_maps()) transpose_rows<T, kLanes>(tile.x, p.rank, T(1), s.xT);
    forward_shared<E, kLanes>(p, tile, kappa, kappa_ref, s, prefetcher);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      s.c[lane] = s.kv_state_log[lane] = kLowest<T>, s.weight[lane] = s.exact[lane] = s.removed[lane] = T(0);
    forward_per_query<E, kLanes>(p, tile, kappa, kappa_ref, s);
    if (p.has_maps()) transpose_rows<T, kLanes>(tile.x, p.rank, T(1), s.xT);
  }

  // 5. The complement: F(x) H and F(x).hz in each query's own scale.
  T total[kLanes];
  double squares[kLanes] = {};
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) total[lane] = T(0), any |= !(s.kv_state_log[lane] <= T(-1e29));
  any &= !p.sums_by_key;
  if (any) {
    expand_features<T, kLanes>(p.low_rank, p.rank, s.xT, s.weight, s.F);
    const T* centre = centre_of_slot<T>(p, tile.b, tile.kv, tile.slot);
    T alpha[kLanes];
    if (centre) centre_features<T, kLanes>(p.low_rank, p.rank, s.xT, centre, alpha, s.F);
    if (p.needs_again) squared_terms<T, kLanes>(p, s.xT, centre ? alpha : nullptr, state.hz, s.weight, squares);
    for (int v = 0; v < kLanes; v += N)
      for (int64_t begin = 0; begin < p.features; begin += kShortChain) {
        Vector<T, N> sum{};
        for (int64_t f = begin; f < p.features && f < begin + kShortChain; ++f)
          sum += load<T, N>(s.F + f * kLanes + v) * state.hz[f];
        store<T, N>(total + v, load<T, N>(total + v) + sum);
      }
    gemm<T, kWidth<T>, true>(kLanes, p.value_pad, p.features, Strided<T>{s.F, 1, kLanes},
                             DenseRows<const T>{state.H, p.value_pad}, DenseRows<T>{s.O, p.value_pad});
  }

  // 6. One normaliser. A row without weight gives zeros; NaN stays NaN.
  T den[kLanes], log_den[kLanes];
  bool skip[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    den[lane] = T(1), skip[lane] = lane >= tile.lanes || tile.query[lane] < 0;
    if (skip[lane]) continue;
    const T complement = total[lane] - s.removed[lane];
    den[lane] = s.exact[lane] + (complement < T(0) ? T(0) : complement);
    if (tile.list.bitmask || !is_beyond_bound<T>(p, s.removed[lane], den[lane], squares[lane])) continue;
    if (p.needs_again) {
      p.needs_again[(tile.b * p.q_heads + tile.h) * p.q_tokens + tile.query[lane]] = 1;
      skip[lane] = true;
      continue;
    }
    s.c[lane] = forward_by_key<E, kLanes>(p, tile, lane, kShared ? tile.list : s.lists[lane], s.xT, s.qT, s.by_key,
                                          s.by_key + p.map_pad, &den[lane], s.O + lane * p.value_pad);
  }
  log2_lanes<T, kLanes>(den, log_den);
  T* lse = static_cast<T*>(p.lse) + (tile.b * p.q_heads + tile.h) * p.q_tokens;
  for (int lane = 0; lane < tile.lanes; ++lane) {
    if (skip[lane]) continue;
    constexpr int NV = kWidth<T>;
    E* out = p.out.at<E>(tile.b, tile.h, tile.query[lane]);
    const T *O = s.O + lane * p.value_pad, d = den[lane];
    lse[tile.query[lane]] = d == T(0) ? -T(__builtin_inf()) : T(kLn2) * (s.c[lane] + log_den[lane]);
    // Divided, not multiplied by a rounded 1 / den (docs/algorithm.md, section 5).
    if (d > T(1e-30) && d < T(1e30)) {
      const T inverse = T(1) / d;
      for (int64_t e = 0; e < p.value_pad; e += NV)
        store_narrow<E, NV>(out + e, divide<T, NV>(load<T, NV>(O + e), d, inverse));
    } else {
      for (int64_t e = 0; e < p.value_pad; e += NV)
        store_narrow<E, NV>(out + e, d == T(0) ? Vector<T, NV>{} : load<T, NV>(O + e) / d);
    }
  }
}

template <class E, int kLanes, bool kShared, bool kBitmask>
struct ForwardVisitor {
  static constexpr bool kNeedsLists = true;
  const AttentionParams& p;
  ForwardScratch<E, kLanes> s;
  TilePrefetcher<E, kLanes, false> prefetcher;
  Bitmasks<kBitmask> bitmask{};
  void operator()(QueryTile<E, kLanes>& tile, const QueryTile<E, kLanes>* next) {
    if constexpr (kBitmask) collect_bitmask<E, kLanes>(p, tile, bitmask.of_key);
    if constexpr (kShared) prefetcher.look_ahead(tile, next);
    forward_tile<E, kLanes, kShared>(p, tile, s, prefetcher);
  }
};

template <class E, int kLanes, bool kShared, bool kBitmask = false>
int64_t forward_unit_of(const AttentionParams& p, int64_t b, int64_t h, int64_t unit, void* scratch,
                        const void* zero_row) {
  Arena arena{static_cast<char*>(scratch), 0};
  ForwardVisitor<E, kLanes, kShared, kBitmask> visitor{p, {}, TilePrefetcher<E, kLanes, false>(p)};
  allocate_forward<E, kLanes, kShared>(p, arena, visitor.s);
  QueryTile<E, kLanes> tile[2];
  allocate_tiles<E, kLanes>(p, arena, tile);
  if (!scratch) return arena.used;
  for_each_tile<E, kLanes, kShared && !kBitmask>(p, b, h, unit, zero_row, tile, visitor);
  return arena.used;
}

// Forward pass of the queries of one unit.
template <class E>
int64_t forward_unit(const AttentionParams& p, int64_t b, int64_t h, int64_t unit, void* scratch,
                     const void* zero_row) {
  if (p.block_q == 1) {
    const auto by_bitmask = [&] { return forward_unit_of<E, 16, true, true>(p, b, h, unit, scratch, zero_row); };
    const auto by_lists = [&] { return forward_unit_of<E, 16, false>(p, b, h, unit, scratch, zero_row); };
    if (scratch) return uses_bitmask(p, p.rows[b]) ? by_bitmask() : by_lists();
    const int64_t of_bitmask = by_bitmask(), of_lists = by_lists();
    return of_bitmask > of_lists ? of_bitmask : of_lists;
  }
  if (p.block_q <= 8) return forward_unit_of<E, 8, true>(p, b, h, unit, scratch, zero_row);
  if (p.block_q < 32) return forward_unit_of<E, 16, true>(p, b, h, unit, scratch, zero_row);
  return forward_unit_of<E, 32, true>(p, b, h, unit, scratch, zero_row);
}

}  // namespace sb::SB_ISA

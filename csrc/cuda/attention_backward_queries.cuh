// Backward pass of queries, a warp per query slot: dq, and the gradient of its map, or of its clusters' exponents.
#pragma once
#include "attention_backward.cuh"

namespace sb::cuda {

// Shared memory of a warp: the scaled query and dO; a step's pairs; the gradients of x or of the clusters' exponents,
// and those of features or the exponents themselves.
template <class T>
struct BackwardQueryMemory {
  static SB_HD int64_t gradients(const ForwardParams& p) { return p.has_maps() ? p.rank + 1 : p.rank; }
  static SB_HD int64_t bytes(const ForwardParams& p) {
    return bytes_of<T>(p.head_dim) + bytes_of<T>(p.value_pad) + 2 * bytes_of<T>(32) + bytes_of<int32_t>(32) +
           (p.has_low_rank() ? bytes_of<T>(gradients(p)) + bytes_of<T>(p.features) : 0);
  }
  Shared<T> q, d_out, ds, dt, d_map, features;
  Shared<int32_t> key;
  SB_DEVICE BackwardQueryMemory(const ForwardParams& p, int warp) {
    Carver carve(warp * bytes(p));
    q = carve.template take<T>(p.head_dim), d_out = carve.template take<T>(p.value_pad);
    ds = carve.template take<T>(kWarp), dt = carve.template take<T>(kWarp);
    key = carve.template take<int32_t>(kWarp);
    d_map = carve.template take<T>(p.has_low_rank() ? gradients(p) : 0);
    features = carve.template take<T>(p.has_low_rank() ? p.features : 0);
  }
};

template <class E, class T>
class BackwardQuery : AttentionQuery<E, T> {
  typedef AttentionQuery<E, T> Base;
  typedef typename Base::M M;
  using Base::b, Base::h, Base::kv, Base::head, Base::lane, Base::slot, Base::query, Base::first_key, Base::exponent;

 public:
  SB_DEVICE BackwardQuery(const BackwardParams& p, const BackwardQueryMemory<T>& memory, int64_t b, int64_t h,
                          int64_t slot)
      : Base(p, memory.q, memory.features, b, h, slot), p(p), memory(memory) {}

  SB_DEVICE void run() {
    kind = kind_of(p, b, h, slot);
    if (kind == SlotKind::kNone) return;
    record = load(record_of<T>(p, b, h, slot));
    const RowRange range = load(p.rows + b);
    this->find(range);
    const int64_t edge = edge_of_slot(p, range, slot), state_slot = kv_state_of_edge(p, edge);
    const KeyList list(p, range, b, h, slot, edge);
    const bool uses_state = kind == SlotKind::kState;
    const int64_t state_end = !uses_state ? 0 : p.is_causal ? state_slot * kChunk : edge + 1;
    read();
    if (uses_state) kappa_ref = log_of_state<T>(p, head, state_slot);

    // 1. The weights' sum, which becomes one, and their mean of dO.v - delta, which becomes zero: the error of either
    // is the same for all pairs. 2. Gradients.
    for (int sweep = 0; sweep < 2; ++sweep) {
      visit(list, edge, state_end, state_slot);
      if (!is_balanced) balance();
    }

    // 3. Those of the map go on, then dq.
    for (int c = 0; c < kColumns; ++c) dq[c] *= T(p.scale);
    if (p.has_maps()) finish_map();
    if (p.has_clusters()) finish_clusters();
    E* to = p.dq.template at<E>(b, h, query);
    for (int c = 0; c < kColumns; ++c) {
      const int64_t e = lane + c * kWarp;
      if (e < p.head_dim) store(to + e, Narrow<E>::of(dq[c]));
    }
  }

 private:
  // Listed keys; unlisted ones by themselves; the rest through the state.
  SB_DEVICE void visit(const KeyList& list, int64_t edge, int64_t state_end, int64_t state_slot) {
    for (int64_t begin = 0; begin < list.positions(); begin += kWarp) {
      const int64_t position = begin + lane, key = position < list.positions() ? list.key_at(position) : -1;
      add(key, true, key >= 0 && key < state_end && !is_held_out(p, head, first_key + key, state_slot));
    }
    const HeldOut held(p, head, state_slot);
    for (int64_t begin = 0; begin < held.count && kind == SlotKind::kState; begin += kWarp) {
      const int64_t key = begin + lane < held.count ? held.key_at(begin + lane) - first_key : -1;
      add(key >= 0 && !list.lists(key) ? key : -1, false, false);
    }
    if (p.has_low_rank()) {
      const ValidKeys valid(p, b, state_end, edge);
      for (int64_t i = valid.begin; i < valid.end; i += kWarp) {
        const int64_t key = valid.at(i + lane);
        add(key >= 0 && !list.lists(key) ? key : -1, false, false);
      }
    }
    if (kind == SlotKind::kState) add_state(state_of<T>(p, head, state_slot));
  }
  SB_DEVICE void balance() {
    const T d_lse = p.d_lse ? T(load(static_cast<const M*>(p.d_lse) + (b * p.q_heads + h) * p.q_tokens + query)) : T(0);
    const T total = warp_sum(weights), mean = warp_sum(moments);
    if (total > T(0)) {
      record.inverse /= total, record.state_weight /= total;
      record.correction = mean / total - d_lse;
    }
    is_balanced = true;
    if (lane == 0) store(record_of<T>(p, b, h, slot), record);
  }

  SB_DEVICE void read() {
    this->read_query();
    const E* d_out = p.d_out.template at<const E>(b, h, query);
    for (int64_t e = lane; e < p.value_pad; e += kWarp) memory.d_out.set(e, T(widened(load(d_out + e))));
    if (p.has_low_rank())
      for (int64_t a = lane; a < BackwardQueryMemory<T>::gradients(p); a += kWarp) memory.d_map.set(a, T(0));
    if (p.has_maps()) this->rho = MapRow<M, T>(p.x_map, b, h, query).log();
    if (p.has_clusters()) this->weigh_clusters();
    for (int c = 0; c < kColumns; ++c) dq[c] = T(0);
    sync_warp();
  }

  // Adds a key of every lane, -1 for none.
  SB_DEVICE void add(int64_t key, bool is_listed, bool is_in_state) {
    PairGradients<T> of{T(0), T(0), T(0)};
    if (key >= 0) {
      Pair<T> pair;
      pair.is_listed = is_listed, pair.is_in_state = is_in_state, pair.kappa_ref = kappa_ref;
      const E* v = p.v.template at<const E>(b, kv, first_key + key);
      pair.value = sum_of_terms(p.value_pad, [&](int64_t e) { return memory.d_out.get(e) * T(widened(load(v + e))); });
      if (is_listed) pair.score = this->score_of_key(key);
      if (!is_listed || is_in_state) pair.low_rank = this->low_rank_term(key);
      of = gradients_of_pair(p, record, pair);
      if (!is_balanced) weights += of.w, moments += of.w * (pair.value - record.delta);
    }
    if (!is_balanced) return;
    memory.ds.set(lane, of.ds), memory.dt.set(lane, of.dt), memory.key.set(lane, int32_t(key));
    sync_warp();
    for (int i = 0; i < kWarp; ++i) {
      const int64_t j = memory.key.get(i);
      if (j < 0) continue;
      const T ds = memory.ds.get(i);
      const E* k = p.k.template at<const E>(b, kv, first_key + j);
      for (int c = 0; c < kColumns; ++c) {
        const int64_t e = lane + c * kWarp;
        if (e < p.head_dim && ds != T(0)) dq[c] += ds * T(widened(load(k + e)));
      }
    }
    if (p.has_maps()) {
      add_map_rows(p, memory.d_map, memory.dt, memory.key,
                   [&](int64_t j) { return MapRow<M, T>(p.y_map, b, kv, first_key + j); });
    } else if (p.has_clusters()) {
      for (int i = 0; i < kWarp; ++i) {
        const T dt = memory.dt.get(i);
        if (dt == T(0)) continue;
        const int64_t c = cluster_of(p, head, first_key + memory.key.get(i));
        if (c % kWarp == lane) memory.d_map.set(c, memory.d_map.get(c) + dt);
      }
    }
    sync_warp();
  }

  // Through F(x) H, with G = H dO - delta hz.
  SB_DEVICE void add_state(const T* state) {
    if (!is_balanced && p.has_maps()) {
      const MapRow<M, T> x(p.x_map, b, h, query);
      const auto put = [&](int64_t f, T value) {
        if (f % kWarp == lane) memory.features.set(f, value);
      };
      visit_low_rank(p.low_rank,
                     [&](auto kernel) SB_INLINE_LAMBDA { kernel.expand(p.rank, record.state_weight, x, put); });
    }
    for (int64_t f = lane; f < p.features; f += kWarp) {
      const T* row = state + f * (p.value_pad + 1);
      T sum = sum_of_terms(p.value_pad, [&](int64_t e) { return load(row + e) * memory.d_out.get(e); });
      sum -= record.delta * load(row + p.value_pad);
      if (is_balanced) {
        sum -= record.correction * load(row + p.value_pad);
      } else {
        const T feature =
            p.has_clusters() ? exp2_of(exponent.get(f) - record.log) * record.inverse : memory.features.get(f);
        weights += feature * load(row + p.value_pad), moments += feature * sum;
        continue;
      }
      if (p.has_clusters())
        memory.d_map.set(f, memory.d_map.get(f) + exp2_of(exponent.get(f) - record.log) * record.inverse * sum);
      else
        memory.features.set(f, sum);
    }
    if (p.has_maps() && is_balanced)
      chain_features(p, record.state_weight, MapRow<M, T>(p.x_map, b, h, query), memory.features, memory.d_map);
  }

  SB_DEVICE void finish_map() {
    const T d_rho = log_gradient_of(p, MapRow<M, T>(p.x_map, b, h, query), memory.d_map);
    sync_warp();
    if (lane == 0) memory.d_map.set(p.rank, d_rho);
    sync_warp();
    if (!p.query_weight.data) {
      M* to = p.d_query_map.template at<M>(b, h, query);
      for (int64_t a = lane; a <= p.rank; a += kWarp) store(to + a, M(memory.d_map.get(a)));
      return;
    }
    for (int64_t o = 0; o <= p.rank; ++o) {
      const M* row = weight_row<M>(p, p.query_weight, b, h, p.q_heads, o);
      add_row(memory.d_map.get(o), row);
    }
  }
  // q.b_c is an exponent of the query and of the representative, whose gradient the slot leaves to all of them.
  SB_DEVICE void finish_clusters() {
    sync_warp();
    T* to = static_cast<T*>(p.d_exponent) + ((b * p.q_heads + h) * p.q_tokens + slot) * p.rank;
    for (int64_t c = lane; c < p.rank; c += kWarp) store(to + c, memory.d_map.get(c));
    const M* representatives = static_cast<const M*>(p.given_representatives) + head * p.rank * p.head_dim;
    for (int64_t c = 0; c < p.rank; ++c) {
      const T d = memory.d_map.get(c) * T(p.scale);
      if (d != T(0)) add_row(d, representatives + c * p.head_dim);
    }
  }
  SB_DEVICE void add_row(T factor, const M* row) {
    for (int c = 0; c < kColumns; ++c) {
      const int64_t e = lane + c * kWarp;
      if (e < p.head_dim) dq[c] += factor * T(load(row + e));
    }
  }

  const BackwardParams& p;
  const BackwardQueryMemory<T>& memory;
  SlotKind kind;
  SlotRecord<T> record;
  T kappa_ref = T(0), dq[kColumns];
  bool is_balanced = false;
  T weights = T(0), moments = T(0);  // of this lane: sums of weights, and of weights (dO.v - delta)
};

template <class E, class T>
SB_KERNEL attention_backward_queries(BackwardParams p) {
  const BackwardQueryMemory<T> memory(p, warp_index());
  const int64_t slots = p.batch * p.q_heads * p.q_tokens, warps = block_threads() / kWarp;
  for_each_task(ceil_div(slots, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index();
    if (at >= slots) return;
    const int64_t row = at / p.q_tokens;
    BackwardQuery<E, T>(p, memory, row / p.q_heads, row % p.q_heads, at % p.q_tokens).run();
  });
}

}  // namespace sb::cuda

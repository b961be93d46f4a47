// Forward pass, a warp per query (docs/algorithm.md, section 5). Lanes are keys where weights are formed, and columns
// of values where they are summed. A query reads no other query's list, so that nothing later decides what it computes.
#pragma once
#include "attention_query.cuh"
#include "kv_state.cuh"

namespace sb::cuda {

inline constexpr int kForwardWarps = 4;

// Shared memory of a warp: the scaled query, a step's weights and keys, the exponents of the clusters, and the output
// where the backward pass wants its product.
template <class T>
struct ForwardMemory {
  static SB_HD int64_t bytes(const ForwardParams& p) {
    const int64_t values = pad_to(p.head_dim, 2) + 2 * 32 + (p.has_clusters() ? pad_to(p.rank, 2) : 0) +
                           (p.records ? pad_to(p.value_pad, 2) : 0);
    return values * int64_t(sizeof(T)) + 32 * int64_t(sizeof(int32_t));
  }
  Shared<T> q, weight, taken, exponent, out;
  Shared<int32_t> key;
  SB_DEVICE ForwardMemory(const ForwardParams& p, int warp) {
    int64_t at = warp * bytes(p);
    const auto carve = [&](int64_t values) {
      const auto array = shared_array<T>(at);
      at += values * int64_t(sizeof(T));
      return array;
    };
    q = carve(pad_to(p.head_dim, 2)), weight = carve(kWarp), taken = carve(kWarp);
    exponent = carve(p.has_clusters() ? pad_to(p.rank, 2) : 0), out = carve(p.records ? pad_to(p.value_pad, 2) : 0);
    key = shared_array<int32_t>(at);
  }
};

template <class E, class T>
class ForwardQuery : AttentionQuery<E, T> {
  typedef AttentionQuery<E, T> Base;
  typedef typename Base::M M;
  using Base::p, Base::b, Base::h, Base::kv, Base::head, Base::lane, Base::slot, Base::query, Base::first_key;
  using Base::rho, Base::top_cluster, Base::exponent, Base::score_of_key, Base::low_rank_term;

 public:
  SB_DEVICE ForwardQuery(const ForwardParams& p, const ForwardMemory<T>& memory, int64_t b, int64_t h, int64_t slot)
      : Base(p, memory.q, memory.exponent, b, h, slot), memory(memory) {}

  SB_DEVICE void run() {
    const RowRange range = load(p.rows + b);
    if (!this->find(range) || (p.only_flagged && !load(flag()))) return;

    const int64_t edge = edge_of_slot(p, range, slot);
    state_slot = kv_state_of_edge(p, edge);
    const KeyList list(p, range, b, h, slot, edge);
    const int64_t state_end = p.is_causal ? state_slot * kChunk : edge + 1;
    this->read_query();
    if (!p.has_low_rank()) {
      sum_listed(list, 0);
      return finish(SlotKind::kListed, warp_sum(exact));
    }
    rho = p.has_clusters() ? T(0) : MapRow<M, T>(p.x_map, b, h, query).log();
    if (p.has_clusters()) this->weigh_clusters();
    const int64_t unlisted = load(p.valid_before + b * p.slots + state_slot) - count_listed(list, state_end);
    if (unlisted <= kByKeyLimit || range.q_end - range.q_first <= kByKeyQueries) {
      sum_all(list);
      return finish(SlotKind::kByKey, warp_sum(exact));
    }
    kappa_ref = log_of_state<T>(p, head, state_slot);
    sum_listed(list, state_end);
    if (p.held_keys) sum_held(list);
    if (p.is_causal) sum_unlisted(list, state_end);
    if (add_state(state_of<T>(p, head, state_slot))) return;
    // The complement drowns in rounding.
    if (p.flags && !p.only_flagged) {
      if (lane == 0) store(flag(), uint8_t(1)), store(p.any_flagged + head, uint8_t(1));  // by whom does not matter
      return;
    }
    sum_all(list);  // every key by itself, nothing subtracted
    finish(SlotKind::kByKey, warp_sum(exact));
  }

 private:
  // What the state holds of a key, over the common factor exp(log_of_state).
  SB_DEVICE T in_state(int64_t key) const {
    if (is_held_out(p, head, first_key + key, state_slot)) return T(0);
    const LowRankTerm<T> term = low_rank_term(key);
    return p.has_clusters() ? exp2_of(term.query - top_cluster) * exp2_of(term.key)
                            : exp2_of(term.key - kappa_ref) * kernel_value(p, term.product);
  }

  // -------------------- sums over keys

  SB_DEVICE void clear() {
    for (int c = 0; c < kColumns; ++c) sum[c] = taken[c] = T(0);
    top = T(kLowestLog), exact = removed = T(0);
  }

  // Adds a key of every lane (-1: none) with weight exp(log_query + log_key) factor; `take` is what the state's part
  // loses to it.
  SB_DEVICE void add(int64_t key, T log_query, T log_key, T factor, T take) {
    const T step_top = warp_max(key >= 0 ? log_query + log_key : T(kLowestLog));
    if (step_top > top) {
      const T scale = exp2_of(top - step_top);
      exact *= scale;
      for (int c = 0; c < kColumns; ++c) sum[c] *= scale;
      top = step_top;
    }
    const T weight = key >= 0 ? exp2_of((log_query - top) + log_key) * factor : T(0);
    exact += weight, removed += take;
    memory.weight.set(lane, weight), memory.taken.set(lane, take), memory.key.set(lane, int32_t(key));
    sync_warp();
    for (int i = 0; i < kWarp; ++i) {
      const int64_t j = memory.key.get(i);
      if (j < 0) continue;
      const T w = memory.weight.get(i), t = memory.taken.get(i);
      const E* v = p.v.template at<const E>(b, kv, first_key + j);
      for (int c = 0; c < kColumns; ++c) {
        const int64_t e = lane + c * kWarp;
        if (e >= p.value_pad) break;
        const T value = T(widened(load(v + e)));
        sum[c] += w * value;
        if (t != T(0)) taken[c] += t * value;
      }
    }
    sync_warp();
  }

  SB_DEVICE int64_t count_listed(const KeyList& list, int64_t end) const {
    int32_t count = 0;
    for (int64_t position = lane; position < list.positions(); position += kWarp) {
      const int64_t key = list.key_at(position);
      count += key >= 0 && key < end;
    }
    return warp_sum(count);
  }
  // Listed keys; those before state_end are in the state too.
  SB_DEVICE void sum_listed(const KeyList& list, int64_t state_end) {
    clear();
    for (int64_t begin = 0; begin < list.positions(); begin += kWarp) {
      const int64_t position = begin + lane, key = position < list.positions() ? list.key_at(position) : -1;
      add(key, key >= 0 ? score_of_key(key) : T(0), T(0), T(1), key >= 0 && key < state_end ? in_state(key) : T(0));
    }
  }
  // Unlisted keys that the state holds out.
  SB_DEVICE void sum_held(const KeyList& list) {
    const HeldOut held(p, head, state_slot);
    for (int64_t begin = 0; begin < held.count; begin += kWarp) {
      const int64_t key = begin + lane < held.count ? held.key_at(begin + lane) - first_key : -1;
      const bool counts = key >= 0 && !list.lists(key);
      const LowRankTerm<T> term = counts ? low_rank_term(key) : LowRankTerm<T>{T(0), T(0), T(0)};
      add(counts ? key : -1, term.query, term.key, kernel_value(p, term.product), T(0));
    }
  }
  // Unlisted keys from `begin` to the edge.
  SB_DEVICE void sum_unlisted(const KeyList& list, int64_t begin) {
    const ValidKeys valid(p, b, begin, list.edge);
    for (int64_t i = valid.begin; i < valid.end; i += kWarp) {
      const int64_t key = valid.at(i + lane);
      const bool counts = key >= 0 && !list.lists(key);
      const LowRankTerm<T> term = counts ? low_rank_term(key) : LowRankTerm<T>{T(0), T(0), T(0)};
      add(counts ? key : -1, term.query, term.key, kernel_value(p, term.product), T(0));
    }
  }
  // Every key by itself.
  SB_DEVICE void sum_all(const KeyList& list) {
    clear();
    const ValidKeys valid(p, b, 0, list.edge);
    for (int64_t i = valid.begin; i < valid.end; i += kWarp) {
      const int64_t key = valid.at(i + lane);
      LowRankTerm<T> term{T(0), T(0), T(0)};
      const bool is_listed = key >= 0 && list.lists(key);
      if (is_listed)
        term.query = score_of_key(key);
      else if (key >= 0)
        term = low_rank_term(key);
      add(key, term.query, term.key, is_listed ? T(1) : kernel_value(p, term.product), T(0));
    }
  }

  // -------------------- the state, and results

  // Calls visit(f, F_f) with the features of the query in a fixed order.
  template <class Visit>
  SB_DEVICE void for_each_feature(const Visit& visit) const {
    if (p.has_clusters()) {
      for (int64_t c = 0; c < p.rank; ++c) visit(c, exp2_of(exponent.get(c) - top_cluster));
      return;
    }
    const MapRow<M, T> x(p.x_map, b, h, query);
    visit_low_rank(p.low_rank, [&](auto kernel) SB_INLINE_LAMBDA { kernel.expand(p.rank, T(1), x, visit); });
  }

  // Adds the state's complement and writes; false, and nothing written, where that would lose precision.
  SB_DEVICE bool add_state(const T* state) {
    T complement[kColumns], total = T(0), chain = T(0), squares = T(0), squares_of_state = T(0);
    for (int c = 0; c < kColumns; ++c) complement[c] = T(0);
    int count = 0;
    const int64_t columns = p.value_pad + 1;
    for_each_feature([&](int64_t f, T feature) {
      const T* row = state + f * columns;
      const T hz = load(row + p.value_pad);
      chain += feature * hz;
      if (++count % 8 == 0) total += chain, chain = T(0);  // a long chain of roundings is common to all columns
      squares += feature * feature, squares_of_state += hz * hz;
      for (int c = 0; c < kColumns; ++c) {
        const int64_t e = lane + c * kWarp;
        if (e < p.value_pad) complement[c] += feature * load(row + e);
      }
    });
    total += chain;
    const T log_query = p.has_clusters() ? top_cluster : rho, log_keys = p.has_clusters() ? T(0) : kappa_ref,
            log_state = log_query + log_keys, c = larger(top, log_state),
            a = T(exp2_of(double(log_query) + double(log_keys) - double(c))), scale = exp2_of(top - c),
            all_removed = warp_sum(removed), all_exact = warp_sum(exact) * scale;
    const T left = a * (total - all_removed), den = all_exact + (left < T(0) ? T(0) : left), lost = a * all_removed;
    if (lost > T(p.fallback_bound) * den || lost > T(1e37)) return false;
    const double terms = double(a) * double(a) * double(squares) * double(squares_of_state);
    const bool has_signs = p.low_rank == LowRank::kQuadratic && sizeof(T) == sizeof(float);
    if (has_signs && !(terms <= kTermsBoundOfPlainStates * kTermsBoundOfPlainStates * double(den) * double(den)))
      return false;
    for (int i = 0; i < kColumns; ++i) sum[i] = sum[i] * scale + a * (complement[i] - taken[i]);
    top = c;
    finish(SlotKind::kState, den, a);
    return true;
  }

  SB_DEVICE uint8_t* flag() const { return p.flags + (b * p.q_heads + h) * p.q_tokens + query; }
  // Writes the result, or for the backward pass what is left of the sums; `state_weight`: exp(rho + kappa_ref - top).
  SB_DEVICE void finish(SlotKind kind, T den, T state_weight = T(0)) {
    if (p.flags && !p.only_flagged && lane == 0) store(flag(), uint8_t(0));
    for (int c = 0; c < kColumns; ++c) sum[c] = den == T(0) ? T(0) : sum[c] / den;
    if (p.records) {
      // A query that sees nothing has no gradients, whatever those of its result and lse are: zero times what is no
      // number would be none.
      if (den != T(0)) write_record(kind, den, state_weight);
      return;
    }
    const int64_t row = (b * p.q_heads + h) * p.q_tokens;
    E* out = p.out.template at<E>(b, h, query);
    for (int c = 0; c < kColumns; ++c) {
      const int64_t e = lane + c * kWarp;
      if (e < p.value_pad) store(out + e, Narrow<E>::of(sum[c]));
    }
    const T lse = den == T(0) ? -T(INFINITY) : T(kLn2) * (top + log2_of(den));
    if (lane == 0) store(static_cast<M*>(p.lse) + row + query, M(lse));
  }
  // dO.o is summed in the order of dO.v: a query with a single key gets a gradient of exactly zero.
  SB_DEVICE void write_record(SlotKind kind, T den, T state_weight) const {
    for (int c = 0; c < kColumns; ++c) {
      const int64_t e = lane + c * kWarp;
      if (e < p.value_pad) memory.out.set(e, sum[c]);
    }
    sync_warp();
    if (lane == 0) {
      // A state far above all that a query takes from it has gradients beyond what T holds: they are limited.
      const T most = (sizeof(T) == sizeof(double) ? T(0x1p900) : T(0x1p100)) / larger(state_weight, T(1)),
              rounded = T(1) / den, inverse = rounded > most ? most : rounded;
      const E* d_out = p.d_out.template at<const E>(b, h, query);
      const T delta =
          sum_of_terms(p.value_pad, [&](int64_t e) { return T(widened(load(d_out + e))) * memory.out.get(e); });
      const int64_t at = (b * p.q_heads + h) * p.q_tokens + slot;
      store(static_cast<SlotRecord<T>*>(p.records) + at,
            SlotRecord<T>{top, inverse, state_weight * inverse, delta, T(0)});
      store(p.kinds + at, kind);
    }
    sync_warp();
  }

  const ForwardMemory<T>& memory;
  int64_t state_slot = 0;
  T kappa_ref = T(0);
  // Sums over keys: weights times values by column, what is taken back from the state, the largest exponent, and this
  // lane's share of both weights.
  T sum[kColumns], taken[kColumns], top, exact, removed;
};

template <class E, class T>
SB_KERNEL attention_forward(ForwardParams p) {
  const ForwardMemory<T> memory(p, warp_index());
  const int64_t queries = p.batch * p.q_heads * p.q_tokens;
  for_each_task(ceil_div(queries, kForwardWarps), [&](int64_t task) {
    const int64_t at = task * kForwardWarps + warp_index();
    if (at >= queries) return;
    const int64_t row = at / p.q_tokens;
    ForwardQuery<E, T>(p, memory, row / p.q_heads, row % p.q_heads, at % p.q_tokens).run();
  });
}

}  // namespace sb::cuda

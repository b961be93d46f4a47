// Backward pass of keys, a warp per key: what its pairs with query slots add up to, in the order of heads and slots,
// and what reaches it through the state. Lanes are pairs where gradients are formed, and columns where they are summed.
#pragma once
#include "attention_backward.cuh"
#include "naming_blocks.cuh"

namespace sb::cuda {

inline constexpr int kFinishThreads = 128;

// Shared memory of a warp: the key and the value; a step's pairs; the gradients of y, and those of features.
template <class T>
struct BackwardKeyMemory {
  static SB_HD int64_t bytes(const ForwardParams& p) {
    return bytes_of<T>(p.head_dim) + bytes_of<T>(p.value_pad) + 3 * bytes_of<T>(32) + bytes_of<int32_t>(32) +
           (p.has_maps() ? bytes_of<T>(p.rank + 1) + bytes_of<T>(p.features) : 0);
  }
  Shared<T> k, v, w, ds, dt, dy, features;
  Shared<int32_t> query;
  SB_DEVICE BackwardKeyMemory(const ForwardParams& p, int warp) {
    Carver carve(warp * bytes(p));
    k = carve.template take<T>(p.head_dim), v = carve.template take<T>(p.value_pad);
    w = carve.template take<T>(kWarp), ds = carve.template take<T>(kWarp), dt = carve.template take<T>(kWarp);
    query = carve.template take<int32_t>(kWarp);
    dy = carve.template take<T>(p.has_maps() ? p.rank + 1 : 0);
    features = carve.template take<T>(p.has_maps() ? p.features : 0);
  }
};

// Why a query slot may have a pair with a key. kOutside: its state does not hold the key.
enum class PairOf { kSinks, kSpan, kIndex, kOutside, kByKey };

template <class E, class T>
class BackwardKey {
  typedef AccType<E> M;

 public:
  SB_DEVICE BackwardKey(const BackwardParams& p, const BackwardKeyMemory<T>& memory, int64_t head, int64_t j)
      : p(p), memory(memory), b(head / p.kv_heads), kv(head % p.kv_heads), head(head), j(j), lane(lane_index()) {}

  SB_DEVICE void run() {
    range = load(p.rows + b);
    if (is_unwanted(p, head) || j < range.k_first || j >= range.k_end) return;
    if (p.k_mask && load(p.k_mask + b * p.k_tokens + j)) return;
    key = j - range.k_first;
    entry_slot = p.first_slot ? load(p.first_slot + head * p.k_tokens + j) : key / p.segment + 1;
    read();
    const int64_t group = p.q_heads / p.kv_heads;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for (const PairOf of : {PairOf::kSinks, PairOf::kSpan, PairOf::kIndex, PairOf::kOutside, PairOf::kByKey})
        for (int64_t level = 0; level < (of == PairOf::kSpan ? p.of_span.levels : 1); ++level)
          if (of == PairOf::kIndex ? !p.leaves_listed_blocks : !p.adds_listed_blocks) add_pairs(of, h, level);
    if (p.has_low_rank() && !p.adds_listed_blocks) add_state();
    finish();
  }

 private:
  SB_DEVICE void read() {
    const E *of_key = p.k.template at<const E>(b, kv, j), *of_value = p.v.template at<const E>(b, kv, j);
    sync_warp();  // the last key is done with it
    for (int64_t e = lane; e < p.head_dim; e += kWarp) memory.k.set(e, T(widened(load(of_key + e))));
    for (int64_t e = lane; e < p.value_pad; e += kWarp) memory.v.set(e, T(widened(load(of_value + e))));
    if (p.has_maps())
      for (int64_t a = lane; a <= p.rank; a += kWarp) memory.dy.set(a, T(0));
    for (int c = 0; c < kColumns; ++c) dk[c] = dv[c] = T(0);
    sync_warp();
    if (p.has_clusters()) {
      cluster = cluster_of(p, head, j);
      largest = load(static_cast<const T*>(p.cluster_log) + head * p.rank + cluster);
      kappa = log_mass_of<M, T>(p, head, j) - largest;
    } else if (p.has_maps()) {
      kappa = MapRow<M, T>(p.y_map, b, kv, j).log();
    }
  }

  // -------------------- pairs

  // Adds the pairs with the query slots that have them for a reason: neighbours, those of blocks, or those of a list.
  SB_DEVICE void add_pairs(PairOf of, int64_t h, int64_t level) {
    const int64_t slots = slots_of_row(p, range), of_block = p.block_q < slots ? p.block_q : slots;
    int64_t first = 0, count = 0;
    const int32_t* list = nullptr;
    const bool of_blocks = of == PairOf::kSpan || of == PairOf::kIndex;
    if (of_blocks) {
      if (of == PairOf::kSpan ? !p.span : !p.index) return;
      const NamingBlocks naming(p, of == PairOf::kSpan ? p.of_span : p.of_index, b, h, key, level);
      list = naming.blocks, count = naming.count * of_block;
    } else if (of == PairOf::kByKey) {
      if (!p.has_low_rank()) return;
      // Slots ascend, and so do edges: those that do not see the key are first.
      const int64_t row = b * p.q_heads + h, slots_by_key = load(p.by_key_count + row);
      list = p.by_key + row * p.q_tokens;
      const int64_t unseeing = lower_bound(list, slots_by_key, first_slot_seeing(p, range, key));
      list += unseeing, count = slots_by_key - unseeing;
    } else {
      first = first_slot_seeing(p, range, key);
      int64_t end = slots;
      if (of == PairOf::kSinks && !(p.span && key < p.span_sinks)) return;
      if (of == PairOf::kOutside) {
        if (!p.has_low_rank() || (!p.is_causal && entry_slot != kNeverEnters)) return;
        if (p.is_causal && entry_slot != kNeverEnters) end = first_slot_reading(p, range, entry_slot);
        if (end > slots) end = slots;
      }
      count = end - first;
    }
    for (int64_t begin = 0; begin < count; begin += kWarp) {
      const int64_t i = begin + lane;
      int64_t slot = -1;
      if (i < count && of_blocks) {
        const int64_t block = load(list + i / of_block);
        if (block >= 0 && block < p.blocks) slot = block * p.block_q + i % of_block;
      } else if (i < count) {
        slot = list ? load(list + i) : first + i;
      }
      add(of, h, slot);
    }
  }

  // Adds the pair with a slot of every lane, -1 for none.
  SB_DEVICE void add(PairOf of, int64_t h, int64_t slot) {
    int64_t query = -1;
    PairGradients<T> g{T(0), T(0), T(0)};
    if (slot >= 0 && slot < p.q_tokens) g = gradients(of, h, slot, query);
    memory.w.set(lane, g.w), memory.ds.set(lane, g.ds), memory.dt.set(lane, g.dt);
    memory.query.set(lane, int32_t(query));
    sync_warp();
    for (int i = 0; i < kWarp; ++i) {
      const int64_t from = memory.query.get(i);
      if (from < 0) continue;
      const T w = memory.w.get(i), ds = memory.ds.get(i);
      const E *q = p.q.template at<const E>(b, h, from), *d_out = p.d_out.template at<const E>(b, h, from);
      for (int c = 0; c < kColumns; ++c) {
        const int64_t e = lane + c * kWarp;
        if (e < p.value_pad) dv[c] += w * T(widened(load(d_out + e)));
        if (e < p.head_dim && ds != T(0)) dk[c] += ds * T(widened(load(q + e)));
      }
    }
    if (p.has_maps())
      add_map_rows(p, memory.dy, memory.dt, memory.query,
                   [&](int64_t from) { return MapRow<M, T>(p.x_map, b, h, from); });
    if (p.has_clusters()) d_log_mass += g.dt;
    sync_warp();
  }

  SB_DEVICE PairGradients<T> gradients(PairOf of, int64_t h, int64_t slot, int64_t& query) const {
    const PairGradients<T> none{T(0), T(0), T(0)};
    const SlotKind kind = kind_of(p, b, h, slot);
    const int64_t edge = edge_of_slot(p, range, slot);
    if (kind == SlotKind::kNone || key > edge) return none;
    const KeyList list(p, range, b, h, slot, edge);
    const bool in_span = key >= list.lo && key < list.hi;
    const bool has_pair = of == PairOf::kSinks     ? key < list.sinks
                          : of == PairOf::kSpan    ? in_span
                          : of == PairOf::kIndex   ? key >= list.sinks && !in_span
                          : of == PairOf::kOutside ? kind == SlotKind::kState && !list.lists(key)
                                                   : !list.lists(key);
    if (!has_pair) return none;
    query = query_of_slot(p, range, b, h, slot);

    Pair<T> pair;
    pair.is_listed = of != PairOf::kOutside && of != PairOf::kByKey;
    const int64_t state_slot = state_of_slot(p, range, slot);
    if (pair.is_listed && kind == SlotKind::kState) {
      pair.is_in_state = (!p.is_causal || key < state_slot * kChunk) && !is_held_out(p, head, j, state_slot);
      pair.kappa_ref = log_of_state<T>(p, head, state_slot);
    }
    const E *q = p.q.template at<const E>(b, h, query), *d_out = p.d_out.template at<const E>(b, h, query);
    pair.value = sum_of_terms(p.value_pad, [&](int64_t e) { return T(widened(load(d_out + e))) * memory.v.get(e); });
    if (pair.is_listed) pair.score = scaled_product(q, [&](int64_t e) { return memory.k.get(e); });
    if (!pair.is_listed || pair.is_in_state) pair.low_rank = low_rank_term(h, query, q);
    return gradients_of_pair(p, load(record_of<T>(p, b, h, slot)), pair);
  }

  template <class Row>
  SB_DEVICE T scaled_product(const E* q, const Row& row) const {
    return sum_of_terms(p.head_dim, [&](int64_t e) { return T(widened(load(q + e))) * T(p.scale * kLog2e) * row(e); });
  }
  SB_DEVICE LowRankTerm<T> low_rank_term(int64_t h, int64_t query, const E* q) const {
    if (p.has_clusters()) {
      const M* representative = static_cast<const M*>(p.given_representatives) + (head * p.rank + cluster) * p.head_dim;
      return {scaled_product(q, [&](int64_t e) { return T(load(representative + e)); }) + largest, kappa, T(0)};
    }
    const MapRow<M, T> x(p.x_map, b, h, query), y(p.y_map, b, kv, j);
    return {x.log(), kappa, product_of_maps(p, x, y)};
  }

  // -------------------- the state, and results

  // dv += b dH^T F(y), dy += b F'(y)^T (dH v + dhz), with the gradient of the states that hold the key.
  SB_DEVICE void add_state() {
    if (entry_slot == kNeverEnters) return;
    const int64_t columns = p.value_pad + 1, at = p.is_causal ? entry_slot : 0,
                  first_head = b * p.q_heads + kv * (p.q_heads / p.kv_heads);
    const T* d_state = static_cast<const T*>(p.d_kv_state) + (first_head * p.query_segments + at) * p.slot_size;
    const auto add_feature = [&](T feature, const T* row) {
      for (int c = 0; c < kColumns; ++c) {
        const int64_t e = lane + c * kWarp;
        if (e < p.value_pad) dv[c] += feature * load(row + e);
      }
    };
    const auto gradient_of = [&](const T* row) {
      return load(row + p.value_pad) +
             sum_of_terms(p.value_pad, [&](int64_t e) { return load(row + e) * memory.v.get(e); });
    };
    if (p.has_clusters()) {
      const T* row = d_state + cluster * columns;
      const T weight = exp2_of(kappa);
      add_feature(weight, row);
      if (lane == 0) d_log_mass += weight * gradient_of(row);
      return;
    }
    const MapRow<M, T> y(p.y_map, b, kv, j);
    const int64_t state_slot = p.is_causal ? at : p.slots - 1;
    const T weight = exp2_of(kappa - log_of_state<T>(p, head, state_slot));
    visit_low_rank(p.low_rank, [&](auto kernel) SB_INLINE_LAMBDA {
      kernel.expand(p.rank, weight, y, [&](int64_t f, T feature) { add_feature(feature, d_state + f * columns); });
    });
    for (int64_t f = lane; f < p.features; f += kWarp) memory.features.set(f, gradient_of(d_state + f * columns));
    chain_features(p, weight, y, memory.features, memory.dy);
  }

  // The first pass stores sums, or adds to those of tiles, and that of flagged queries adds to them.
  SB_DEVICE void finish() {
    const auto put = [&](void* sums, int64_t width, int64_t e, T value) {
      M* to = static_cast<M*>(sums) + (head * p.k_tokens + j) * width + e;
      store(to, p.only_flagged || p.adds_listed_blocks ? M(T(load(to)) + value) : M(value));
    };
    for (int c = 0; c < kColumns; ++c) {
      const int64_t e = lane + c * kWarp;
      if (e < p.head_dim) put(p.dk_sum, p.head_dim, e, dk[c] * T(p.scale));
      if (e < p.value_pad) put(p.dv_sum, p.value_pad, e, dv[c]);
    }
    if (p.has_maps()) {
      const T d_kappa = log_gradient_of(p, MapRow<M, T>(p.y_map, b, kv, j), memory.dy);
      for (int64_t a = lane; a <= p.rank; a += kWarp)
        put(p.dy_sum, p.rank + 1, a, a < p.rank ? memory.dy.get(a) : d_kappa);
    }
    if (p.has_clusters()) {
      const T sum = warp_sum(d_log_mass);
      if (lane == 0) put(p.dy_sum, 1, 0, sum);
    }
  }

  const BackwardParams& p;
  const BackwardKeyMemory<T>& memory;
  const int64_t b, kv, head, j;
  const int lane;
  RowRange range;
  int64_t key = 0, cluster = 0;
  int64_t entry_slot = 0;                             // the first state slot that holds the key
  T largest = T(0), kappa = T(0), d_log_mass = T(0);  // d_log_mass: of this lane
  T dk[kColumns], dv[kColumns];
};

template <class E, class T>
SB_KERNEL attention_backward_keys(BackwardParams p) {
  const BackwardKeyMemory<T> memory(p, warp_index());
  const int64_t keys = p.batch * p.kv_heads * p.k_tokens, warps = block_threads() / kWarp;
  for_each_task(ceil_div(keys, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index();
    if (at < keys) BackwardKey<E, T>(p, memory, at / p.k_tokens, at % p.k_tokens).run();
  });
}

// dk and dv in the type of tokens, with what reaches keys through their maps or clusters: a thread per element. Keys
// that are ignored get zeros.
template <class E, class T>
SB_KERNEL finish_keys(BackwardParams p) {
  typedef AccType<E> M;
  const int64_t columns = p.head_dim > p.value_pad ? p.head_dim : p.value_pad;
  for_each_element(p.batch * p.kv_heads * p.k_tokens * columns, [&](int64_t at) {
    const int64_t e = at % columns, row = at / columns, j = row % p.k_tokens, head = row / p.k_tokens,
                  b = head / p.kv_heads, kv = head % p.kv_heads;
    const RowRange range = load(p.rows + b);
    const bool counts = j >= range.k_first && j < range.k_end && !(p.k_mask && load(p.k_mask + b * p.k_tokens + j));
    const auto sum_at = [&](const void* sums, int64_t width, int64_t i) {
      return load(static_cast<const M*>(sums) + row * width + i);
    };
    if (e < p.value_pad)
      store(p.dv.template at<E>(b, kv, j) + e, Narrow<E>::of(counts ? sum_at(p.dv_sum, p.value_pad, e) : M(0)));
    if (e >= p.head_dim) return;
    M dk = counts ? sum_at(p.dk_sum, p.head_dim, e) : M(0);
    if (counts && p.has_maps() && p.key_weight.data)
      for (int64_t o = 0; o <= p.rank; ++o)
        dk += sum_at(p.dy_sum, p.rank + 1, o) * load(weight_row<M>(p, p.key_weight, b, kv, p.kv_heads, o) + e);
    if (counts && p.has_clusters()) {
      const int64_t c = cluster_of(p, head, j);
      const T largest = load(static_cast<const T*>(p.cluster_log) + head * p.rank + c),
              share = exp2_of(log_mass_of<M, T>(p, head, j) - largest);
      const M d = load(static_cast<const M*>(p.d_representatives) + (head * p.rank + c) * p.head_dim + e),
              a = load(static_cast<const M*>(p.query_mean) + head * p.head_dim + e);
      dk += M(share) * d + sum_at(p.dy_sum, 1, 0) * a;
    }
    store(p.dk.template at<E>(b, kv, j) + e, Narrow<E>::of(dk));
  });
}

}  // namespace sb::cuda

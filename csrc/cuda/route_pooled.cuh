// Pooled routing (docs/algorithm.md, section 3): a block of threads per kGroup pools, whose query blocks choose their
// candidates together and then make a list each.
#pragma once
#include "route_runs.cuh"

namespace sb::cuda {

static_assert(kRouteWarps == kGroup);  // a warp forms each pool

// What is as large in every call comes first: its places are constants.
class PooledMemory {
  static constexpr int64_t kArray = kGroup * int64_t(sizeof(float)), kArrays = 10;
  static SB_HD int64_t first() { return RouteBlock::bytes() + kArrays * kArray; }
  template <class V>
  static SB_DEVICE Shared<V> small(int i) {
    return shared_array<V>(RouteBlock::bytes() + i * kArray);
  }
  static SB_HD int64_t pools(const RoutingParams& p) { return kArray * (p.head_dim + 1); }

 public:
  static SB_HD int64_t bytes(const RoutingParams& p) { return first() + pools(p) + kArray * p.rank; }
  const RouteBlock block{0};
  // Log scales of pools; their variances over coordinates; of pools that are added the largest exponent and 1 /
  // weight^2; whether they have a valid query. The same of query blocks, and their keys.
  const Shared<float> rho = small<float>(0), variance = small<float>(1), top = small<float>(2),
                      inverse = small<float>(3);
  const Shared<int32_t> is_pool = small<int32_t>(4), is_block = small<int32_t>(5);
  const Shared<int32_t> sinks = small<int32_t>(6), near_begin = small<int32_t>(7), near_end = small<int32_t>(8),
                        limit = small<int32_t>(9);
  // Pools in base 2, and the factor of |k|^2; their x, that of four pools side by side.
  const Shared<float> pool = shared_array<float>(first()), x;
  SB_DEVICE explicit PooledMemory(const RoutingParams& p) : x(shared_array<float>(x_at(p))) {}
  static SB_HD int64_t x_at(const RoutingParams& p) { return first() + pools(p); }
};

// In global memory: what a block scores, by unit, which is a key or a run.
class PooledScratch {
 public:
  // Behind what tensor cores need, and t without a low-rank kernel, there is nothing where they are used.
  static SB_HD int64_t words(const RoutingParams& p) {
    const int arrays = p.tile_rows == 0 ? 2 * kGroup + 6 : p.has_low_rank() ? 2 * kGroup + 4 : kGroup + 4;
    return arrays * p.units;
  }
  SB_DEVICE PooledScratch(const RoutingParams& p)
      : begin(p.scratch + block_index() * p.scratch_words), units(p.units) {}
  // Sortable scores; candidates; what was taken of them; what comes next.
  SB_DEVICE int32_t* key() const { return begin; }
  SB_DEVICE int32_t* run() const { return begin + units; }
  SB_DEVICE int32_t* taken() const { return begin + 2 * units; }
  SB_DEVICE int32_t* next() const { return begin + 3 * units; }
  SB_DEVICE float* s(int g) const { return floats(4 + g); }  // of pool g
  SB_DEVICE float* t(int g) const { return floats(4 + kGroup + g); }
  SB_DEVICE float* kappa() const { return floats(4 + 2 * kGroup); }  // of keys
  SB_DEVICE float* apart() const { return floats(5 + 2 * kGroup); }  // squared distances to the representatives

 private:
  SB_DEVICE float* floats(int i) const { return reinterpret_cast<float*>(begin + i * units); }
  int32_t* const begin;
  const int64_t& units;
};

template <class E>
class PooledGroup {
 public:
  SB_DEVICE PooledGroup(const RoutingParams& p, const PooledMemory& memory, const PooledScratch& scratch, int64_t b,
                        int64_t h, int64_t group)
      : p(p),
        m(memory),
        w(scratch),
        b(int(b)),
        h(int(h)),
        row(p, b * p.kv_heads + h / (p.q_heads / p.kv_heads)),
        range(load(p.rows + b)),
        first_block(int(group) * blocks_here()),
        shift((p.is_causal ? range.offset : 0) - int64_t(range.k_first)) {}

  SB_DEVICE void run() {
    make_pool(warp_index());
    if (p.has_clusters()) weigh_clusters(warp_index());
    sync_block();
    if (thread < blocks_here()) place_window(thread);
    sync_block();
    int first_live = -1, last_live = -1;
    find_live(first_live, last_live);
    if (first_live >= 0) {
      const int64_t candidates = choose_runs(last_live);
      score_keys(candidates);
      for (int t = first_live; t <= last_live; ++t)
        if (m.is_block.get(t)) write_list(t, candidates);
    }
    sync_block();
  }

 protected:
  // -------------------- pools and windows

  SB_DEVICE int blocks_here() const { return kGroup / int(p.pools); }
  // The first and the last block of the group that has a query; stay as they are if none has.
  SB_DEVICE void find_live(int& first, int& last) const {
    for (int t = 0; t < blocks_here(); ++t) {
      if (!m.is_block.get(t)) continue;
      if (first < 0) first = t;
      last = t;
    }
  }

  SB_DEVICE bool is_valid_query(int64_t i) const { return !(p.q_mask && load(p.q_mask + b * p.q_tokens + i)); }
  SB_DEVICE int64_t slot_of(int t) const { return range.q_first + (first_block + t) * p.block_q; }
  SB_DEVICE int64_t end_of(int t) const {
    const int64_t end = slot_of(t) + p.block_q;
    return end < range.q_end ? end : range.q_end;
  }

  // By a warp. Queries [from, to) of pool g.
  SB_DEVICE void make_pool(int g) {
    const int t = int(g / p.pools);
    const int64_t slot = slot_of(t), end = end_of(t) > slot ? end_of(t) : slot;
    int64_t first = slot, last = end, size = p.block_q / p.pools;
    if (p.is_causal) {
      while (first < last && !is_valid_query(first)) ++first;
      if (first < last) last = first + 1, first = last - kPool, size = kPool / p.pools;
    }
    first += g % p.pools * size;
    const int64_t from = first > range.q_first ? first : range.q_first, to = first + size < last ? first + size : last;
    int64_t n = 0;
    for (int64_t i = from; i < to; ++i) n += is_valid_query(i) ? 1 : 0;
    const float base2 = float(p.scale) * float(kLog2e), share = n > 0 ? 1.0f / float(n) : 0.0f;
    float variance = 0;
    for (int64_t e = lane; e < p.head_dim; e += kWarp) {
      float sum = 0, apart = 0;
      const auto value = [&](int64_t i) { return float(widened(load(p.q.at<const E>(b, h, i) + e))); };
      for (int64_t i = from; i < to; ++i)
        if (is_valid_query(i)) sum += value(i);
      const float mean = sum * share;
      for (int64_t i = from; i < to; ++i)
        if (is_valid_query(i)) apart += (value(i) - mean) * (value(i) - mean);
      m.pool.set(g * (p.head_dim + 1) + e, mean * base2);
      variance += apart;
    }
    // In natural units a quarter of the variance goes with |k|^2; s is in base 2.
    variance = warp_sum(variance) * (float(p.scale) * base2 * share / float(p.head_dim));
    if (lane == 0) {
      m.pool.set(g * (p.head_dim + 1) + p.head_dim, variance * 0.25f), m.variance.set(g, variance / float(kLog2e));
      m.is_pool.set(g, n > 0 ? 1 : 0);
    }
    sync_warp();
    if (!p.has_low_rank()) return;
    float rho = 0;
    if (n == 0)
      for (int64_t a = lane; a < p.rank; a += kWarp) m.x.set(a * kGroup + g, 0.0f);
    else if (!p.has_clusters())
      rho = x_of_maps(g, from, to, share);
    if (lane == 0) m.rho.set(g, rho);
    sync_warp();
  }
  // By a warp. The weights of clusters at the mean query, relative to the largest, whose exponent is the log scale.
  SB_DEVICE void weigh_clusters(int g) const {
    const float* representatives = static_cast<const float*>(p.given_representatives) + row.head * p.rank * p.head_dim;
    weigh_clusters(g, [&](int64_t c) {
      float product = 0;
      for (int64_t e = 0; e < p.head_dim; ++e)
        product += m.pool.get(g * (p.head_dim + 1) + e) * load(representatives + c * p.head_dim + e);
      return product;
    });
  }
  // product(c): of the pool with the representative of c.
  template <class Product>
  SB_DEVICE void weigh_clusters(int g, const Product& product) const {
    if (!m.is_pool.get(g)) return;
    float peak = float(kLowestLog);
    for (int64_t c = lane; c < p.rank; c += kWarp) {
      const float top = load(p.cluster_top + row.head * p.rank + c);
      const float exponent = top > float(kNoKeyLog) ? top + product(c) : float(kLowestLog);
      m.x.set(c * kGroup + g, exponent);
      peak = larger(peak, exponent);
    }
    peak = warp_max(peak);
    for (int64_t c = lane; c < p.rank; c += kWarp) m.x.set(c * kGroup + g, exp2_of(m.x.get(c * kGroup + g) - peak));
    if (lane == 0) m.rho.set(g, peak);
  }
  SB_DEVICE float x_of_maps(int g, int64_t from, int64_t to, float share) const {
    for (int64_t a = lane; a < p.rank; a += kWarp) {
      float sum = 0;
      for (int64_t i = from; i < to; ++i)
        if (is_valid_query(i)) sum += MapRow<float, float>(p.x_map, b, h, i)(a);
      m.x.set(a * kGroup + g, sum * share);
    }
    float rho = 0;
    for (int64_t i = from; i < to; ++i)
      if (is_valid_query(i)) rho += MapRow<float, float>(p.x_map, b, h, i).log();
    return rho * share;
  }

  static SB_DEVICE int64_t clamped(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
  }
  // The candidates of a causal block that starts at `position` lie before this.
  SB_DEVICE int64_t candidates_end(int64_t position) const {
    return clamped(position - (p.window > p.block_q ? p.window - p.block_q : 0), 0, row.length);
  }
  // By a thread.
  SB_DEVICE void place_window(int t) const {
    bool is_block = false;
    for (int64_t g = t * p.pools; g < (t + 1) * p.pools; ++g) is_block |= m.is_pool.get(g) != 0;
    m.is_block.set(t, is_block ? 1 : 0);
    const int64_t slot = slot_of(t), end = end_of(t), length = row.length;
    int64_t sinks = p.sinks < length ? p.sinks : length, limit = length, near_begin = 0, near_end = 0;
    if (p.is_causal) {
      near_begin = limit = candidates_end(slot + shift), near_end = clamped(end + shift, 0, length);
      if (sinks > near_end) sinks = near_end;
    } else if (p.window > 0) {  // around the block's centre, shifted to lie behind the sinks and inside the row
      const int64_t queries = int64_t(range.q_end) - range.q_first;
      const int64_t centre = queries > 0 ? (2 * (slot - range.q_first) + p.block_q) * length / (2 * queries) : 0;
      const int64_t begin = centre - p.window / 2, last = length - p.window;
      near_begin = begin < last ? begin : last;
      if (near_begin < sinks) near_begin = sinks;
      near_end = near_begin + p.window < length ? near_begin + p.window : length;
    } else if (p.q_tokens == p.k_tokens) {  // the queries are the keys: the block's own ones
      near_begin = clamped(slot + shift, 0, length), near_end = clamped(end + shift, 0, length);
    }
    if (near_begin < sinks) near_begin = sinks;
    if (near_end < near_begin) near_end = near_begin;
    m.sinks.set(t, int32_t(sinks)), m.limit.set(t, int32_t(limit));
    m.near_begin.set(t, int32_t(near_begin)), m.near_end.set(t, int32_t(near_end));
  }

  // -------------------- candidate runs

  // Writes the candidates of the group to w.run, ascending, and returns how many they are: the best of the runs that
  // are complete before the window of its first block (of all, without a causal edge), and all later ones that it may
  // see.
  SB_DEVICE int64_t choose_runs(int last_live) {
    const int64_t group_end = p.is_causal ? candidates_end(slot_of(0) + shift) : row.length;
    const int64_t complete = p.is_causal ? group_end / kLeaf : ceil_div(row.length, kLeaf),
                  kept = candidate_blocks(p.keys);
    int64_t runs = 0;
    if (complete <= kept) {
      runs = list_all(complete);
    } else if (row.length >= kLongRow) {
      const int64_t in_super = kSuper * kLeaf,
                    supers = p.is_causal ? group_end / in_super : ceil_div(row.length, in_super);
      int64_t best = best_runs(p.coarse + row.head * p.coarse_runs * p.run_width, list_all(supers), supers, 2 * kept);
      if (supers * kSuper < complete) {
        if (thread == 0) store(w.run() + best, int32_t(supers));
        sync_block();
        ++best;
      }
      expand_supers(best);
      runs = best_runs(fine(), best * kSuper, complete, kept);
    } else {
      runs = best_runs(fine(), list_all(complete), complete, kept);
    }
    return add_rest(runs, complete, last_live);
  }
  // In place of the superblocks in w.run their leaves.
  SB_DEVICE void expand_supers(int64_t supers) const {
    for (int64_t i = thread; i < supers * kSuper; i += kRouteThreads)
      store(w.next() + i, int32_t(load(w.run() + i / kSuper) * kSuper + i % kSuper));
    sync_block();
    for (int64_t i = thread; i < supers * kSuper; i += kRouteThreads) store(w.run() + i, load(w.next() + i));
    sync_block();
  }
  // Adds the runs from `complete` on that the last block may see.
  SB_DEVICE int64_t add_rest(int64_t runs, int64_t complete, int last_live) const {
    const int64_t limit = ceil_div(int64_t(m.limit.get(last_live)), kLeaf),
                  rest = limit > complete ? limit - complete : 0;
    for (int64_t i = thread; i < rest; i += kRouteThreads) store(w.run() + runs + i, int32_t(complete + i));
    sync_block();
    return runs + rest;
  }
  SB_DEVICE const float* fine() const { return p.fine + row.head * p.fine_runs * p.run_width; }
  SB_DEVICE int64_t list_all(int64_t runs) const {
    for (int64_t i = thread; i < runs; i += kRouteThreads) store(w.run() + i, int32_t(i));
    sync_block();
    return runs;
  }

  // Replaces the `count` runs in w.run by the n best of those before `limit`. A run's score is the largest over the
  // pools, each relative to the pool's own largest; the causal form asks those of the first block only.
  SB_DEVICE int64_t best_runs(const float* level, int64_t count, int64_t limit, int64_t n) {
    const RunColumns at(p);
    const auto row_of = [&](int64_t i) { return level + load(w.run() + i) * p.run_width; };
    const auto is_eligible = [&](int64_t i) { return load(w.run() + i) < limit && load(row_of(i) + at.count) > 0.0f; };
    for (int64_t i = thread; i < count; i += kRouteThreads) {
      store(w.key() + i, kNever);
      if (!is_eligible(i)) continue;
      const float* run = row_of(i);
      for (int g = 0; g < kGroup; ++g) {
        float s = 0, t = 0;
        for (int64_t e = 0; e <= p.head_dim; ++e) s += m.pool.get(g * (p.head_dim + 1) + e) * load(run + e);
        if (p.has_low_rank())
          for (int64_t a = 0; a < p.rank; ++a) t += m.x.get(a * kGroup + g) * load(run + at.y + a);
        store(w.s(g) + i, s), store(w.t(g) + i, t);
      }
      if (p.has_low_rank()) store(w.kappa() + i, load(run + at.kappa));
    }
    const auto each = [&](const auto& visit) {
      for (int64_t i = thread; i < count; i += kRouteThreads)
        if (is_eligible(i)) visit(i);
    };
    int asked = -1;  // the block that a causal group asks
    for (int g = 0; g < kGroup; ++g) {
      if (!m.is_pool.get(g) || (p.is_causal && asked >= 0 && g / p.pools != asked)) continue;
      const bool is_first = asked < 0;
      if (is_first) asked = int(g / p.pools);
      const float top = largest_exponent(g, each);
      float best = 0;
      each([&](int64_t i) {
        const float score = residual(g, i, top);
        store(w.s(g) + i, score);
        best = larger(best, score);
      });
      best = p.has_low_rank() ? m.block.maximum(best) : 0.0f;
      const float inverse = best > 0.0f ? 1.0f / best : 1.0f;
      each([&](int64_t i) {
        const int32_t score = sortable(load(w.s(g) + i) * inverse), before = load(w.key() + i);
        store(w.key() + i, is_first || score > before ? score : before);
      });
    }
    sync_block();
    const int64_t taken = m.block.take_top(w.key(), count, n, w.taken());
    for (int64_t i = thread; i < taken; i += kRouteThreads) store(w.next() + i, load(w.run() + load(w.taken() + i)));
    sync_block();
    for (int64_t i = thread; i < taken; i += kRouteThreads) store(w.run() + i, load(w.next() + i));
    sync_block();
    return taken;
  }

  // -------------------- scores

  template <class Each>
  SB_DEVICE float largest_exponent(int g, const Each& each) const {
    float top = float(kLowestLog);
    each([&](int64_t i) {
      top = larger(top, load(w.s(g) + i));
      if (p.has_low_rank()) top = larger(top, load(w.kappa() + i) + m.rho.get(g));
    });
    return m.block.maximum(top);
  }
  // exp(s) - L over exp(top).
  template <class T, class Kappa>
  SB_DEVICE float difference(int g, float s, const T& t, const Kappa& kappa, float top) const {
    const float e = exp2_of(s - top);
    if (!p.has_low_rank()) return e;
    const float product = t(), value = p.low_rank == LowRank::kQuadratic ? QuadraticKernel::value(product) : product;
    return e - exp2_of(kappa() + (m.rho.get(g) - top)) * value;
  }
  template <class T, class Kappa>
  SB_DEVICE float residual(int g, float s, const T& t, const Kappa& kappa, float top) const {
    if (!p.has_low_rank()) return s - top;
    const float rest = difference(g, s, t, kappa, top);
    return rest < 0.0f ? -rest : rest;
  }
  // The expected squared residual over the pool's queries.
  template <class T, class Kappa, class Apart>
  SB_DEVICE float squared_residual(int g, float s, const T& t, const Kappa& kappa, const Apart& apart,
                                   float top) const {
    const float rest = difference(g, s, t, kappa, top);
    if (!p.has_clusters()) return rest * rest;
    const float e = exp2_of(s - top);
    return rest * rest + e * e * (m.variance.get(g) * apart());
  }
  // The same of what is in global memory.
  SB_DEVICE float residual(int g, int64_t i, float top) const {
    return residual(g, load(w.s(g) + i), [&] { return load(w.t(g) + i); }, [&] { return load(w.kappa() + i); }, top);
  }
  SB_DEVICE float squared_residual(int g, int64_t i, float top) const {
    return squared_residual(
        g, load(w.s(g) + i), [&] { return load(w.t(g) + i); }, [&] { return load(w.kappa() + i); },
        [&] { return load(w.apart() + i); }, top);
  }

  SB_DEVICE int64_t key_at(int64_t i) const { return load(w.run() + i / kLeaf) * int64_t(kLeaf) + i % kLeaf; }

  // The products of all pools with the keys of the candidate runs.
  SB_DEVICE void score_keys(int64_t runs) const {
    const float* representatives = static_cast<const float*>(p.given_representatives) + row.head * p.rank * p.head_dim;
    for (int64_t i = thread; i < runs * kLeaf; i += kRouteThreads) {
      const int64_t key = key_at(i), j = row.first + key;
      if (!row.is_valid(key)) continue;
      const E* k = p.k.at<const E>(b, row.kv, j);
      const int64_t cluster = p.has_clusters() ? routed_cluster(p, row.head, j) : 0;
      float s[kGroup], t[kGroup], square = 0, apart = 0;
      for (int g = 0; g < kGroup; ++g) s[g] = t[g] = 0;
      for (int64_t e = 0; e < p.head_dim; ++e) {
        const float value = float(widened(load(k + e)));
        square += value * value;
        for (int g = 0; g < kGroup; ++g) s[g] += m.pool.get(g * (p.head_dim + 1) + e) * value;
        if (p.has_clusters()) {
          const float distance = value - load(representatives + cluster * p.head_dim + e);
          apart += distance * distance;
        }
      }
      for (int g = 0; g < kGroup; ++g) s[g] += m.pool.get(g * (p.head_dim + 1) + p.head_dim) * square;
      if (p.has_clusters()) {
        for (int g = 0; g < kGroup; ++g) t[g] = m.x.get(cluster * kGroup + g);
      } else if (p.has_low_rank()) {
        const MapRow<float, float> y(p.y_map, b, row.kv, j);
        for (int64_t a = 0; a < p.rank; ++a) {
          const float value = y(a);
          for (int g = 0; g < kGroup; ++g) t[g] += m.x.get(a * kGroup + g) * value;
        }
      }
      for (int g = 0; g < kGroup; ++g) store(w.s(g) + i, s[g]), store(w.t(g) + i, t[g]);
      if (p.has_low_rank()) store(w.kappa() + i, routed_kappa(p, row, j));
      store(w.apart() + i, apart);
    }
    sync_block();
  }

  // -------------------- lists

  SB_DEVICE void write_list(int t, int64_t runs) {
    const int64_t sinks = m.sinks.get(t), near_begin = m.near_begin.get(t), near_end = m.near_end.get(t),
                  limit = m.limit.get(t), units = runs * kLeaf;
    const auto is_eligible = [&](int64_t key) {
      return key >= sinks && key < limit && (key < near_begin || key >= near_end) && row.is_valid(key);
    };
    const auto each = [&](const auto& visit) {
      for (int64_t i = thread; i < units; i += kRouteThreads)
        if (is_eligible(key_at(i))) visit(i);
    };
    for (int64_t i = thread; i < units; i += kRouteThreads) store(w.key() + i, kNever);
    if (p.pools == 1) {
      const float top = largest_exponent(t, each);
      each([&](int64_t i) {
        store(w.key() + i, sortable(p.has_clusters() ? squared_residual(t, i, top) : residual(t, i, top)));
      });
    } else {
      add_pools(t, units, limit, each);
    }
    sync_block();

    const auto is_valid = [&](int64_t key) { return row.is_valid(key); };
    int32_t always = 0;
    for (int64_t key = thread; key < sinks; key += kRouteThreads) always += is_valid(key) ? 1 : 0;
    for (int64_t key = near_begin + thread; key < near_end; key += kRouteThreads) always += is_valid(key) ? 1 : 0;
    always = m.block.sum(always);
    const int64_t taken = m.block.take_top(w.key(), units, keys_of(p, h) - always, w.taken());
    const auto taken_key = [&](int64_t i) { return key_at(load(w.taken() + i)); };

    // Ascending: the sinks, then the window between what was taken before and after it.
    const int64_t list = (b * p.q_heads + h) * p.blocks + first_block + t;
    int32_t* out = p.index + list * p.capacity;
    out += m.block.write_wanted(0, sinks, is_valid, out);
    int32_t before = 0;
    for (int64_t i = thread; i < taken; i += kRouteThreads) before += taken_key(i) < near_begin ? 1 : 0;
    before = m.block.sum(before);
    for (int64_t i = thread; i < before; i += kRouteThreads) store(out + i, int32_t(taken_key(i)));
    out += before;
    out += m.block.write_wanted(near_begin, near_end, is_valid, out);
    for (int64_t i = before + thread; i < taken; i += kRouteThreads) store(out + i - before, int32_t(taken_key(i)));
    if (thread == 0) store(p.count + list, int32_t(taken + always));
    sync_block();
  }

  // The squared residuals of a block's pools, each over the square of the pool's whole weight, summed. Keys before
  // `limit` make up the weight.
  template <class Each>
  SB_DEVICE void add_pools(int t, int64_t units, int64_t limit, const Each& each) {
    const auto seen = [&](const auto& visit) {
      for (int64_t i = thread; i < units; i += kRouteThreads)
        if (key_at(i) < limit && row.is_valid(key_at(i))) visit(i);
    };
    const int first = int(t * p.pools), end = int((t + 1) * p.pools);
    for (int g = first; g < end; ++g) {
      if (!m.is_pool.get(g)) continue;
      const float largest = largest_exponent(g, seen);
      float weight = 0;
      seen([&](int64_t i) { weight += exp2_of(load(w.s(g) + i) - largest); });
      weight = m.block.sum(weight);
      if (thread == 0) m.top.set(g, largest), m.inverse.set(g, weight > 0.0f ? 1.0f / (weight * weight) : 0.0f);
    }
    sync_block();
    each([&](int64_t i) {
      float sum = 0;
      for (int g = first; g < end; ++g)
        if (m.is_pool.get(g)) sum += squared_residual(g, i, m.top.get(g)) * m.inverse.get(g);
      store(w.key() + i, sortable(sum));
    });
  }

  const RoutingParams& p;
  const PooledMemory& m;
  const PooledScratch& w;
  const int b, h;
  const RouteRow row;
  const RowRange range;
  const int first_block;
  const int64_t shift;
  const int thread = thread_index(), lane = lane_index();
};

template <class E>
SB_KERNEL route_pooled(RoutingParams p) {
  const PooledMemory memory(p);
  const PooledScratch scratch(p);
  for_each_task(p.batch * p.q_heads * p.groups, [&](int64_t task) {
    const int64_t head = task / p.groups;
    PooledGroup<E>(p, memory, scratch, head / p.q_heads, head % p.q_heads, task % p.groups).run();
  });
}

}  // namespace sb::cuda

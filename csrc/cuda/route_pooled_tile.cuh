// Pooled routing of tokens of 16 bits on tensor cores: as route_pooled.cuh, but candidates lie in shared memory, their
// products are of matrices, and a warp makes a list by itself, with the scores in its registers.
#pragma once
#include "route_pooled.cuh"
#include "route_tile.cuh"

namespace sb::cuda {

template <class E>
struct PooledTileMemory {
  static constexpr bool kIsHalf = std::is_same_v<E, Half>;
  static SB_HD int64_t begin(const RoutingParams& p) { return ceil_div(PooledMemory::bytes(p), 16) * 16; }
  static SB_HD int64_t operands(const RoutingParams& p) { return (kIsHalf ? 2 : 1) * PoolOperand::bytes(p.head_dim); }
  // With 8 more, pools of one row are in different banks.
  static SB_HD int64_t stride(const RoutingParams& p) { return p.tile_rows * kWarp + 8; }
  static SB_HD int64_t scores(const RoutingParams& p) { return kGroup * stride(p) * int64_t(sizeof(float)); }
  static SB_HD int64_t numbers(const RoutingParams& p) { return begin(p) + operands(p); }  // where they begin
  static SB_HD int64_t names(const RoutingParams& p) { return numbers(p) + 3 * kGroup * int64_t(sizeof(float)); }
  static SB_HD int64_t of_keys_alone(const RoutingParams& p) { return stride(p) * int64_t(sizeof(float)); }
  static SB_HD int64_t bytes(const RoutingParams& p) {
    return names(p) +
           (p.has_clusters()   ? 3
            : p.has_low_rank() ? 2
                               : 1) *
               of_keys_alone(p) +
           (p.has_low_rank() ? 2 : 1) * scores(p);
  }
  PoolOperand of_parts, of_keys;  // for rows in parts of bfloat16, and for keys: in float16 pools times `scale`
  Shared<float> scale, back;      // by pool: that power of two, and its inverse
  Shared<int32_t> found;          // how many runs were
  Shared<int32_t> named;          // the keys that are scored, -1 for those that are ignored
  Shared<float> kappa, apart;     // of those keys
  Shared<float> s, t;             // (kGroup, stride): exponents, and in their place scores; x.y
  Shared<int32_t> key;            // sortable scores in place of s
  SB_DEVICE explicit PooledTileMemory(const RoutingParams& p)
      : of_parts(begin(p)),
        of_keys(begin(p) + (kIsHalf ? PoolOperand::bytes(p.head_dim) : 0)),
        scale(shared_array<float>(numbers(p))),
        back(shared_array<float>(numbers(p) + kGroup * int64_t(sizeof(float)))),
        found(shared_array<int32_t>(numbers(p) + 2 * kGroup * int64_t(sizeof(float)))),
        named(shared_array<int32_t>(names(p))),
        kappa(shared_array<float>(names(p) + of_keys_alone(p))),
        apart(shared_array<float>(names(p) + 2 * of_keys_alone(p))),
        s(shared_array<float>(bytes(p) - (p.has_low_rank() ? 2 : 1) * scores(p))),
        t(shared_array<float>(bytes(p) - scores(p))),
        key(shared_array<int32_t>(bytes(p) - (p.has_low_rank() ? 2 : 1) * scores(p))) {}
};

template <class E, int kRows>
class PooledTiles : public PooledGroup<E> {
  using Base = PooledGroup<E>;
  using Base::b, Base::row, Base::m, Base::p, Base::w, Base::lane, Base::is_valid_query;

 public:
  SB_DEVICE PooledTiles(const RoutingParams& p, const PooledMemory& memory, const PooledTileMemory<E>& tile,
                        const PooledScratch& scratch, int64_t b, int64_t h, int64_t group)
      : Base(p, memory, scratch, b, h, group), tile(tile) {}

  SB_DEVICE void run() {
    this->make_pool(warp);
    find_scale(warp);
    sync_block();
    tile.of_parts.template write<Bfloat16>(p.head_dim, [&](int g, int64_t e) { return pool_at(g, e); });
    if (kIsHalf)
      tile.of_keys.template write<E>(p.head_dim, [&](int g, int64_t e) { return pool_at(g, e) * tile.scale.get(g); });
    if (this->thread < this->blocks_here()) this->place_window(this->thread);
    sync_block();
    int first_live = -1, last_live = -1;
    this->find_live(first_live, last_live);
    if (first_live >= 0) {
      if (p.has_clusters()) weigh_clusters_together();
      const auto runs = int(choose_runs(last_live));
      score_keys(runs);
      weigh(warp, runs);
      sync_block();
      if (warp < this->blocks_here() && m.is_block.get(warp)) write_list(warp, runs);
    }
    sync_block();
  }

 private:
  static constexpr bool kIsHalf = PooledTileMemory<E>::kIsHalf;

  SB_DEVICE int stride() const { return int(PooledTileMemory<E>::stride(p)); }
  // Of a row in parts, in kCopyBytes.
  SB_DEVICE uint32_t units_of_parts() const { return uint32_t(kRouteParts * p.head_dim / PoolOperand::kUnit); }
  SB_DEVICE int pools() const { return int(p.pools); }
  SB_DEVICE float pool_at(int g, int64_t e) const {
    return e < p.head_dim ? m.pool.get(g * (p.head_dim + 1) + e) : 0.0f;
  }
  // By a warp: the power of two for float16.
  SB_DEVICE void find_scale(int g) const {
    if (!kIsHalf) return;
    float most = 0;
    for (int64_t e = lane; e < p.head_dim; e += kWarp) {
      const float value = pool_at(g, e);
      most = larger(most, value < 0.0f ? -value : value);
    }
    float back = 1;
    const float scale = scale_to_half(warp_max(most), back);
    if (lane == 0) tile.scale.set(g, scale), tile.back.set(g, back);
  }

  SB_DEVICE void weigh_clusters_together() const {
    for (int first = warp * kWarp; first < p.rank; first += kRouteWarps * kWarp) {
      float product[4];
      tile.of_parts.template multiply<kRouteParts, Bfloat16>(
          int(p.head_dim), p.cluster_parts + row.head * p.rank * kRouteParts * p.head_dim,
          [&](int i) { return first + i < p.rank ? uint32_t(first + i) * units_of_parts() : PoolOperand::kNoRow; },
          product);
      SB_UNROLL
      for (int n = 0; n < 4; ++n)
        tile.s.set(PoolOperand::pool() * stride() + first + 8 * n + PoolOperand::kept_row(), product[n]);
    }
    sync_block();
    this->weigh_clusters(warp, [&](int64_t c) { return tile.s.get(warp * stride() + c); });
    sync_block();
  }

  // x.y of one unit with all pools: put(pool, x.y).
  template <class Y, class Put>
  SB_DEVICE void multiply_maps(const Y& y, const Put& put) const {
    float t[kGroup] = {};
    for (int a = 0; a < int(p.rank); ++a) {
      const FourWords x = x_of(a);
      const float value = y(a);
      SB_UNROLL
      for (int g = 0; g < kGroup; ++g) t[g] += same_bits<float>(x.at[g]) * value;
    }
    SB_UNROLL
    for (int g = 0; g < kGroup; ++g) put(g, t[g]);
  }
  // Of four pools.
  SB_DEVICE FourWords x_of(int64_t a) const { return shared_array<FourWords>(PooledMemory::x_at(p)).get(a); }

  // As Base::choose_runs.
  SB_DEVICE int64_t choose_runs(int last_live) const {
    const int64_t group_end = p.is_causal ? this->candidates_end(this->slot_of(0) + this->shift) : row.length;
    const int64_t complete = p.is_causal ? group_end / kLeaf : ceil_div(row.length, kLeaf),
                  kept = candidate_blocks(p.keys), in_super = kSuper * kLeaf,
                  supers = p.is_causal ? group_end / in_super : ceil_div(row.length, in_super);
    const bool is_searched = complete > kept;
    int level = row.length >= kLongRow ? 1 : 0;
    int64_t runs = this->list_all(is_searched && level ? supers : complete);
    SB_NO_UNROLL
    for (; is_searched && level >= 0; --level) {
      runs = best_of(level, runs, level ? supers : complete, level ? 2 * kept : kept);
      if (level == 0) continue;
      if (supers * kSuper < complete) {
        if (this->thread == 0) store(w.run() + runs, int32_t(supers));
        sync_block();
        ++runs;
      }
      this->expand_supers(runs);
      runs *= kSuper;
    }
    return this->add_rest(runs, complete, last_live);
  }

  // As Base::best_runs.
  SB_DEVICE int64_t best_of(int level, int64_t count, int64_t limit, int64_t n) const {
    score_runs(level, int(count), int(limit));
    const int asked = asked_block();
    if (is_asked(warp, asked)) compare_runs(warp, level, int(count));
    sync_block();
    for (int unit = this->thread; unit < count; unit += kRouteThreads) {
      int32_t key = kNever;
      bool is_first = load(w.next() + unit) >= 0;
      for (int g = 0; g < kGroup && load(w.next() + unit) >= 0; ++g) {
        if (!is_asked(g, asked)) continue;
        const int32_t of_pool = sortable(load(w.s(g) + unit));
        if (is_first || of_pool > key) key = of_pool;
        is_first = false;
      }
      store(w.key() + unit, key);
    }
    sync_block();
    if (warp == 0) {
      const int32_t found = take_in_turn<kRows>(w.key(), w.run(), int(count), n, w.taken(), w.next());
      if (lane == 0) tile.found.set(0, found);
    }
    sync_block();
    return tile.found.get(0);
  }
  // The causal form asks the pools of the first block that has any.
  SB_DEVICE int asked_block() const {
    int asked = 0;
    while (p.is_causal && !m.is_block.get(asked)) ++asked;
    return asked;
  }
  SB_DEVICE bool is_asked(int g, int asked) const {
    return m.is_pool.get(g) != 0 && (!p.is_causal || g / pools() == asked);
  }

  // Products of the pools with the runs in w.run, in global memory; w.next gets those before `limit` that have
  // keys, -1 in place of the others.
  SB_DEVICE void score_runs(int level, int count, int limit) const {
    const RowNumbers numbers = RowNumbers::of_runs(p, level, row.head);
    const int pool = PoolOperand::pool();
    const float of_square = pool_square(pool);
    SB_NO_UNROLL
    for (int first = warp * kWarp; first < count; first += kRouteWarps * kWarp) {
      const int unit = first + lane;
      int own = unit < count ? load(w.run() + unit) : -1;
      if (own >= limit || (own >= 0 && numbers.count(own) == 0.0f)) own = -1;
      if (unit < count) store(w.next() + unit, own);
      float product[4];
      tile.of_parts.template multiply<kRouteParts, Bfloat16>(
          int(p.head_dim),
          p.run_parts[level] + row.head * (level ? p.coarse_runs : p.fine_runs) * kRouteParts * p.head_dim,
          [&](int i) {
            const int run = shuffle_from(own, i);
            return run >= 0 ? uint32_t(run) * units_of_parts() : PoolOperand::kNoRow;
          },
          product);
      SB_UNROLL
      for (int n = 0; n < 4; ++n) {
        const int at = 8 * n + PoolOperand::kept_row(), run = shuffle_from(own, at);
        if (run >= 0) store(w.s(pool) + first + at, product[n] + of_square * numbers.get(run, RowNumbers::kSquare));
      }
      if (p.has_low_rank() && own >= 0)
        multiply_maps([&](int a) { return numbers.get(own, RowNumbers::kRest + a); },
                      [&](int g, float t) { store(w.t(g) + unit, t); });
    }
    sync_block();
  }

  // By a warp: in place of the exponents of pool g the scores of runs for it, relative to the largest.
  SB_DEVICE void compare_runs(int g, int level, int count) const {
    const RowNumbers numbers = RowNumbers::of_runs(p, level, row.head);
    float* const s = w.s(g);
    const auto each = [&](const auto& visit) {
      SB_NO_UNROLL
      for (int unit = lane; unit < count; unit += kWarp) {
        const int run = load(w.next() + unit);
        if (run >= 0) visit(unit, run);
      }
    };
    const float top = largest_exponent(
        g, [&](int unit) { return load(s + unit); },
        [&](int, int run) { return numbers.get(uint32_t(run), RowNumbers::kKappa); }, each);
    float best = 0;
    each([&](int unit, int run) {
      const float score = this->residual(
          g, load(s + unit), [&] { return load(w.t(g) + unit); }, [&] { return numbers.get(run, RowNumbers::kKappa); },
          top);
      store(s + unit, score);
      best = larger(best, score);
    });
    best = p.has_low_rank() ? warp_max(best) : 0.0f;
    const float inverse = best > 0.0f ? 1.0f / best : 1.0f;
    each([&](int unit, int) { store(s + unit, load(s + unit) * inverse); });
  }

  // What goes with |k|^2.
  SB_DEVICE float pool_square(int g) const { return m.pool.get(g * (p.head_dim + 1) + p.head_dim); }

  // By a warp, of what `each` visits: units, and what they name, which s and kappa take.
  template <class S, class Kappa, class Each>
  SB_DEVICE float largest_exponent(int g, const S& s, const Kappa& kappa, const Each& each) const {
    const float rho = p.has_low_rank() ? m.rho.get(g) : 0.0f;
    float top = float(kLowestLog);
    each([&](int unit, int named) {
      top = larger(top, s(unit));
      if (p.has_low_rank()) top = larger(top, kappa(unit, named) + rho);
    });
    return warp_max(top);
  }

  // The products of all pools with the keys of the candidate runs; a warp takes a run.
  SB_DEVICE void score_keys(int runs) const {
    const RowNumbers numbers = RowNumbers::of_keys(p, row.head);
    const int pool = PoolOperand::pool();
    const float of_square = pool_square(pool), back = kIsHalf ? tile.back.get(pool) : 1.0f;
    SB_NO_UNROLL
    for (int i = warp; i < runs; i += kRouteWarps) {
      const int leaf = load(w.run() + i), first = leaf * kLeaf;
      const float* const of_leaf = numbers.rows(uint32_t(leaf));
      const bool is_valid = row.is_valid(first + lane);
      const uint32_t valid = ballot(is_valid);
      tile.named.set(i * kWarp + lane, is_valid ? first + lane : -1);
      float product[4];
      tile.of_keys.template multiply<1, E>(
          int(p.head_dim), p.k.template at<const E>(b, row.kv, row.first + first),
          [&](int i) { return valid >> i & 1 ? uint32_t(i * p.k.row / PoolOperand::kUnit) : PoolOperand::kNoRow; },
          product);
      SB_UNROLL
      for (int n = 0; n < 4; ++n) {
        const int at = 8 * n + PoolOperand::kept_row();
        const float s = kIsHalf ? product[n] * back : product[n];
        tile.s.set(pool * stride() + i * kWarp + at, s + of_square * load(of_leaf + RowNumbers::kSquare * kWarp + at));
      }
      if (p.has_low_rank()) tile.kappa.set(i * kWarp + lane, load(of_leaf + RowNumbers::kKappa * kWarp + lane));
      if (p.has_clusters()) {
        tile.apart.set(i * kWarp + lane, load(of_leaf + RowNumbers::kApart * kWarp + lane));
        const int64_t cluster = is_valid ? routed_cluster(p, row.head, row.first + first + lane) : 0;
        const FourWords x = x_of(cluster);
        SB_UNROLL
        for (int g = 0; g < kGroup; ++g) tile.t.set(g * stride() + i * kWarp + lane, same_bits<float>(x.at[g]));
      } else if (p.has_low_rank()) {
        multiply_maps([&](int a) { return load(of_leaf + (RowNumbers::kRest + a) * kWarp + lane); },
                      [&](int g, float t) { tile.t.set(g * stride() + i * kWarp + lane, t); });
      }
    }
    sync_block();
  }

  // -------------------- lists

  // What a list may choose of the candidates: keys [sinks, limit) outside of its window.
  struct Choice {
    int sinks, near_begin, near_end, limit;
    SB_DEVICE Choice(const PooledMemory& m, int t)
        : sinks(m.sinks.get(t)), near_begin(m.near_begin.get(t)), near_end(m.near_end.get(t)), limit(m.limit.get(t)) {}
    SB_DEVICE bool is_eligible(int key) const {
      return key >= sinks && key < limit && (key < near_begin || key >= near_end);
    }
  };

  // By a warp: in place of the exponents of pool g its scores for its block's list, ready to be compared. Of several
  // pools they are parts, each over the square of the pool's whole weight, which the keys before `limit` make up.
  SB_DEVICE void weigh(int g, int runs) const {
    if (!m.is_pool.get(g)) return;
    const Choice choice(m, g / pools());
    const auto each = [&](bool is_chosen, const auto& visit) {
      SB_UNROLL_BY_2
      for (int unit = lane; unit < runs * kWarp; unit += kWarp) {
        const int key = tile.named.get(unit);
        if (key >= 0 && (is_chosen ? choice.is_eligible(key) : key < choice.limit)) visit(unit, key);
      }
    };
    const bool is_alone = pools() == 1;
    const auto s_of = [&](int unit) { return tile.s.get(g * stride() + unit); };
    const auto kappa_of = [&](int unit, int) { return tile.kappa.get(unit); };
    const float top = largest_exponent(g, s_of, kappa_of, [&](const auto& visit) { each(is_alone, visit); });
    float inverse = 1;
    if (!is_alone) {
      float weight = 0;
      each(false, [&](int unit, int) { weight += exp2_of(s_of(unit) - top); });
      weight = warp_sum(weight);
      inverse = weight > 0.0f ? 1.0f / (weight * weight) : 0.0f;
    }
    SB_UNROLL_BY_2
    for (int unit = lane; unit < runs * kWarp; unit += kWarp) {
      const int named = tile.named.get(unit), at = g * stride() + unit;
      const bool is_eligible = named >= 0 && choice.is_eligible(named);
      float score = 0;
      if (is_eligible) {
        const auto t = [&] { return tile.t.get(at); };
        const auto kappa = [&] { return tile.kappa.get(unit); };
        const auto apart = [&] { return tile.apart.get(unit); };
        score = is_alone && !p.has_clusters()
                    ? this->residual(g, tile.s.get(at), t, kappa, top)
                    : this->squared_residual(g, tile.s.get(at), t, kappa, apart, top) * inverse;
      }
      if (is_alone)
        tile.key.set(at, is_eligible ? as_key(score) : kNever);
      else
        tile.s.set(at, score);
    }
  }
  // Zeros of either sign are equal.
  static SB_DEVICE int32_t as_key(float score) { return sortable(score + 0.0f); }

  // By a warp.
  SB_DEVICE void write_list(int t, int runs) const {
    const Choice choice(m, t);
    const int pool = t * pools();  // whose scores the sums of several replace
    for (int unit = lane; pools() > 1 && unit < runs * kWarp; unit += kWarp) {
      const int named = tile.named.get(unit);
      float score = 0;
      for (int g = pool; g < pool + pools(); ++g)
        if (m.is_pool.get(g)) score += tile.s.get(g * stride() + unit);
      tile.key.set(pool * stride() + unit, named >= 0 && choice.is_eligible(named) ? as_key(score) : kNever);
    }
    int32_t key[kRows];
    SB_UNROLL
    for (int i = 0; i < kRows; ++i) key[i] = i < runs ? tile.key.get(pool * stride() + i * kWarp + lane) : kNever;
    const int sinks = for_each_valid(0, choice.sinks, [](int, int) {}),
              near = for_each_valid(choice.near_begin, choice.near_end, [](int, int) {});
    // Ascending: the sinks, then the window between what was taken before and after it.
    const int64_t list = (b * p.q_heads + this->h) * p.blocks + this->first_block + t;
    int32_t* const out = p.index + list * p.capacity;
    int before = 0;
    const int taken = take_top_of_warp(key, runs, keys_of(p, this->h) - sinks - near, [&](int32_t at, int i, int32_t) {
      const int named = tile.named.get(i * kWarp + lane);
      const bool is_before = named < choice.near_begin;
      before += is_before ? 1 : 0;
      store(out + sinks + at + (is_before ? 0 : near), named);
    });
    before = warp_total(before);
    for_each_valid(0, choice.sinks, [&](int at, int key) { store(out + at, key); });
    for_each_valid(choice.near_begin, choice.near_end, [&](int at, int key) { store(out + sinks + before + at, key); });
    if (lane == 0) store(p.count + list, int32_t(sinks + near + taken));
  }
  // By a warp: calls visit(order, key) for the keys in [begin, end) that are not ignored, and returns their number.
  template <class Visit>
  SB_DEVICE int for_each_valid(int begin, int end, const Visit& visit) const {
    int found = 0;
    for (int first = begin; first < end; first += kWarp) {
      const int key = first + lane;
      const bool is_valid = key < end && row.is_valid(key);
      const uint32_t valid = ballot(is_valid);
      if (is_valid) visit(found + bits_set(valid & ((uint32_t(1) << lane) - 1)), key);
      found += bits_set(valid);
    }
    return found;
  }

  const PooledTileMemory<E>& tile;
  const int warp = warp_index();
};

template <class E, int kRows>
SB_KERNEL SB_THREADS_AT_MOST(kRouteThreads) route_pooled_tile(RoutingParams p) {
  const PooledMemory memory(p);
  const PooledTileMemory<E> tile(p);
  const PooledScratch scratch(p);
  for_each_task(p.batch * p.q_heads * p.groups, [&](int64_t task) {
    const int64_t head = task / p.groups;
    PooledTiles<E, kRows>(p, memory, tile, scratch, head / p.q_heads, head % p.q_heads, task % p.groups).run();
  });
}

}  // namespace sb::cuda

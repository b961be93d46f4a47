// Backward pass of queries on tensor cores: a warp computes a tile of 16 query slots, for bfloat16, float16
// and float32 (docs/gpu.md). It goes through its keys twice: for the record of every slot, which says what a weight is
// and what the mean of dO.v is, and for gradients. The same sums as those of attention_forward.cuh and
// attention_backward_queries.cuh, whose place it takes. Slots share a list of keys and see all keys, or their lists and
// edges are ragged, as in the forward pass: then a causal tile reads the state of its first slot.
//
// Stages of keys come as in the forward pass. Gradients of scores meet keys in bfloat16, or in two parts of float16;
// those of x.y meet coordinates in two parts of bfloat16. dO.v, exponents and the state are exact to float32. All
// products of float32 are as exact as that, and a walk between the two finds what rounding left in records.
#pragma once
#include "attention_backward_tile_state.cuh"
#include "attention_tile_stages.cuh"

namespace sb::cuda {

template <class E, int D, LowRank kKind, bool kIsRagged>
class BackwardTile : BackwardTileState<E, D, kKind> {
  typedef BackwardTileState<E, D, kKind> Base;
  typedef typename Base::Layout Layout;
  typedef typename Base::Sums Sums;
  typedef typename Base::Slot Slot;
  using Base::kappa_ref, Base::sums, Base::slot, Base::log_state, Base::correction, Base::squares_of_state;
  using Base::kHasQuadratic, Base::kHasClusters, Base::kHasLowRank, Base::kIsHalf, Base::kIsWide;
  // Of SB_UNROLL_COPIES and SB_UNROLL_STEPS: wide ragged tiles need registers, and those of float32 and float16 with a
  // kernel.
  static constexpr int kCopiesAtOnce = kIsRagged && D > 64 ? 1 : 2,
                       kStepsAtOnce = kHasQuadratic && (kIsWide || (kIsHalf && D <= 64)) ? 1
                                      : kIsRagged && D > 64                              ? 2
                                                                                         : D / 16;
  using Base::kChunks, Base::kSteps, Base::kKeyTiles;
  typedef typename Base::Rows Rows;
  using Base::p, Base::base, Base::b, Base::h, Base::kv, Base::head, Base::first_slot, Base::lane, Base::g, Base::t;
  using Base::queries, Base::x, Base::d_x, Base::of_hz, Base::left_x, Base::first_key, Base::state_slot;
  using Base::row_of, Base::raise;
  using Base::width, Base::exponents, Base::d_exponents, Base::pairs;

 public:
  SB_DEVICE BackwardTile(const BackwardTileParams& p, int64_t base, int64_t b, int64_t h, int64_t first_slot)
      : Base(p, base, b, h, first_slot) {}

  SB_DEVICE void run() {
    const RowRange range = load(p.rows + b);
    if (!find_queries(p, range, b, h, first_slot, queries)) return;
    first_key = range.k_first;
    if (kIsRagged) edges = TileEdges(p, range, first_slot);
    state_slot = kIsRagged ? edges.state_slot : int32_t(p.slots - 1);
    has_query = queries.get(lane % kTile) >= 0;
    this->read_queries();
    this->begin_sums();
    SB_UNROLL
    for (int r = 0; r < 2; ++r) listed_before[r] = 0;
    if (kHasQuadratic && (!kIsRagged || kappa_ref > float(kNoKeyLog))) this->add_state_of_features();
    if constexpr (kHasClusters) this->add_state_of_clusters();
    go_through<false>(range);
    if (!find_slots()) return;
    if (!kIsWide) write_records();
    if constexpr (kHasClusters && !kIsWide) this->weigh_state_of_clusters();  // else once slots are balanced
    do {
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) SB_UNROLL
      for (int i = 0; i < 4; ++i) dq[c][i] = 0;
      SB_UNROLL
      for (int c = 0; c < 2; ++c) SB_UNROLL
      for (int i = 0; i < 4; ++i) dx[c][i] = 0;
      go_through<true>(range);
    } while (has_to_be_balanced() || has_to_be_careful());
    finish();
  }

 private:
  // -------------------- listed keys

  // This lane's key of a stage is that at lane % kStage.
  struct Fetched : StageKeys {
    int32_t cluster = 0;
    float log = 0;  // log scale of what a state holds of the key; relative to that of its cluster, if it has one
  };

  SB_DEVICE void fetch(Fetched& of_lane, int buffer) {
    if (kHasLowRank && of_lane.key >= 0) {
      of_lane.log = load(p.key_log + head * p.k_tokens + first_key + of_lane.key);
      if (kHasClusters) of_lane.cluster = int32_t(cluster_of(p, head, first_key + of_lane.key));
    }
    const int64_t to = stage(buffer);
    SB_UNROLL_COPIES
    for (int j = 0; j < kStage * Rows::kRowChunks / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / Rows::kRowChunks, chunk = i % Rows::kRowChunks,
                column = chunk * Rows::kNumbers;
      const int32_t key = shuffle_from(of_lane.key, row);
      const int64_t at = first_key + (key < 0 ? 0 : key);
      const bool in_key = key >= 0 && column < p.head_dim, in_value = key >= 0 && column < p.value_pad;
      copy_async(to + Rows::place(row, chunk), p.k.template at<const E>(b, kv, at) + (in_key ? column : 0), in_key);
      copy_async(to + Layout::kMatrix + Rows::place(row, chunk),
                 p.v.template at<const E>(b, kv, at) + (in_value ? column : 0), in_value);
    }
    if (kHasQuadratic) SB_UNROLL
    for (int j = 0; j < kStage * 4 / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / 4, chunk = i % 4;
      const int32_t key = shuffle_from(of_lane.key, row);
      const int64_t of_key = head * p.k_tokens + first_key + (key < 0 ? 0 : key);
      const void* from = nullptr;
      if constexpr (kIsWide)
        from = p.key_rows + of_key * 16 + chunk * 4;
      else
        from = p.key_coordinates + of_key * 32 + chunk * 8;
      copy_async(to + 2 * Layout::kMatrix + CoordinateRows<E>::place(row, chunk), from, key >= 0);
    }
  }
  SB_DEVICE int64_t stage(int buffer) const { return base + Layout::kStages + buffer * Layout::kStageBytes; }

  template <bool kForGradients>
  SB_DEVICE void go_through(const RowRange& range) {
    if constexpr (kIsRagged) {
      TileRows rows(p, edges, range, b, h, first_slot, has_query);
      go_through_rows<kKind>(rows, [&](auto is_behind, const auto& next)
                                       SB_INLINE_LAMBDA { add_stages<kForGradients, is_behind.value>(next); });
    } else {
      StagesOfList list(p, range, b, h, first_slot);
      add_stages<kForGradients, false>([&](StageKeys& keys) { return list.next(keys); });
    }
  }

  // `kIsBehind`: keys behind the tile's state.
  template <bool kForGradients, bool kIsBehind, class Next>
  SB_DEVICE void add_stages(const Next& next_stage) {
    for_each_stage<Fetched>(
        next_stage, [&](Fetched& of_lane, int buffer) SB_INLINE_LAMBDA { fetch(of_lane, buffer); },
        [&](const Fetched& of_lane, int buffer)
            SB_INLINE_LAMBDA { add_stage<kForGradients, kIsBehind>(of_lane, stage(buffer)); });
  }

  template <bool kForGradients, bool kIsBehind>
  SB_DEVICE void add_stage(const Fetched& of_lane, int64_t from) {
    const uint32_t valid = ballot(of_lane.key >= 0);  // of the keys twice
    // Of rows g and g + 8: keys that they list, and keys behind the state that they see and do not list.
    uint32_t listed[2], others[2];
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      listed[r] = kIsRagged ? valid & shuffle_from(of_lane.pattern, row_of(r)) : valid, others[r] = 0;
      if (kIsBehind && kHasQuadratic) others[r] = valid & edges.seen_by(row_of(r), of_lane.begin) & ~listed[r];
    }
    float score[kKeyTiles][4], value[kKeyTiles][4], root[kKeyTiles][4];  // q.k; dO.v; 1 + x.y / 2
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) score[n][i] = value[n][i] = root[n][i] = 0;
    if constexpr (kIsWide) {
      multiply_rows<true, D, kStepsAtOnce>(base, int(from), p.head_steps, score);
      multiply_rows<true, D, kStepsAtOnce>(base + int(Layout::kGradients), int(from + Layout::kMatrix), p.value_steps,
                                           value);
    } else {
      SB_UNROLL_STEPS
      for (int k = 0; k < kSteps; ++k) {
        const int64_t place = swizzled<2 * D>(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
        uint32_t rows[4], keys[4];
        if (k < p.head_steps) {
          load_left<2 * D>(base, k, rows), load_matrices(from + place, keys);
          multiply_add(score[0], rows, keys[0], keys[1], E{});
          multiply_add(score[1], rows, keys[2], keys[3], E{});
        }
        if (k < p.value_steps) {
          load_left<2 * D>(base + Layout::kGradients, k, rows), load_matrices(from + Layout::kMatrix + place, keys);
          multiply_add(value[0], rows, keys[0], keys[1], E{});
          multiply_add(value[1], rows, keys[2], keys[3], E{});
        }
      }
    }
    if (kHasQuadratic) left_x.multiply(base + int(Layout::kLeft), int(from + 2 * Layout::kMatrix), root);

    const float scale = float(p.scale * kLog2e);
    // What the state holds of a key, or behind it the log of that.
    const float own_share = !kHasLowRank ? 0.0f : kIsBehind ? of_lane.log : exp2_of(of_lane.log - kappa_ref);
    if constexpr (kForGradients) {
      if (kIsWide && !is_balanced)
        return add_to_balance<kIsBehind>(of_lane, listed, others, own_share, score, value, root);
      float d_product[kKeyTiles][4] = {};  // of x.y, or of the exponent of a cluster
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + 2 * t + i;
        const float share = kHasLowRank ? shuffle_from(own_share, column) : 0.0f;
        const int32_t cluster = kHasClusters ? shuffle_from(of_lane.cluster, column) : 0;
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          const Slot& of = slot[r];
          const int at = 2 * r + i;
          const bool is_listed = listed[r] >> column & 1;
          const float gradient = of.gradient(value[n][at]);
          float& ds = score[n][at];
          ds = is_listed ? exp2_of(ds * scale - of.log) * of.inverse * gradient : 0.0f;
          if (kIsHalf) ds *= of.scale;
          if (kHasQuadratic && !kIsBehind)
            d_product[n][at] = is_listed ? -(of.state_weight * share) * root[n][at] * gradient : 0;
          if (kHasQuadratic && kIsBehind)
            d_product[n][at] = others[r] >> column & 1
                                   ? exp2_of((rho_of(r) - of.log) + share) * of.inverse * root[n][at] * gradient
                                   : 0;
          if (kHasClusters)
            d_product[n][at] =
                is_listed ? -(share * exp2_of(exponent_of(row_of(r), cluster) - of.log) * of.inverse) * gradient : 0;
        }
      }
      if (kIsRagged && is_careful) clear_what_is_no_number(from);
      if constexpr (kIsWide) {
        add_product_with_rows<D>(score, int(from), p.head_dim, dq);
        if (kHasQuadratic) add_product_with_coordinates(d_product, int(from + 2 * Layout::kMatrix), dx);
      } else {
        add_products_in_16_bits(score, d_product, from);
      }
      // Sums in shared memory are those of the first walk.
      if (kHasClusters && !is_careful) add_to_clusters(of_lane, valid, d_product);
    } else {
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (!kIsBehind) listed_before[r] += bits_set(listed[r] & ((1u << kStage) - 1));
        Sums& of = sums[r];
        float to = of.top;
        SB_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + 2 * t + i;
          float& of_pair = score[n][2 * r + i];
          of_pair = listed[r] >> column & 1 ? of_pair * scale : float(kLowestLog);
          if (kIsBehind && kHasQuadratic) {
            const float of_others = rho_of(r) + shuffle_from(own_share, column);
            if (others[r] >> column & 1) of_pair = of_others;
          }
          to = larger(to, of_pair);
        }
        raise(of, to);
      }
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + 2 * t + i;
        const float share = kHasLowRank && !kIsBehind ? shuffle_from(own_share, column) : 0.0f;
        const int32_t cluster = kHasClusters ? shuffle_from(of_lane.cluster, column) : 0;
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          Sums& of = sums[r];
          const bool is_listed = listed[r] >> column & 1, is_other = others[r] >> column & 1,
                     is_seen = is_listed || is_other;
          // Of a key that a slot does not see, nothing counts, be it no number.
          const float of_value = !kIsRagged || is_seen ? value[n][2 * r + i] : 0.0f, of_root = root[n][2 * r + i];
          float weight = is_seen ? exp2_of(score[n][2 * r + i] - of.top) : 0.0f;
          if (kIsBehind && kHasQuadratic && is_other) weight *= of_root * of_root;
          of.exact += weight, of.exact_value += weight * of_value;
          if (kIsHalf) of.largest = larger(of.largest, of_value < 0 ? -of_value : of_value);
          float held = 0;
          if (kHasQuadratic && !kIsBehind) held = is_listed ? share * of_root * of_root : 0.0f;
          if (kHasClusters) held = is_listed ? share * exp2_of(exponent_of(row_of(r), cluster) - of.top) : 0.0f;
          if (kHasLowRank && !kIsBehind) of.removed += held, of.removed_value += held * of_value;
        }
      }
    }
  }

  // Gradients of scores times the stage's keys, and those of x.y times their coordinates.
  SB_DEVICE void add_products_in_16_bits(const float (&ds)[kKeyTiles][4], const float (&d_product)[kKeyTiles][4],
                                         int64_t from) {
    uint32_t d_score[4], d_rest[4], d_high[4], d_low[4];
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t parts[2];
      split(ds[n][2 * r], ds[n][2 * r + 1], parts, E{});
      d_score[2 * n + r] = parts[0], d_rest[2 * n + r] = parts[1];
      if (kHasQuadratic) {
        split(d_product[n][2 * r], d_product[n][2 * r + 1], parts, Bfloat16{});
        d_high[2 * n + r] = parts[0], d_low[2 * n + r] = parts[1];
      }
    }
    SB_UNROLL
    for (int c = 0; c < kChunks; c += 2) {
      if (c * 8 >= p.head_dim) continue;
      uint32_t keys[4];
      load_transposed(from + swizzled<2 * D>(lane % 16, c + lane / 16), keys);
      multiply_add(dq[c], d_rest, keys[0], keys[1], E{});
      multiply_add(dq[c + 1], d_rest, keys[2], keys[3], E{});
      multiply_add(dq[c], d_score, keys[0], keys[1], E{});
      multiply_add(dq[c + 1], d_score, keys[2], keys[3], E{});
    }
    if (!kHasQuadratic) return;
    uint32_t high[4], low[4];
    const int64_t coordinates = from + 2 * Layout::kMatrix;
    load_transposed(coordinates + swizzled<64>(lane % 16, lane / 16), high);
    load_transposed(coordinates + swizzled<64>(lane % 16, 2 + lane / 16), low);
    SB_UNROLL
    for (int c = 0; c < 2; ++c) {
      multiply_add(dx[c], d_low, high[2 * c], high[2 * c + 1], Bfloat16{});
      multiply_add(dx[c], d_high, low[2 * c], low[2 * c + 1], Bfloat16{});
      multiply_add(dx[c], d_high, high[2 * c], high[2 * c + 1], Bfloat16{});
    }
  }

  // Of a stage, weights and their moments of dO.v less its mean.
  template <bool kIsBehind>
  SB_DEVICE void add_to_balance(const Fetched& of_lane, const uint32_t (&listed)[2], const uint32_t (&others)[2],
                                float own_share, const float (&score)[kKeyTiles][4], const float (&value)[kKeyTiles][4],
                                const float (&root)[kKeyTiles][4]) {
    const float scale = float(p.scale * kLog2e);
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      const float share = kHasLowRank ? shuffle_from(own_share, column) : 0.0f;
      const int32_t cluster = kHasClusters ? shuffle_from(of_lane.cluster, column) : 0;
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        const Slot& of = slot[r];
        const int at = 2 * r + i;
        const bool is_listed = listed[r] >> column & 1, is_other = others[r] >> column & 1;
        float weight = is_listed ? exp2_of(score[n][at] * scale - of.log) * of.inverse : 0.0f;
        if (kHasQuadratic && !kIsBehind && is_listed) weight -= of.state_weight * share * root[n][at] * root[n][at];
        if (kHasClusters && is_listed) weight -= share * exp2_of(exponent_of(row_of(r), cluster) - of.log) * of.inverse;
        if (kHasQuadratic && kIsBehind && is_other)
          weight = exp2_of((rho_of(r) - of.log) + share) * of.inverse * root[n][at] * root[n][at];
        // Of a key that a slot does not see, nothing counts, be it no number.
        if (is_listed || is_other) weights[r] += weight, moments[r] += weight * (value[n][at] - of.shift);
      }
    }
  }

  // The log scale of a slot's query.
  SB_DEVICE float rho_of(int r) const { return x.get(row_of(r) * kRowWidth + kLastColumn); }

  // Keys that are no numbers must not meet the zeros of slots that do not see them: zeros take their place. Slots that
  // do see them have gradients of scores that are no numbers.
  SB_DEVICE void clear_what_is_no_number(int64_t from) {
    typedef std::conditional_t<kIsWide, float, Bfloat16> Coordinate;
    sync_warp();
    SB_NO_UNROLL
    for (int i = lane; i < int(Layout::kMatrix) / 4; i += kWarp)
      clear_without_number(shared_array<uint32_t>(from + i * 4), E{});
    SB_NO_UNROLL
    for (int i = lane; kHasQuadratic && i < kStage * 16; i += kWarp)
      clear_without_number(shared_array<uint32_t>(from + 2 * Layout::kMatrix + i * 4), Coordinate{});
    sync_warp();
  }
  // Whether gradients that are no numbers ask for a second, careful walk.
  SB_DEVICE bool has_to_be_careful() {
    if (!kIsRagged || is_careful) return false;
    bool are_numbers = true;
    SB_UNROLL
    for (int i = 0; i < 4; ++i) {
      float zero = 0;
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) zero += dq[c][i] * 0.0f;
      SB_UNROLL
      for (int c = 0; kHasQuadratic && c < 2; ++c) zero += dx[c][i] * 0.0f;
      are_numbers = are_numbers && zero == 0.0f;
    }
    is_careful = ballot(!are_numbers) != 0;
    return is_careful;
  }

  SB_DEVICE float exponent_of(int row, int32_t cluster) const { return exponents().get(row * width() + cluster); }
  // Adds a stage's gradients of exponents, a lane for the even or odd clusters of a slot, key by key.
  SB_DEVICE void add_to_clusters(const Fetched& of_lane, uint32_t valid, const float (&d_product)[kKeyTiles][4]) {
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) pairs().set(row_of(i / 2) * kRowWidth + 8 * n + 2 * t + i % 2, d_product[n][i]);
    sync_warp();
    const int row = lane % kTile;
    for (int i = 0; i < kStage; ++i) {
      const int32_t cluster = shuffle_from(of_lane.cluster, i);
      if (!(valid >> i & 1) || cluster % 2 != lane / kTile) continue;
      const int32_t at = row * width() + cluster;
      d_exponents().set(at, d_exponents().get(at) + pairs().get(row * kRowWidth + i));
    }
  }

  // -------------------- records

  // What the first walk found; whether any slot has gradients here.
  SB_DEVICE bool find_slots() {
    const int32_t in_state = kHasLowRank ? load(p.valid_before + b * p.slots + state_slot) : 0;
    bool has_any = false;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      Sums& of = sums[r];
      raise(of, quad_max(of.top));
      const float exact = quad_sum(of.exact), exact_value = quad_sum(of.exact_value), removed = quad_sum(of.removed),
                  removed_value = quad_sum(of.removed_value);
      const float total = kHasQuadratic ? of.total : quad_sum(of.total),
                  total_value = kHasQuadratic ? of.total_value : quad_sum(of.total_value);
      float a = kHasQuadratic ? exp2_of(log_state[r] - of.top) * correction[r] : 1.0f, lost = a * removed,
            left = a * total - lost;
      const int32_t unlisted = in_state - listed_before[r];
      if (kIsRagged && kHasLowRank && unlisted == 0) left = 0;
      const float den = exact + (left < 0.0f ? 0.0f : left);
      bool is_flagged = false;
      const bool has_state = kHasLowRank && (!kIsRagged || in_state > 0);
      if (has_state)
        is_flagged =
            (!p.is_causal && unlisted <= kByKeyLimit) || !(lost <= float(p.fallback_bound) * den) || lost > 1e37f;
      if (has_state && kHasQuadratic) {
        float square = 0;
        for (int64_t e = 0; e < p.rank; ++e) {
          const float of_x = x.get(row_of(r) * kRowWidth + e);
          square += of_x * of_x;
        }
        const double norm = QuadraticKernel::norm_of_features(double(square)), bound = kTermsBoundOfPlainStates;
        is_flagged = is_flagged || !(double(a) * double(a) * norm * norm * double(squares_of_state) <=
                                     bound * bound * double(den) * double(den));
      }
      const int64_t query = queries.get(row_of(r)), row = (b * p.q_heads + h) * p.q_tokens;
      if (kHasLowRank && query >= 0 && t == 0) {
        store(p.flags + row + query, uint8_t(is_flagged));
        if (is_flagged) store(p.any_flagged + head, uint8_t(1));  // by whom does not matter
      }
      const float largest = kIsHalf ? quad_max(of.largest) : 0.0f;
      // All weights together are one: a total that rounding made negative counts as it is. A query that sees nothing
      // has no gradients, whatever those of its result and lse are: zero times what is no number would be none.
      const float sum = exact + left > 0.0f ? exact + left : den;
      const bool is_left_out = is_flagged || sum == 0.0f;
      sync_warp();
      if (is_left_out && t == 0) queries.set(row_of(r), -1);
      sync_warp();
      if (query < 0 || is_left_out) continue;
      has_any = true;
      if (kIsRagged && kHasLowRank && unlisted == 0) a = 0;  // the state has nothing else

      const float most = 0x1p100f / larger(a, 1.0f);
      Slot& to = slot[r];
      to.log = of.top, to.inverse = 1.0f / sum;
      if (to.inverse > most) to.inverse = most;
      to.state_weight = a * to.inverse;
      const float delta = ((exact_value + a * total_value) - a * removed_value) * to.inverse;
      to.correction = !p.d_lse ? 0.0f : -load(static_cast<const float*>(p.d_lse) + row + query);
      to.shift = delta;
      const float shift = delta + to.correction;
      if (kIsHalf) to.scale = Scale::of(largest + (shift < 0.0f ? -shift : shift));
    }
    return ballot(has_any) != 0;
  }

  // Weights of float32 add up to one, and the mean of dO.v under them is exact, once their error, which is the same for
  // all pairs, is known. A walk for gradients finds it, and another one follows.
  SB_DEVICE bool has_to_be_balanced() {
    if (!kIsWide || is_balanced) return false;
    if constexpr (kHasClusters)
      this->visit_clusters([&](int r, int64_t at, float weight, float mass) {
        weights[r] += weight * mass, moments[r] += weight * (d_exponents().get(at) - slot[r].shift * mass);
      });
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      Slot& of = slot[r];
      float weight = quad_sum(weights[r]), moment = quad_sum(moments[r]);
      if (kHasQuadratic) {
        const int64_t at = row_of(r) * kRowWidth + kLastColumn;
        const float total = of_hz.get(at);
        weight += of.state_weight * total, moment += of.state_weight * (d_x.get(at) - of.shift * total);
      }
      if (!(weight > 0.0f)) continue;
      of.inverse /= weight, of.state_weight /= weight;
      of.correction += moment / weight;
    }
    is_balanced = true;
    if constexpr (kHasClusters) this->weigh_state_of_clusters();
    write_records();
    return true;
  }

  // For the kernels that follow.
  SB_DEVICE void write_records() {
    const bool is_without_state = kIsRagged && p.is_causal && state_slot == 0;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      Slot& of = slot[r];
      if (queries.get(row_of(r)) < 0) continue;
      if (t == 0) {
        const int64_t at = (b * p.q_heads + h) * p.q_tokens + first_slot + row_of(r);
        store(static_cast<SlotRecord<float>*>(p.records) + at,
              SlotRecord<float>{of.log, of.inverse, kHasQuadratic ? of.state_weight : 0.0f, of.shift, of.correction});
        store(p.kinds + at, !kHasLowRank ? SlotKind::kListed : is_without_state ? SlotKind::kByKey : SlotKind::kState);
      }
      if (!kIsWide) of.shift += of.correction;
    }
  }

  // -------------------- results

  SB_DEVICE void finish() {
    if constexpr (kHasClusters) write_gradients_of_exponents();
    if constexpr (kHasClusters && kIsWide)
      add_product_of_shared_numbers(d_exponents(), width(),
                                    static_cast<const float*>(p.given_representatives) + head * p.rank * p.head_dim,
                                    p.rank, p.head_dim, p.head_dim, dq);
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) dq[c][i] *= float(p.scale) * (kIsHalf ? Scale::inverse(slot[i / 2].scale) : 1.0f);
    if (kHasQuadratic) finish_map();
    if constexpr (kHasClusters && !kIsWide) finish_clusters();
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int64_t query = queries.get(row_of(r));
      if (query < 0) continue;
      if constexpr (kIsWide) {
        store_float_sums(dq, r, p.dq.template at<float>(b, h, query), p.head_dim);
      } else {
        auto* to = reinterpret_cast<uint32_t*>(p.dq.template at<E>(b, h, query));
        SB_UNROLL
        for (int c = 0; c < kChunks; ++c)
          if (c * 8 < p.head_dim) store(to + c * 4 + t, packed(dq[c][2 * r], dq[c][2 * r + 1], E{}));
      }
    }
  }

  // The gradients of x and of its log scale, from those of the listed pairs and those of the state.
  SB_DEVICE void finish_map() {
    SB_UNROLL
    for (int c = 0; c < 2; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Slot& of = slot[i / 2];
      const int64_t at = row_of(i / 2) * kRowWidth + 8 * c + 2 * t + i % 2;
      float of_state = d_x.get(at) - of.shift * of_hz.get(at);
      if (kIsWide) of_state -= of.correction * of_hz.get(at);
      d_x.set(at, dx[c][i] + of.state_weight * of_state);
    }
    sync_warp();
    if (lane < kTile) {
      float product = 0;
      for (int64_t a = 0; a < p.rank; ++a) product += x.get(lane * kRowWidth + a) * d_x.get(lane * kRowWidth + a);
      const int64_t last = lane * kRowWidth + p.rank;
      d_x.set(last, QuadraticKernel::log_gradient(product, d_x.get(last)));
    }
    sync_warp();
    if (p.query_weight.data) {
      if constexpr (kIsWide) {
        add_product_of_shared_numbers(d_x, kRowWidth, weight_row<float>(p, p.query_weight, b, h, p.q_heads, 0),
                                      p.rank + 1, p.head_dim, p.head_dim, dq);
      } else {
        const int64_t columns = p.head_dim / 8;
        add_product_of_numbers(d_x, kRowWidth, 0, 1.0f, p.map_operand + (b * p.q_heads + h) * columns * kWarp, columns,
                               dq);
      }
      return;
    }
    for (int64_t i = lane; i < kTile * (p.rank + 1); i += kWarp) {
      const int64_t row = i / (p.rank + 1), a = i % (p.rank + 1), query = queries.get(row);
      if (query >= 0) store(p.d_query_map.template at<float>(b, h, query) + a, d_x.get(row * kRowWidth + a));
    }
  }

  // q.b_c is an exponent of the query and of the representative, whose gradient the slot leaves to all of them.
  SB_DEVICE void write_gradients_of_exponents() const {
    sync_warp();
    float* to = static_cast<float*>(p.d_exponent) + ((b * p.q_heads + h) * p.q_tokens + first_slot) * p.rank;
    for (int row = 0; row < kTile; ++row)
      for (int64_t c = lane; c < p.rank && queries.get(row) >= 0; c += kWarp)
        store(to + row * p.rank + c, d_exponents().get(row * width() + c));
  }
  SB_DEVICE void finish_clusters() {
    const int64_t steps = p.features_padded / 16, columns = p.head_dim / 8;
    for (int64_t step = 0; step < steps; ++step)
      add_product_of_numbers(d_exponents(), width(), step, float(p.scale),
                             p.map_operand + head * steps * columns * kWarp, columns, dq);
  }

  TileEdges edges;
  bool has_query = false;    // this lane's slot, lane % kTile
  bool is_careful = false;   // ragged: some key is no number
  bool is_balanced = false;  // of float32
  int32_t listed_before[2];  // keys of the state
  float dq[kChunks][4], dx[2][4];
  float weights[2] = {}, moments[2] = {};  // of this lane: of weights, and of them times dO.v less its mean
};

// How many blocks a multiprocessor has registers for, where none need be spilled for it.
template <class E, int D, LowRank kKind, bool kIsRagged>
inline constexpr int kBackwardTileBlocks =
    sizeof(E) == 2 && D <= 64 && !(kIsRagged && kKind == LowRank::kQuadratic) ? 3 : 1;

template <class E, int D, LowRank kKind, bool kIsRagged>
SB_KERNEL SB_THREADS_AND_BLOCKS(kBackwardTileThreads, (kBackwardTileBlocks<E, D, kKind, kIsRagged>))
    attention_backward_tile(BackwardTileParams p) {
  const int64_t tiles = ceil_div(p.q_tokens, kTile), all = p.batch * p.q_heads * tiles, warps = block_threads() / kWarp;
  const int64_t base = warp_index() * BackwardTileLayout<E, D, kKind>::bytes(p);
  for_each_task(ceil_div(all, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index(), row = at / tiles;
    if (at >= all) return;
    BackwardTile<E, D, kKind, kIsRagged>(p, base, row / p.q_heads, row % p.q_heads, at % tiles * kTile).run();
  });
}

}  // namespace sb::cuda

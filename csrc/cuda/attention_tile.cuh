// Forward pass on tensor cores: a warp computes a tile of 16 query slots, for bfloat16 and float16 (docs/gpu.md). The
// same sums as attention_forward.cuh's: listed keys and what they take back from the state together, then the state's
// complement in one denominator; the same rule flags a query for float64. Slots share a list of keys and see all keys,
// or their lists and edges are ragged (attention_tile_rows.cuh). Then keys behind the tile's state are weighed pair by
// pair, listed or not.
//
// Listed keys come in stages of kStage, whose rows of K and V are copied into the warp's own shared memory while the
// stage before is computed, without a barrier of the block. Weights and values meet in 16 bits; exponents, the two
// sides of the low-rank part and the state are exact to float32, in two or three parts of 16 bits each.
#pragma once
#include "attention_tile_rows.cuh"
#include "low_rank.cuh"

namespace sb::cuda {

// Columns of a query's row of coordinates in shared memory: up to 15 of them, then 1 behind them, and the log scale.
inline constexpr int kRowOfX = 17, kLogOfX = 16;

// Shared memory of a warp, in bytes. Queries pass through the first stage's keys, or stay where ragged tiles need
// registers.
template <int D, LowRank kKind, bool kIsRagged>
struct TileLayout {
  static constexpr bool kKeepsQueries = kIsRagged && D > 64;
  static constexpr int kMatrix = kStage * D * 2, kCoordinates = kKind == LowRank::kQuadratic ? kStage * 64 : 0,
                       kStageBytes = 2 * kMatrix + kCoordinates, kOperand = kKeepsQueries ? 2 * kStageBytes : 0,
                       kQueries = 2 * kStageBytes + (kKeepsQueries ? kMatrix : 0), kTask = kQueries + kTile * 4,
                       kX = kTask + kWarp * 4, kExponents = kX;
  // Numbers of every lane in the place of x, once the state is added.
  static constexpr int kParked = 13;
  static SB_HD int64_t exponent_row(const TileParams& p) { return pad_to(p.rank, 16) + 1; }
  static SB_HD int64_t bytes(const TileParams& p) {
    const int64_t floats = kKind == LowRank::kQuadratic  ? (kKeepsQueries ? kParked * kWarp : kTile * kRowOfX)
                           : kKind == LowRank::kCentroid ? kTile * exponent_row(p)
                                                         : 0;
    return pad_to(kX + floats * 4, 16);
  }
};
// Of a block: which coordinates a feature multiplies, and by what.
inline constexpr int64_t kFeatureTable = kTileFeatures * 8;

template <class E, int D, LowRank kKind, bool kIsRagged>
class Tile {
  typedef TileLayout<D, kKind, kIsRagged> Layout;
  static constexpr bool kHasQuadratic = kKind == LowRank::kQuadratic, kHasClusters = kKind == LowRank::kCentroid,
                        kHasLowRank = kKind != LowRank::kNone;
  static constexpr int kCopiesAtOnce = Layout::kKeepsQueries ? 1 : 2;  // of SB_UNROLL_COPIES
  static constexpr bool kParks = Layout::kKeepsQueries && kHasQuadratic;
  static constexpr int kChunks = D / 8, kSteps = D / 16, kKeyTiles = kStage / 8;

 public:
  SB_DEVICE Tile(const TileParams& p, int base, int32_t b, int32_t h, int32_t first_slot)
      : p(p),
        base(base),
        b(b),
        h(h),
        kv(int32_t(p.kv_head(h))),
        head(int32_t(b * p.kv_heads + kv)),
        first_slot(first_slot),
        lane(lane_index()),
        g(lane / 4),
        t(lane % 4) {}

  SB_DEVICE void run() {
    const RowRange range = load(p.rows + b);
    if (!find_queries(range)) return;
    first_key = range.k_first;
    if constexpr (kIsRagged) {
      edges = TileEdges(p, range, first_slot);
      state_slot = edges.state_slot;
      do {
        begin();
        TileRows rows(p, edges, range, b, h, first_slot, queries().get(lane % kTile) >= 0);
        add_stages<false>([&](StageKeys& keys) { return rows.next_listed(keys); });
        if constexpr (!kHasClusters) {
          rows.enter_seen();
          add_stages<true>([&](StageKeys& keys) { return rows.next_seen(keys); });
        }
        sync_warp();  // before a second time
      } while (!finish());
    } else {
      state_slot = int32_t(p.slots - 1);
      begin();
      const KeyList list(p, range, b, h, first_slot, edge_of_slot(p, range, first_slot));
      int64_t position = 0;
      add_stages<false>([&](StageKeys& keys) {
        if (position >= list.positions()) return false;
        const int64_t here = position + lane % kStage;
        keys.key = here < list.positions() ? int32_t(list.key_at(here)) : -1;
        position += kStage;
        return true;
      });
      finish();
    }
  }

 private:
  // -------------------- the tile's queries

  // Whether there are any.
  SB_DEVICE bool find_queries(const RowRange& range) {
    int32_t query = -1;
    if (lane < kTile && first_slot + lane < slots_of_row(p, range)) {
      int64_t at = range.q_first + first_slot + lane;
      if (p.order)
        at = load(p.order + (b * p.order_heads + h * p.order_heads / p.q_heads) * p.q_tokens + first_slot + lane);
      if (at >= 0 && at < p.q_tokens && !(p.q_mask && load(p.q_mask + b * p.q_tokens + at))) query = int32_t(at);
    }
    sync_warp();  // the last tile is done with them
    if (lane < kTile) queries().set(lane, query);
    sync_warp();
    return ballot(query >= 0) != 0;
  }

  // Queries and the state.
  SB_DEVICE void begin() {
    read_queries();
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] = 0;
    squares_of_state = 0;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      top[r] = log_state[r] = float(kLowestLog), correction[r] = 1;
      exact[r] = removed[r] = total[r] = squares[r] = 0, listed_before[r] = 0;
    }
    if (kHasQuadratic) {
      kappa_ref = load(static_cast<const float*>(p.state_log) + head * p.slots + state_slot);
      read_coordinates();
      if (kappa_ref > float(kNoKeyLog)) add_state_of_features();
    }
    if (kHasClusters) add_state_of_clusters();
    sync_warp();  // the queries' place is free, and that of their coordinates
    if (kParks) park();
  }

  // Wide ragged tiles need registers: x as an operand, and sums over the state, wait in shared memory.
  SB_DEVICE void park() {
    SB_UNROLL
    for (int i = 0; i < 4; ++i)
      x().set(i * kWarp + lane, same_bits<float>(x_high[i])),
          x().set((4 + i) * kWarp + lane, same_bits<float>(x_low[i]));
    // Lane t of four holds the sum of one kind over them.
    const float sums[4] = {quad_sum(total[0]), quad_sum(total[1]), quad_sum(squares[0]), quad_sum(squares[1])};
    x().set(8 * kWarp + lane, t == 0 ? sums[0] : t == 1 ? sums[1] : t == 2 ? sums[2] : sums[3]);
    x().set(9 * kWarp + lane, squares_of_state), x().set(12 * kWarp + lane, kappa_ref);
    SB_UNROLL
    for (int r = 0; r < 2; ++r) x().set((10 + r) * kWarp + lane, rho[r]);
  }
  SB_DEVICE void read_parked_coordinates() {
    SB_UNROLL
    for (int i = 0; i < 4; ++i) {
      x_high[i] = same_bits<uint32_t>(x().get(i * kWarp + lane));
      x_low[i] = same_bits<uint32_t>(x().get((4 + i) * kWarp + lane));
    }
    SB_UNROLL
    for (int r = 0; r < 2; ++r) rho[r] = x().get((10 + r) * kWarp + lane);
    kappa_ref = x().get(12 * kWarp + lane);
  }
  SB_DEVICE void read_parked_sums() {
    const float sum_of_lane = x().get(8 * kWarp + lane);
    SB_UNROLL
    for (int r = 0; r < 2; ++r) total[r] = t == r ? sum_of_lane : 0.0f, squares[r] = t == 2 + r ? sum_of_lane : 0.0f;
    squares_of_state = x().get(9 * kWarp + lane);
  }

  SB_DEVICE void read_queries() {
    for (int i = lane; i < kTile * kChunks; i += kWarp) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int64_t query = queries().get(row);
      const bool is_there = query >= 0 && chunk * 8 < p.head_dim;
      copy_async(base + Layout::kOperand + swizzled<2 * D>(row, chunk),
                 p.q.at<const E>(b, h, is_there ? query : 0) + (is_there ? chunk * 8 : 0), is_there);
    }
    commit_copies();
    if (kHasQuadratic) {
      for (int i = lane; i < kTile * kRowOfX; i += kWarp) {
        const int row = i / kRowOfX, column = i % kRowOfX;
        const int64_t query = queries().get(row);
        float value = 0;
        if (query >= 0 && (column <= p.rank || column == kLogOfX)) {
          const MapRow<float, float> of_query(p.x_map, b, h, query);
          value = column == kLogOfX ? of_query.log() : column == p.rank ? 1.0f : of_query(column);
        }
        x().set(i, value);
      }
    }
    wait_copies<0>();
    sync_warp();
    if (Layout::kKeepsQueries) return;
    SB_UNROLL
    for (int k = 0; k < kSteps; ++k) load_queries(k, q_operand[k]);
  }
  SB_DEVICE void load_queries(int k, uint32_t (&to)[4]) const {
    load_matrices(base + Layout::kOperand + swizzled<2 * D>(lane % 16, 2 * k + lane / 16), to);
  }
  // Columns [16 k, 16 k + 16) of the tile's queries.
  SB_DEVICE void queries_of_step(int k, uint32_t (&to)[4]) const {
    if (Layout::kKeepsQueries) return load_queries(k, to);
    SB_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = q_operand[k][i];
  }

  SB_DEVICE Shared<int32_t> queries() const { return shared_array<int32_t>(base + Layout::kQueries); }
  SB_DEVICE Shared<float> x() const { return shared_array<float>(base + Layout::kX); }
  SB_DEVICE int row_of(int r) const { return g + 8 * r; }
  SB_DEVICE static float quad_sum(float v) {
    v += shuffle_xor(v, 1);
    return v + shuffle_xor(v, 2);
  }
  SB_DEVICE static float quad_max(float v) {
    v = larger(v, shuffle_xor(v, 1));
    return larger(v, shuffle_xor(v, 2));
  }

  // -------------------- the state

  SB_DEVICE int64_t operand_of_state() const { return p.is_causal ? head * p.slots + state_slot : head; }

  // sum += features rows [16 step, 16 step + 16) of the state; both in two parts.
  SB_DEVICE void add_rows_of_state(int64_t step, const uint32_t (&high)[4], const uint32_t (&low)[4]) {
    const FourWords* state =
        p.state_operand + ((operand_of_state() * (p.features_padded / 16) + step) * p.value_chunks) * kWarp + lane;
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      if (c >= p.value_chunks) continue;
      if (c % (D > 64 ? 2 : 4) == 0) sync_warp();  // or the compiler has all of them in registers at once
      const FourWords of_state = load(state + c * kWarp);
      multiply_add(sum[c], low, of_state.at[0], of_state.at[1], Bfloat16{});
      multiply_add(sum[c], high, of_state.at[2], of_state.at[3], Bfloat16{});
      multiply_add(sum[c], high, of_state.at[0], of_state.at[1], Bfloat16{});
    }
  }

  // x as an operand: half of the coordinates, then 1.
  SB_DEVICE void read_coordinates() {
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      rho[r] = x().get(row_of(r) * kRowOfX + kLogOfX);
      SB_UNROLL
      for (int e = 0; e < 2; ++e) {
        float pair[2];
        SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int column = 2 * t + 8 * e + i;
          const float value = x().get(row_of(r) * kRowOfX + column);
          pair[i] = column < p.rank ? 0.5f * value : value;
        }
        uint32_t parts[2];
        split(pair[0], pair[1], parts, Bfloat16{});
        x_high[2 * e + r] = parts[0], x_low[2 * e + r] = parts[1];
      }
    }
  }

  // F(x) H and F(x).hz, over exp(rho + kappa_ref).
  SB_DEVICE void add_state_of_features() {
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      log_state[r] = top[r] = rho[r] + kappa_ref;
      const float back = top[r] - rho[r];
      // What the sum lost to rounding.
      correction[r] = exp2_of((rho[r] - (top[r] - back)) + (kappa_ref - back));
    }
    const auto table = shared_array<uint32_t>(0);
    const auto factors = shared_array<float>(kTileFeatures * 4);
    const float* hz = p.state_sums + operand_of_state() * p.features_padded;
    for (int step = 0; step < kTileFeatures / 16; ++step) {
      if (step * 16 >= p.features_padded) break;
      uint32_t high[4], low[4];
      SB_UNROLL
      for (int e = 0; e < 2; ++e) {
        float feature[2][2];
        SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int column = step * 16 + 2 * t + 8 * e + i;
          const uint32_t which = table.get(column);
          const float factor = factors.get(column), of_state = load(hz + column);
          squares_of_state += of_state * of_state;
          SB_UNROLL
          for (int r = 0; r < 2; ++r) {
            const int row = row_of(r) * kRowOfX;
            const float value = factor * x().get(row + int(which & 255)) * x().get(row + int(which >> 8));
            feature[r][i] = value;
            total[r] += value * of_state, squares[r] += value * value;
          }
        }
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          uint32_t parts[2];
          split(feature[r][0], feature[r][1], parts, Bfloat16{});
          high[2 * e + r] = parts[0], low[2 * e + r] = parts[1];
        }
      }
      add_rows_of_state(step, high, low);
    }
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      total[r] *= correction[r];
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) sum[c][2 * r] *= correction[r], sum[c][2 * r + 1] *= correction[r];
    }
  }

  // Exact attention to the clusters, 16 at a time; exponents stay in shared memory for the listed keys.
  SB_DEVICE void add_state_of_clusters() {
    const auto exponents = shared_array<float>(base + Layout::kExponents);
    const int64_t width = Layout::exponent_row(p);
    const float scale = float(p.scale * kLog2e);
    for (int64_t step = 0; step < p.features_padded / 16; ++step) {
      float exponent[2][4];
      SB_UNROLL
      for (int n = 0; n < 2; ++n) {
        SB_UNROLL
        for (int i = 0; i < 4; ++i) exponent[n][i] = 0;
        SB_UNROLL
        for (int k = 0; k < kSteps; ++k) {
          if (k >= p.head_steps) continue;
          if (D > 64) sync_warp();  // as above
          const FourWords* parts =
              p.cluster_operand +
              (((head * (p.features_padded / 8) + 2 * step + n) * p.head_steps + k) * kWarp + lane) * 2;
          const FourWords first = load(parts), second = load(parts + 1);
          uint32_t of_queries[4];
          queries_of_step(k, of_queries);
          multiply_add(exponent[n], of_queries, second.at[0], second.at[1], E{});
          multiply_add(exponent[n], of_queries, first.at[2], first.at[3], E{});
          multiply_add(exponent[n], of_queries, first.at[0], first.at[1], E{});
        }
      }
      float step_top[2] = {top[0], top[1]}, mass[2][2];
      SB_UNROLL
      for (int n = 0; n < 2; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t c = step * 16 + 8 * n + 2 * t + i;
        const float largest =
            c < p.rank ? load(static_cast<const float*>(p.cluster_log) + head * p.rank + c) : float(kLowestLog);
        mass[n][i] = load(p.state_sums + head * p.features_padded + c);
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          float& of_pair = exponent[n][2 * r + i];
          of_pair = largest > float(kNoKeyLog) ? of_pair * scale + largest : float(kLowestLog);
          exponents.set(row_of(r) * width + c, of_pair);
          step_top[r] = larger(step_top[r], of_pair);
        }
      }
      uint32_t high[4], low[4];
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        raise(r, quad_max(step_top[r]));
        SB_UNROLL
        for (int n = 0; n < 2; ++n) {
          float weight[2];
          SB_UNROLL
          for (int i = 0; i < 2; ++i) {
            weight[i] = exp2_of(exponent[n][2 * r + i] - top[r]);
            total[r] += weight[i] * mass[n][i];
          }
          uint32_t parts[2];
          split(weight[0], weight[1], parts, Bfloat16{});
          high[2 * n + r] = parts[0], low[2 * n + r] = parts[1];
        }
      }
      add_rows_of_state(step, high, low);
    }
  }

  // All sums of row r relative to the larger exponent `to`.
  SB_DEVICE void raise(int r, float to) {
    const float scale = exp2_of(top[r] - to);
    top[r] = to;
    if (ballot(!(scale == 1.0f)) == 0) return;
    exact[r] *= scale;
    if (kHasClusters) total[r] *= scale, removed[r] *= scale;
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) sum[c][2 * r] *= scale, sum[c][2 * r + 1] *= scale;
  }

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
    const int to = base + buffer * Layout::kStageBytes;
    SB_UNROLL_COPIES
    for (int j = 0; j < kStage * kChunks / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / kChunks, chunk = i % kChunks;
      const int32_t key = shuffle_from(of_lane.key, row);
      const int64_t at = first_key + (key < 0 ? 0 : key);
      const bool in_key = key >= 0 && chunk * 8 < p.head_dim, in_value = key >= 0 && chunk < p.value_chunks;
      copy_async(to + swizzled<2 * D>(row, chunk), p.k.at<const E>(b, kv, at) + (in_key ? chunk * 8 : 0), in_key);
      copy_async(to + Layout::kMatrix + swizzled<2 * D>(row, chunk),
                 p.v.at<const E>(b, kv, at) + (in_value ? chunk * 8 : 0), in_value);
    }
    if (kHasQuadratic) SB_UNROLL_COPIES
    for (int j = 0; j < kStage * 4 / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / 4, chunk = i % 4;
      const int32_t key = shuffle_from(of_lane.key, row);
      copy_async(to + 2 * Layout::kMatrix + swizzled<64>(row, chunk),
                 p.key_coordinates + (head * p.k_tokens + first_key + (key < 0 ? 0 : key)) * 32 + chunk * 8, key >= 0);
    }
  }

  // next(keys) gives the next stage, or false behind the last. `kIsBehind`: keys behind the tile's state.
  template <bool kIsBehind, class Next>
  SB_DEVICE void add_stages(const Next& next_stage) {
    Fetched next;
    bool has_next = next_stage(next);
    if (!has_next) return;
    fetch(next, 0);
    commit_copies();
    for (int buffer = 0; has_next; buffer = 1 - buffer) {
      const Fetched of_lane = next;
      has_next = next_stage(next);
      if (has_next) fetch(next, 1 - buffer);
      commit_copies();
      wait_copies<1>();
      sync_warp();
      add_stage<kIsBehind>(of_lane, base + buffer * Layout::kStageBytes);
      sync_warp();  // before the buffer is filled again
    }
    wait_copies<0>();
  }

  template <bool kIsBehind>
  SB_DEVICE void add_stage(const Fetched& of_lane, int from) {
    const uint32_t valid = ballot(of_lane.key >= 0);  // of the keys twice
    // Of rows g and g + 8: keys that they list, and keys that they see and do not list.
    uint32_t listed[2], others[2];
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      listed[r] = kIsRagged ? valid & shuffle_from(of_lane.pattern, row_of(r)) : valid, others[r] = 0;
      if (kIsBehind && kHasQuadratic) others[r] = valid & edges.seen_by(row_of(r), of_lane.begin) & ~listed[r];
      if (!kIsBehind) listed_before[r] += bits_set(listed[r] & ((1u << kStage) - 1));
    }
    float weight[kKeyTiles][4], root[kKeyTiles][4];
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) weight[n][i] = root[n][i] = 0;
    SB_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      if (k >= p.head_steps) continue;
      uint32_t keys[4], of_queries[4];
      queries_of_step(k, of_queries);
      load_matrices(from + swizzled<2 * D>(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2), keys);
      multiply_add(weight[0], of_queries, keys[0], keys[1], E{});
      multiply_add(weight[1], of_queries, keys[2], keys[3], E{});
    }
    if (kHasQuadratic) {
      if (kParks) read_parked_coordinates();
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        uint32_t y[4];  // the two halves of the first part, then of the second
        load_matrices(from + 2 * Layout::kMatrix + swizzled<64>(n * 8 + lane % 8, lane / 8), y);
        multiply_add(root[n], x_low, y[0], y[1], Bfloat16{});
        multiply_add(root[n], x_high, y[2], y[3], Bfloat16{});
        multiply_add(root[n], x_high, y[0], y[1], Bfloat16{});
      }
    }

    // Scores in base 2, and what the state holds of a pair, or behind it the factor of exp(score).
    const float scale = float(p.scale * kLog2e);
    const float of_key = !kHasLowRank ? 0.0f : kIsBehind ? of_lane.log : exp2_of(of_lane.log - kappa_ref);
    int32_t clusters[kKeyTiles][2];
    float stage_top[2] = {top[0], top[1]};
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      const float of_column = kHasLowRank ? shuffle_from(of_key, column) : 0.0f;
      if (kHasClusters) clusters[n][i] = shuffle_from(of_lane.cluster, column);
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        const bool is_listed = listed[r] >> column & 1;
        float &score = weight[n][2 * r + i], &held = root[n][2 * r + i];
        score = is_listed ? score * scale : float(kLowestLog);
        if (kIsBehind && kHasQuadratic && (others[r] >> column & 1)) {
          held *= held;
          // Weights must fit into float16 too.
          const float most = kIsHalf ? larger(0.0f, log2_of(held)) : 0.0f;
          stage_top[r] = larger(stage_top[r], rho[r] + of_column + most);
        }
        stage_top[r] = larger(stage_top[r], score);
        if (!kIsBehind && kHasQuadratic) held = is_listed ? of_column * held * held : 0.0f;
        if (kHasClusters) held = is_listed ? of_column : 0.0f;
      }
    }
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      float to = quad_max(stage_top[r]);
      if (kHasQuadratic && kIsHalf && !kIsBehind) {
        // Weights that are taken back must fit into float16 too.
        float most = 0;
        SB_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
        for (int i = 0; i < 2; ++i) most = larger(most, root[n][2 * r + i]);
        most = quad_max(most);
        if (most > 0) to = larger(to, log_state[r] + log2_of(most));
      }
      raise(r, to);
      const float of_state = kHasQuadratic ? correction[r] * exp2_of(log_state[r] - to) : 1.0f;
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + 2 * t + i;
        float &of_pair = weight[n][2 * r + i], held = root[n][2 * r + i];
        of_pair = exp2_of(of_pair - to);
        if (!(listed[r] >> column & 1)) of_pair = 0;  // all scores of a row may be the lowest
        if (kIsBehind && kHasQuadratic) {
          const float of_column = shuffle_from(of_key, column);
          if (others[r] >> column & 1) of_pair = exp2_of((rho[r] - to) + of_column) * held;
        }
        exact[r] += of_pair;
        if (kHasQuadratic && !kIsBehind) removed[r] += held, of_pair -= of_state * held;
        if (kHasClusters) {
          held *= exp2_of(exponent_of(row_of(r), clusters[n][i]) - to);
          removed[r] += held, of_pair -= held;
        }
      }
    }
    // In two parts where the CPU's kernel does not round weights to bfloat16: in float16, and for lists of few queries.
    const bool has_low = kIsHalf || (kIsRagged && p.by_groups);
    uint32_t left[4], low[4];
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t parts[2];
      split(weight[n][2 * r], weight[n][2 * r + 1], parts, E{});
      left[2 * n + r] = parts[0], low[2 * n + r] = parts[1];
    }
    if (kIsRagged && is_careful) set_aside(left, listed[0] | others[0], listed[1] | others[1], from);
    SB_UNROLL
    for (int c = 0; c < kChunks; c += 2) {
      if (c >= p.value_chunks) continue;
      uint32_t values[4];
      load_transposed(from + Layout::kMatrix + swizzled<2 * D>(lane % 16, c + lane / 16), values);
      if (has_low) {
        multiply_add(sum[c], low, values[0], values[1], E{});
        multiply_add(sum[c + 1], low, values[2], values[3], E{});
      }
      multiply_add(sum[c], left, values[0], values[1], E{});
      multiply_add(sum[c + 1], left, values[2], values[3], E{});
    }
  }

  // Values that are no numbers must not meet the weights 0 of rows that do not see their keys: where a row of values
  // has one, it is added to those that see it alone, and zeros take its place.
  SB_DEVICE void set_aside(const uint32_t (&left)[4], uint32_t seen_0, uint32_t seen_1, int from) {
    const uint32_t seen[2] = {seen_0, seen_1};
    const auto at = [&](int key, int word) {
      return shared_array<uint32_t>(from + Layout::kMatrix + swizzled<2 * D>(key, word / 4) + word % 4 * 4);
    };
    uint32_t bad = 0;  // keys
    SB_NO_UNROLL
    for (int key = 0; key < kStage; ++key) {
      bool is_number = true;
      SB_NO_UNROLL
      for (int word = lane; word < D / 2; word += kWarp) {
        const uint32_t pair = at(key, word).get(0);
        is_number = is_number && low_of(pair, E{}) * 0.0f == 0.0f && high_of(pair, E{}) * 0.0f == 0.0f;
      }
      if (ballot(!is_number) != 0) bad |= 1u << key;
    }
    if (bad == 0) return;
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      SB_NO_UNROLL
      for (int key = 0; key < kStage; ++key) {
        if (!(bad >> key & 1)) continue;
        const uint32_t pair = at(key, 4 * c + t).get(0);
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          const uint32_t of_keys = shuffle_from(key < 8 ? left[r] : left[2 + r], lane / 4 * 4 + key % 8 / 2);
          const float of_key = key % 2 == 0 ? low_of(of_keys, E{}) : high_of(of_keys, E{});
          if (seen[r] >> key & 1)
            sum[c][2 * r] += of_key * low_of(pair, E{}), sum[c][2 * r + 1] += of_key * high_of(pair, E{});
        }
      }
    }
    sync_warp();
    SB_NO_UNROLL
    for (int key = 0; key < kStage; ++key) {
      SB_NO_UNROLL
      for (int word = lane; word < D / 2; word += kWarp)
        if (bad >> key & 1) at(key, word).set(0, 0u);
    }
    sync_warp();
  }
  SB_DEVICE float exponent_of(int row, int32_t cluster) const {
    return shared_array<float>(base + Layout::kExponents).get(row * Layout::exponent_row(p) + cluster);
  }

  // -------------------- results

  // False where it has to be done again, carefully.
  SB_DEVICE bool finish() {
    if (kIsRagged && !is_careful) {
      bool is_number = true;
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        float zero = 0;
        SB_UNROLL
        for (int c = 0; c < kChunks; ++c) zero += sum[c][2 * r] * 0.0f + sum[c][2 * r + 1] * 0.0f;
        is_number = is_number && zero == 0.0f;
      }
      is_careful = ballot(!is_number) != 0;
      if (is_careful) return false;
    }
    if (kParks) read_parked_sums();
    const int32_t in_state = kHasLowRank ? load(p.valid_before + b * p.slots + state_slot) : 0;
    const float of_hz = kHasQuadratic ? quad_sum(squares_of_state) : 0.0f;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float all_exact = quad_sum(exact[r]), all_removed = quad_sum(removed[r]), all_total = quad_sum(total[r]),
                  all_squares = quad_sum(squares[r]);
      const float a = kHasQuadratic ? exp2_of(log_state[r] - top[r]) : 1.0f,
                  lost = kHasQuadratic ? a * correction[r] * all_removed : all_removed, left = a * all_total - lost;
      const int32_t unlisted = in_state - listed_before[r];
      const float den = all_exact + (left < 0.0f || (kIsRagged && unlisted == 0) ? 0.0f : left);
      bool is_flagged = false;
      if (kHasLowRank && in_state > 0) {
        is_flagged =
            (!p.is_causal && unlisted <= kByKeyLimit) || !(lost <= float(p.fallback_bound) * den) || lost > 1e37f;
        if (kHasQuadratic) {
          const double terms = double(a) * double(a) * double(all_squares) * double(of_hz);
          is_flagged =
              is_flagged || !(terms <= kTermsBoundOfPlainStates * kTermsBoundOfPlainStates * double(den) * double(den));
        }
      }
      const int64_t query = queries().get(row_of(r));
      if (query < 0) continue;
      const int64_t at = (b * p.q_heads + h) * p.q_tokens + query;
      if (kHasLowRank && t == 0) {
        store(p.flags + at, uint8_t(is_flagged));
        if (is_flagged) store(p.any_flagged + head, uint8_t(1));  // by whom does not matter
      }
      if (is_flagged) continue;
      const float inverse = den == 0.0f ? 0.0f : 1.0f / den;
      if (t == 0)
        store(static_cast<float*>(p.lse) + at, den == 0.0f ? -float(INFINITY) : float(kLn2) * (top[r] + log2_of(den)));
      auto* out = reinterpret_cast<uint32_t*>(p.out.at<E>(b, h, query));
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        if (c >= p.value_chunks) continue;
        const float low = den == 0.0f ? 0.0f : sum[c][2 * r] * inverse,
                    high = den == 0.0f ? 0.0f : sum[c][2 * r + 1] * inverse;
        store(out + c * 4 + t, packed(low, high, E{}));
      }
    }
    return true;
  }

  static constexpr bool kIsHalf = std::is_same_v<E, Half>;

  const TileParams& p;
  const int base;  // of the warp's shared memory
  const int32_t b, h, kv, head, first_slot;
  const int lane, g, t;
  int32_t first_key = 0, state_slot = 0;
  TileEdges edges;
  bool is_careful = false;                                    // ragged: some value is no number
  int32_t listed_before[2];                                   // keys of the state
  uint32_t q_operand[Layout::kKeepsQueries ? 1 : kSteps][4];  // of the tile's queries
  uint32_t x_high[4], x_low[4];
  // By row g and g + 8. Sums are relative to exp(top), of the state of features to exp(log_state) times the correction.
  float sum[kChunks][4], top[2], exact[2], removed[2], total[2], squares[2], log_state[2], correction[2], rho[2];
  float squares_of_state, kappa_ref = 0;
};

// Rows of features in the order of QuadraticKernel::expand: the two coordinates that make one, and its factor;
// coordinate `rank` is 1.
SB_DEVICE void write_feature_table(const TileParams& p) {
  const auto table = shared_array<uint32_t>(0);
  const auto factors = shared_array<float>(kTileFeatures * 4);
  const auto rank = uint32_t(p.rank);
  for (int f = thread_index(); f < kTileFeatures; f += block_threads()) {
    uint32_t a = rank, other = rank;
    float factor = f < p.features ? 1.0f : 0.0f;
    if (f > 0 && f <= p.rank) a = uint32_t(f - 1);
    if (f > p.rank && f < p.features) {
      int64_t pair = f - p.rank - 1;
      a = 0;
      while (pair >= p.rank - int64_t(a)) pair -= p.rank - int64_t(a), ++a;
      other = a + uint32_t(pair);
      factor = pair == 0 ? 0.5f : 0.70710678118654752440f;
    }
    table.set(f, a | other << 8), factors.set(f, factor);
  }
  sync_block();
}

template <class E, int D, LowRank kKind, bool kIsRagged>
SB_KERNEL SB_THREADS_AT_MOST(kMostTileThreads) attention_tile(TileParams p) {
  if (kKind == LowRank::kQuadratic) write_feature_table(p);
  // Of 16 queries each, so that 32 bits count them.
  const auto tiles = [&] { return uint32_t(ceil_div(p.q_tokens, kTile)); };
  const auto all = [&] { return uint32_t(p.batch * p.q_heads) * tiles(); };
  const auto first_of_block = [&](uint32_t task) { return task * uint32_t(block_threads() / kWarp); };
  const auto base = [&] { return int(kFeatureTable + warp_index() * TileLayout<D, kKind, kIsRagged>::bytes(p)); };
  // The number of a lane's task waits in shared memory: tiles need registers.
  const auto kept = [&] {
    return shared_array<uint32_t>(base() + TileLayout<D, kKind, kIsRagged>::kTask + lane_index() * 4);
  };
  SB_NO_UNROLL
  for (auto task = uint32_t(block_index()); first_of_block(task) < all();
       task = kept().get(0) + uint32_t(grid_blocks())) {
    kept().set(0, task);
    const uint32_t at = first_of_block(task) + uint32_t(warp_index()), row = at / tiles(), heads = uint32_t(p.q_heads);
    if (at < all())
      Tile<E, D, kKind, kIsRagged>(p, base(), int32_t(row / heads), int32_t(row % heads), int32_t(at % tiles() * kTile))
          .run();
  }
}

}  // namespace sb::cuda

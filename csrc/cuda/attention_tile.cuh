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
#include "attention_tile_list.cuh"
#include "attention_tile_queries.cuh"
#include "attention_tile_stages.cuh"

namespace sb::cuda {

// Of a cluster's row of exponents in shared memory: one of every query.
inline constexpr int kRowOfExponents = 17;

// Shared memory of a warp, in bytes. Queries pass through the first stage's keys, or stay where ragged tiles need
// registers. Tiles that share their keys (attention_window.cuh) keep `kShared` bytes in place of a list.
template <int D, LowRank kKind, bool kIsRagged, int kShared = 0>
struct TileLayout {
  static constexpr bool kKeepsQueries = (kIsRagged && D > 64) || kKind != LowRank::kNone;
  static constexpr int kMatrix = kStage * D * 2, kCoordinates = kKind == LowRank::kQuadratic ? kStage * 64 : 0,
                       kStageBytes = 2 * kMatrix + kCoordinates, kOperand = kKeepsQueries ? 2 * kStageBytes : 0,
                       kQueries = 2 * kStageBytes + (kKeepsQueries ? kMatrix : 0), kTask = kQueries + (kTile + 4) * 4,
                       kList = kTask + (kShared ? 4 : kWarp) * 4, kX = kList + (kShared ? kShared : TileList::kBytes),
                       kExponents = kX;
  // Numbers of every lane in the place of x, once the state is added.
  static constexpr int kParked = 12;
  static SB_HD int64_t bytes(const TileParams& p) {
    const int64_t floats = kKind == LowRank::kQuadratic  ? kParked * kWarp
                           : kKind == LowRank::kCentroid ? kRowOfExponents * pad_to(p.rank, 16)
                                                         : 0;
    return pad_to(kX + floats * 4, 128);
  }
};
// Threads of a block, and how many blocks a multiprocessor runs at once as far as registers go: of 65536.
template <int D>
inline constexpr int kTileThreads = D > 64 ? 64 : 128;
template <int D, LowRank kKind, bool kIsRagged>
inline constexpr int kTileBlocks = 65536 / kTileThreads<D> /
                                   (kIsRagged ? D == 64 && kKind == LowRank::kNone ? 168 : 255
                                    : D == 64 && kKind != LowRank::kCentroid ? 128
                                                                             : 168);

template <class E, int D, LowRank kKind, bool kIsRagged, int kShared = 0>
class Tile {
 protected:
  typedef TileLayout<D, kKind, kIsRagged, kShared> Layout;
  static constexpr bool kHasQuadratic = kKind == LowRank::kQuadratic, kHasClusters = kKind == LowRank::kCentroid,
                        kHasLowRank = kKind != LowRank::kNone, kIsShared = kShared > 0;
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
        t(lane % 4),
        scale(larger(float((p.scale < 0 ? -p.scale : p.scale) * kLog2e), 0x1p-126f)) {}

  // Of a warp's shared memory, once: no copy fills columns of keys and values that there are not.
  SB_DEVICE static void clear_columns(const TileParams& p, int base) {
    if (p.head_dim == D && p.value_pad == D) return;
    SB_NO_UNROLL
    for (int i = lane_index(); i < 2 * Layout::kStageBytes / kCopyBytes; i += kWarp)
      shared_array<FourWords>(base).set(i, FourWords{});
    sync_warp();
  }

  SB_DEVICE void run() {
    const RowRange range = load(p.rows + b);
    if (!find_queries(p, range, b, h, first_slot, queries())) return;
    find_keys(range);
    if constexpr (kIsRagged) {
      edges = TileEdges(p, range, first_slot);
      state_slot = edges.state_slot;
      if (lane == 0) queries().set(kSlotOfState, state_slot);
      sync_warp();
      do {
        begin();
        TileRows rows(p, edges, range, b, h, first_slot, queries().get(lane % kTile) >= 0);
        go_through_rows<kKind>(rows, [&](auto is_behind, const auto& next) { add_stages<is_behind.value>(next); });
        sync_warp();  // before a second time
      } while (!finish());
    } else {
      state_slot = int32_t(p.slots - 1);
      begin();
      TileList list(KeyList(p, range, b, h, first_slot, edge_of_slot(p, range, first_slot)), base + Layout::kList,
                    key_of_lane());
      add_stages<false>([&](StageKeys& keys) { return list.next(keys.key); });
      finish();
    }
  }

 protected:
  // Of the row, for good.
  SB_DEVICE void find_keys(const RowRange& range) {
    if (lane == 0) queries().set(kRowOfHeads, b * int32_t(p.q_heads) + h);
    first_key = range.k_first;
    const int64_t first = head * p.k_tokens + first_key;
    keys_of_lane = reinterpret_cast<const char*>(p.k.at<const E>(b, kv, first_key)) + lane % 8 * kCopyBytes;
    values_of_lane = reinterpret_cast<const char*>(p.v.at<const E>(b, kv, first_key)) + lane % 8 * kCopyBytes;
    coordinates_of_lane =
        as_it_is(reinterpret_cast<const char*>(p.key_coordinates + first * 32) + lane % 4 * kCopyBytes);
    key_log = p.key_log + first, clusters = p.cluster + first;
    if (!kIsRagged || !kHasClusters) key_log = as_it_is(key_log), clusters = as_it_is(clusters);  // no register is free
  }

  // -------------------- the tile's queries

  static constexpr int kRowOfHeads = kTile, kSlotOfState = kTile + 1;  // behind the queries, for the end

  // Queries and the state.
  SB_DEVICE void begin() {
    read_queries();
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] = 0;
    of_features = FeatureSums{};
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      // Above kLowestLog, so that what has this exponent weighs nothing.
      minus_top[r] = -float(kNoKeyLog), of_state[r] = kHasQuadratic ? 0.0f : 1.0f;
      exact[r] = removed[r] = 0, listed_before[r] = 0;
    }
    if (kHasQuadratic) {
      kappa_ref = log_of_state<float>(p, head, state_slot);
      SB_UNROLL
      for (int r = 0; r < 2; ++r) rho[r] = x().get(row_of(r) * kRowOfX + kLogOfX);
      if (kappa_ref > float(kNoKeyLog)) add_state_of_features();
    }
    if (kHasClusters) add_state_of_clusters();
    sync_warp();  // the queries' place is free, and that of their coordinates
    if (kHasQuadratic) park();
  }

  // What the state leaves waits in shared memory, since tiles need registers: x as an operand, half of the coordinates,
  // then 1, in two parts; sums of the state; and log scales.
  SB_DEVICE void park() {
    FourWords high, low;
    split_coordinates(p, x(), high.at, low.at);
    const float of_lane[4] = {of_features.of_lane(), of_features.squares_of_state, rho[0], rho[1]};
    FourWords numbers;
    SB_UNROLL
    for (int i = 0; i < 4; ++i) numbers.at[i] = same_bits<uint32_t>(of_lane[i]);
    sync_warp();  // x is read
    parked().set(lane, high), parked().set(kWarp + lane, low), parked().set(2 * kWarp + lane, numbers);
  }
  SB_DEVICE Shared<FourWords> parked() const { return shared_array<FourWords>(base + Layout::kX); }
  SB_DEVICE float parked_number(int i) const { return same_bits<float>(parked().get(2 * kWarp + lane).at[i]); }
  SB_DEVICE void read_parked_sums() {
    of_features.set(parked_number(0));
    of_features.squares_of_state = parked_number(1);
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
      SB_NO_UNROLL
      for (int i = lane; i < kTile * kRowOfX; i += kWarp)
        x().set(i, coordinate_of_query(p, b, h, queries().get(i / kRowOfX), i % kRowOfX));
    }
    wait_copies<0>();
    if (p.scale < 0) {
      SB_NO_UNROLL
      for (int i = lane; i < kTile * kChunks; i += kWarp) {
        const auto of_lane =
            shared_array<FourWords>(base + Layout::kOperand + swizzled<2 * D>(i / kChunks, i % kChunks));
        FourWords words = of_lane.get(0);
        SB_UNROLL
        for (int word = 0; word < 4; ++word) words.at[word] ^= 0x80008000u;
        of_lane.set(0, words);
      }
    }
    sync_warp();
    if (Layout::kKeepsQueries) return;
    SB_UNROLL
    for (int k = 0; k < kSteps; ++k) load_queries(k, q_operand[k]);
  }
  SB_DEVICE void load_queries(int k, uint32_t (&to)[4]) const {
    load_matrices(further_chunk(base + Layout::kOperand + swizzled<2 * D>(lane % 16, lane / 16), 2 * k), to);
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

  // -------------------- the state

  SB_DEVICE int64_t operand_of_state() const { return p.has_prefixes() ? head * p.slots + state_slot : head; }

  // sum += features rows [16 step, 16 step + 16) of the state; both in two parts.
  SB_DEVICE void add_rows_of_state(int64_t step, const uint32_t (&high)[4], const uint32_t (&low)[4]) {
    const FourWords* state =
        p.state_operand + ((operand_of_state() * (p.features_padded / 16) + step) * p.value_chunks) * kWarp + lane;
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      if (c >= int32_t(p.value_chunks)) continue;
      if (c % 2 == 0) sync_warp();  // or the compiler has all of them in registers at once
      const FourWords of_state = load(state + c * kWarp);
      multiply_add(sum[c], low, of_state.at[0], of_state.at[1], Bfloat16{});
      multiply_add(sum[c], high, of_state.at[2], of_state.at[3], Bfloat16{});
      multiply_add(sum[c], high, of_state.at[0], of_state.at[1], Bfloat16{});
    }
  }

  // F(x) H and F(x).hz, over exp(rho + kappa_ref).
  SB_DEVICE void add_state_of_features() {
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const LogOfState state(rho[r], kappa_ref);
      minus_top[r] = -state.log, of_state[r] = state.correction;
    }
    const float* hz = p.state_sums + operand_of_state() * p.features_padded;
    SB_NO_UNROLL
    for (int step = 0; step < int32_t(p.features_padded / 16); ++step) {
      uint32_t high[4], low[4];
      SB_UNROLL
      for (int e = 0; e < 2; ++e) {
        float feature[2][2];
        SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int column = step * 16 + 2 * t + 8 * e + i;
          of_features.add(x(), column, load(hz + column), feature[0][i], feature[1][i]);
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
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) sum[c][2 * r] *= of_state[r], sum[c][2 * r + 1] *= of_state[r];
    }
  }

  // Exact attention to the clusters, 16 at a time; exponents stay in shared memory for the listed keys.
  SB_DEVICE void add_state_of_clusters() {
    const auto exponents = shared_array<float>(base + Layout::kExponents);
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
      float step_top[2] = {-minus_top[0], -minus_top[1]}, mass[2][2];
      SB_UNROLL
      for (int n = 0; n < 2; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t c = step * 16 + 8 * n + 2 * t + i;
        const float log = log_of_cluster(p, head, c);
        mass[n][i] = load(p.state_sums + head * p.features_padded + c);
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          float& of_pair = exponent[n][2 * r + i];
          of_pair = exponent_of_cluster(of_pair * scale, log);
          exponents.set(c * kRowOfExponents + row_of(r), of_pair);
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
            weight[i] = exp2_of(exponent[n][2 * r + i] + minus_top[r]);
            of_features.total[r] += weight[i] * mass[n][i];
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
    const float by = exp2_of(-to - minus_top[r]);
    minus_top[r] = -to;
    exact[r] *= by;
    if (kHasQuadratic) of_state[r] *= by;
    if (kHasClusters) of_features.total[r] *= by, removed[r] *= by;
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) sum[c][2 * r] *= by, sum[c][2 * r + 1] *= by;
  }

  // -------------------- listed keys

  // Where a stage has this lane's key, and the lane that has a key: the keys of rows that a lane copies are those of
  // its eight lanes.
  SB_DEVICE int key_of_lane() const { return lane / 8 + lane % 4 * 4; }
  SB_DEVICE static int lane_of_key(int key) { return key % 4 * 8 + key / 4; }

  struct Fetched : StageKeys {
    uint32_t valid = 0;     // bit l: whether lane l has a key
    uint32_t in_order = 0;  // ragged: bit i: whether the stage has key i
    int32_t cluster = 0;    // where its row of exponents begins, in bytes
    float log = 0;  // log scale of what a state holds of the key; relative to that of its cluster, if it has one
  };

  SB_DEVICE void fetch(Fetched& of_lane, int buffer) {
    if (kIsRagged) {
      of_lane.in_order = ballot(of_lane.key >= 0) & ((1u << kStage) - 1);
      of_lane.key = shuffle_from(of_lane.key, key_of_lane());
    }
    of_lane.valid = ballot(of_lane.key >= 0);
    of_lane.log = float(kLowestLog);
    if (kHasLowRank && of_lane.key >= 0) {
      of_lane.log = load(key_log + uint32_t(of_lane.key));
      if (kHasClusters) {
        const int32_t cluster = load(clusters + uint32_t(of_lane.key)), last = int32_t(p.rank) - 1;
        of_lane.cluster = (cluster < 0 ? 0 : cluster > last ? last : cluster) * kRowOfExponents * 4;
      }
    }
    const int32_t key = of_lane.key < 0 ? 0 : of_lane.key;
    const uint32_t to = shared_address(base + buffer * Layout::kStageBytes), is_there = of_lane.valid >> lane / 8 * 8,
                   // Rows eight further are as these two.
        places[2] = {to + swizzled<2 * D>(lane / 8, lane % 8), to + swizzled<2 * D>(lane / 8 + 4, lane % 8)};
    SB_UNROLL
    for (int j = 0; j < kStage / 4; ++j) {
      const auto from = uint64_t(uint32_t(shuffle_in_eight(key, j)));
      const char *of_key = keys_of_lane + from * p.key_row_bytes, *of_value = values_of_lane + from * p.value_row_bytes;
      SB_UNROLL
      for (int half = 0; half < D / 64; ++half) {
        const uint32_t at = places[j % 2] + j / 2 * 16 * D + half * 128;
        const int column = lane % 8 * 8 + half * 64;
        copy_async_if(column < int32_t(p.head_dim), at, of_key + half * 128, is_there & 1u << j);
        copy_async_if(column < int32_t(p.value_pad), at + Layout::kMatrix, of_value + half * 128, is_there & 1u << j);
      }
    }
    if (kHasQuadratic) SB_UNROLL
    for (int j = 0; j < kStage / 8; ++j) {
      const int row = lane / 4 + 8 * j, lane_of_row = lane_of_key(lane / 4) + 2 * j;
      const auto from = uint64_t(uint32_t(shuffle_from(key, lane_of_row)));
      copy_async_if(true, to + 2 * Layout::kMatrix + swizzled<64>(row, lane % 4), coordinates_of_lane + from * 64,
                    of_lane.valid & 1u << lane_of_row);
    }
  }

  // `kIsBehind`: keys behind the tile's state.
  template <bool kIsBehind, class Next>
  SB_DEVICE void add_stages(const Next& next_stage) {
    for_each_stage<Fetched>(
        next_stage, [&](Fetched& of_lane, int buffer) { fetch(of_lane, buffer); },
        [&](const Fetched& of_lane, int buffer) {
          add_stage<kIsBehind>(of_lane, base + buffer * Layout::kStageBytes);
        });
  }

  template <bool kIsBehind>
  SB_DEVICE void add_stage(const Fetched& of_lane, int from) {
    constexpr bool kHasPatterns = kIsRagged && (kIsBehind || !kIsShared);
    float weight[kKeyTiles][4], root[kKeyTiles][4];
    multiply_keys(from, weight, root);
    uint32_t seen[2] = {0, 0};
    if constexpr (kHasPatterns)
      weigh_ragged<kIsBehind>(of_lane, weight, root, seen);
    else
      weigh(of_lane, weight, root);
    // In two parts where the CPU's kernel does not round weights to bfloat16: in float16, and for lists of few queries.
    const bool has_low = kIsHalf || (kIsRagged && !kIsShared && p.by_groups);
    uint32_t left[4], low[4];
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t parts[2];
      split(weight[n][2 * r], weight[n][2 * r + 1], parts, E{});
      left[2 * n + r] = parts[0], low[2 * n + r] = parts[1];
    }
    if (kHasPatterns && is_careful) set_aside(left, seen[0], seen[1], from);
    const int place = from + Layout::kMatrix + swizzled<2 * D>(lane % 16, lane / 16);
    SB_UNROLL
    for (int four = 0; four < kChunks; four += 4) {
      if (four > 0 && int32_t(p.value_chunks) <= four) break;
      SB_UNROLL
      for (int c = four; c < four + 4; c += 2) {
        uint32_t values[4];
        load_transposed(further_chunk(place, c), values);
        if (has_low) {
          multiply_add(sum[c], low, values[0], values[1], E{});
          multiply_add(sum[c + 1], low, values[2], values[3], E{});
        }
        multiply_add(sum[c], left, values[0], values[1], E{});
        multiply_add(sum[c + 1], left, values[2], values[3], E{});
      }
    }
  }

  // Products of queries and of coordinates with those of the keys.
  SB_DEVICE void multiply_keys(int from, float (&weight)[kKeyTiles][4], float (&root)[kKeyTiles][4]) {
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) weight[n][i] = root[n][i] = 0;
    const int place = from + swizzled<2 * D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    SB_UNROLL
    for (int two = 0; two < kSteps; two += 2) {
      if (two > 0 && int32_t(p.head_steps) <= two) break;
      SB_UNROLL
      for (int k = two; k < two + 2; ++k) {
        uint32_t keys[4], of_queries[4];
        queries_of_step(k, of_queries);
        load_matrices(further_chunk(place, 2 * k), keys);
        multiply_add(weight[0], of_queries, keys[0], keys[1], E{});
        multiply_add(weight[1], of_queries, keys[2], keys[3], E{});
      }
    }
    if (!kHasQuadratic) return;
    const FourWords high = parked().get(lane), low = parked().get(kWarp + lane);
    add_product_of_coordinates(high.at, low.at, from + 2 * Layout::kMatrix, root);
  }

  // From products to weights, without what the state holds of the keys, where all rows list what a lane fetched.
  SB_DEVICE void weigh(const Fetched& of_lane, float (&weight)[kKeyTiles][4], const float (&root)[kKeyTiles][4]) {
    const int first = lane_of_key(2 * t % 4) + t / 2;  // has key 2 t; that of key 2 t + 8 n + i is 2 n + 8 i further
    if (of_lane.valid != ~0u) {
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i)
        if (!(of_lane.valid >> (first + 2 * n + 8 * i) & 1)) weight[n][i] = weight[n][2 + i] = -float(INFINITY);
    }
    listed_before[0] += bits_set(of_lane.valid);  // of the keys twice
    float most[2];
    SB_UNROLL
    for (int r = 0; r < 2; ++r)
      most[r] = larger(larger(weight[0][2 * r], weight[0][2 * r + 1]), larger(weight[1][2 * r], weight[1][2 * r + 1]));
    float held[kKeyTiles][4];
    if (kHasQuadratic) {
      const float of_key = exp2_of(of_lane.log - kappa_ref);
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float of_column = shuffle_from(of_key, first + 2 * n + 8 * i);
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          const float of_pair = root[n][2 * r + i];
          held[n][2 * r + i] = of_column * of_pair * of_pair;
          removed[r] += held[n][2 * r + i];
        }
      }
    }
    const float above[2] = {fmaf(most[0], scale, minus_top[0]), fmaf(most[1], scale, minus_top[1])};
    raise_if_needed<kHasQuadratic>(above, [&](int r) { return most[r] * scale; });
    const float mass = kHasClusters ? exp2_of(of_lane.log) : 0.0f;
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float of_column = kHasClusters ? shuffle_from(mass, first + 2 * n + 8 * i) : 0.0f;
      const int32_t cluster = kHasClusters ? shuffle_from(of_lane.cluster, first + 2 * n + 8 * i) : 0;
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        float& of_pair = weight[n][2 * r + i];
        of_pair = exp2_of(fmaf(of_pair, scale, minus_top[r]));
        exact[r] += of_pair;
        if (kHasQuadratic) of_pair -= of_state[r] * held[n][2 * r + i];
        if (kHasClusters) {
          const float of_cluster = exp2_of(exponent_of(r, cluster) + minus_top[r]);
          removed[r] += of_cluster * of_column, of_pair -= of_cluster * of_column;
        }
      }
    }
  }

  // Raises the exponents of rows to those of their largest weights, exponent(r) or `above` as much, whose rounding to
  // 16 bits then loses nothing. What listed keys take back must fit into float16: all that a lane has taken bounds
  // each.
  template <bool kTakes, class Exponent>
  SB_DEVICE void raise_if_needed(const float (&above)[2], const Exponent& exponent) {
    constexpr bool kHasLimit = kTakes && kIsHalf;
    constexpr float kMostTaken = 0x1p10f;
    float taken[2];
    bool is_high = above[0] > 0 || above[1] > 0;
    SB_UNROLL
    for (int r = 0; r < 2 && kHasLimit; ++r) {
      taken[r] = of_state[r] * removed[r];
      is_high = is_high || taken[r] > kMostTaken;
    }
    if (ballot(is_high) == 0) return;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      float to = exponent(r);
      if (kHasLimit) to = larger(to, quick_log2_of(larger(taken[r], kMostTaken) * (1 / kMostTaken)) - minus_top[r]);
      raise(r, larger(-minus_top[r], quad_max(to)));
    }
  }

  // The same where every row has its own list. `seen`: keys of rows g and g + 8 that have a weight.
  template <bool kIsBehind>
  SB_DEVICE void weigh_ragged(const Fetched& of_lane, float (&weight)[kKeyTiles][4], float (&root)[kKeyTiles][4],
                              uint32_t (&seen)[2]) {
    uint32_t listed[2], others[2];  // others: keys that the row sees and does not list
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      listed[r] = of_lane.in_order & shuffle_from(of_lane.pattern, row_of(r)), others[r] = 0;
      if (kIsBehind && kHasQuadratic)
        others[r] = of_lane.in_order & edges.seen_by(row_of(r), of_lane.begin) & ~listed[r];
      if (!kIsBehind) listed_before[r] += bits_set(listed[r]);
      seen[r] = listed[r] | others[r];
    }
    if (kIsBehind && kHasQuadratic) SB_UNROLL
    for (int r = 0; r < 2; ++r) rho[r] = parked_number(2 + r);
    // Scores, and what the state holds of a pair, or behind it the factor of exp(score).
    const int first = lane_of_key(2 * t % 4) + t / 2;
    const float of_key = kIsBehind ? of_lane.log : exp2_of(kHasQuadratic ? of_lane.log - kappa_ref : of_lane.log);
    float of_columns[kKeyTiles][2], most[2], most_of_others[2];
    SB_UNROLL
    for (int r = 0; r < 2; ++r) most[r] = -float(INFINITY), most_of_others[r] = float(kLowestLog);
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      const float of_column = kHasLowRank ? shuffle_from(of_key, first + 2 * n + 8 * i) : 0.0f;
      of_columns[n][i] = of_column;
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        const bool is_listed = listed[r] >> column & 1;
        float &score = weight[n][2 * r + i], &held = root[n][2 * r + i];
        if (!is_listed) score = -float(INFINITY);
        most[r] = larger(most[r], score);
        if (kIsBehind && kHasQuadratic && (others[r] >> column & 1)) {
          held *= held;
          // Weights must fit into float16 too.
          const float of_held = kIsHalf ? larger(0.0f, exponent_above(held)) : 0.0f;
          most_of_others[r] = larger(most_of_others[r], rho[r] + of_column + of_held);
        }
        if (kHasQuadratic && !kIsBehind) {
          held = is_listed ? of_column * held * held : 0.0f;
          removed[r] += held;
        }
      }
    }
    float above[2];
    const auto exponent = [&](int r) {
      return kIsBehind && kHasQuadratic ? larger(most[r] * scale, most_of_others[r]) : most[r] * scale;
    };
    SB_UNROLL
    for (int r = 0; r < 2; ++r) above[r] = exponent(r) + minus_top[r];
    raise_if_needed<kHasQuadratic && !kIsBehind>(above, exponent);
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      const int32_t cluster = kHasClusters ? shuffle_from(of_lane.cluster, first + 2 * n + 8 * i) : 0;
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        float &of_pair = weight[n][2 * r + i], held = root[n][2 * r + i];
        of_pair = exp2_of(fmaf(of_pair, scale, minus_top[r]));
        if (kIsBehind && kHasQuadratic && (others[r] >> column & 1))
          of_pair = exp2_of((rho[r] + minus_top[r]) + of_columns[n][i]) * held;
        exact[r] += of_pair;
        if (kHasQuadratic && !kIsBehind) of_pair -= of_state[r] * held;
        if (kHasClusters && (listed[r] >> column & 1)) {
          const float of_cluster = exp2_of(exponent_of(r, cluster) + minus_top[r]);
          removed[r] += of_cluster * of_columns[n][i], of_pair -= of_cluster * of_columns[n][i];
        }
      }
    }
  }

  // Values that are no numbers must not meet the weights 0 of rows that do not see their keys: where a row of values
  // has one, it is added to those that see it alone, and zeros take its place.
  SB_DEVICE void set_aside(const uint32_t (&left)[4], uint32_t seen_0, uint32_t seen_1, int from) {
    const uint32_t seen[2] = {seen_0, seen_1};
    const auto at = [&](int key, int word) {
      return shared_array<uint32_t>(from + Layout::kMatrix + swizzled<2 * D>(key, word / 4) + word % 4 * 4);
    };
    const uint32_t bad = keys_without_numbers(D / 2, [&](int key, int word) {
      const uint32_t pair = at(key, word).get(0);
      return low_of(pair, E{}) * 0.0f == 0.0f && high_of(pair, E{}) * 0.0f == 0.0f;
    });
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
    clear_keys(bad, D / 2, [&](int key, int word) { at(key, word).set(0, 0u); });
  }
  // `cluster`: where its exponents begin.
  SB_DEVICE float exponent_of(int r, int32_t cluster) const {
    return shared_array<float>(base + Layout::kExponents + cluster).get(row_of(r));
  }

  // -------------------- results

  // False where it has to be done again, carefully.
  SB_DEVICE bool finish() {
    const int32_t of_tile = queries().get(kRowOfHeads), heads = int32_t(p.q_heads), b = of_tile / heads,
                  h = of_tile % heads, head = int32_t(b * p.kv_heads + p.kv_head(h));
    if ((kIsRagged || kIsShared) && !is_careful) {
      is_careful = !are_numbers(sum);
      if (is_careful) return false;
    }
    if (kHasQuadratic) read_parked_sums();
    if (!kIsRagged || kIsShared) listed_before[0] = listed_before[1] = listed_before[0] / 2;
    const int64_t slot = kIsRagged ? queries().get(kSlotOfState) : p.slots - 1;
    const int32_t in_state = kHasLowRank ? load(p.valid_before + b * p.slots + slot) : 0;
    const float of_hz = kHasQuadratic ? quad_sum(of_features.squares_of_state) : 0.0f;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float all_exact = quad_sum(exact[r]), all_removed = quad_sum(removed[r]),
                  all_total = quad_sum(of_features.total[r]), all_squares = quad_sum(of_features.squares[r]);
      const float lost = of_state[r] * all_removed, left = of_state[r] * all_total - lost;
      RowResult<kKind, kIsRagged> result(p, all_exact, lost, left, in_state, listed_before[r]);
      if (kHasQuadratic && in_state > 0) result.flag_large_terms(of_state[r], all_squares, of_hz);
      const int64_t query = queries().get(row_of(r));
      if (query < 0) continue;
      if (t == 0) result.store_numbers(p, (b * p.q_heads + h) * p.q_tokens + query, head, -minus_top[r]);
      if (result.is_flagged) continue;
      const float inverse = result.inverse();
      auto* out = reinterpret_cast<uint32_t*>(p.out.at<E>(b, h, query)) + t;
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        if (c >= int32_t(p.value_chunks)) continue;
        store(out + c * 4, packed(result.mean(sum[c][2 * r], inverse), result.mean(sum[c][2 * r + 1], inverse), E{}));
      }
    }
    return true;
  }

  static constexpr bool kIsHalf = std::is_same_v<E, Half>;

  const TileParams& p;
  const int base;  // of the warp's shared memory
  const int32_t b, h, kv, head, first_slot;
  const int lane, g, t;
  const float scale;  // of scores in base 2, not negative
  int32_t first_key = 0, state_slot = 0;
  const char *keys_of_lane, *values_of_lane, *coordinates_of_lane;  // of the first key
  const float* key_log;
  const int32_t* clusters;
  TileEdges edges;
  bool is_careful = false;                                    // ragged or shared: some value is no number
  int32_t listed_before[2];                                   // keys of the state
  uint32_t q_operand[Layout::kKeepsQueries ? 1 : kSteps][4];  // of the tile's queries
  // By row g and g + 8. Sums are relative to exp(top); total, removed and squares of features to the state, and
  // `of_state` is the factor between the two. `minus_top` is what is added to scores.
  float sum[kChunks][4], minus_top[2], exact[2], removed[2], of_state[2], rho[2], kappa_ref = 0;
  FeatureSums of_features;  // with clusters `total` is that of their masses
};

template <class E, int D, LowRank kKind, bool kIsRagged>
SB_KERNEL SB_THREADS_AND_BLOCKS(kTileThreads<D>, (kTileBlocks<D, kKind, kIsRagged>)) attention_tile(TileParams p) {
  if (kKind == LowRank::kQuadratic) write_feature_table(p);
  typedef TileLayout<D, kKind, kIsRagged> Layout;
  typedef Tile<E, D, kKind, kIsRagged> Tile;
  Tile::clear_columns(p, int(kFeatureTable + warp_index() * Layout::bytes(p)));
  for_each_tile<Layout>(
      p, [&](int base, int32_t b, int32_t h, int32_t first_slot) { Tile(p, base, b, h, first_slot).run(); });
}

}  // namespace sb::cuda

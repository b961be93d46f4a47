// Forward pass on tensor cores for float32 tokens: the same walk, sums and flags as attention_tile.cuh's, by products
// that are as exact as float32 (float_products.cuh). Products over the keys of a stage, or over 8 features, begin at
// zero and are added to a row's sums in float32, since devices do not say how tensor cores round a long sum.
#pragma once
#include "attention_tile_queries.cuh"
#include "attention_tile_stages.cuh"
#include "float_products.cuh"

namespace sb::cuda {

// Shared memory of a warp, in bytes. A stage's rows of keys and of values are one buffer each: the next keys are copied
// while weights meet values, the next values while scores are made. Queries stay, and are split anew for every stage:
// registers are for sums.
template <int D, LowRank kKind>
struct FloatTileLayout {
  static constexpr int kMatrix = kStage * D * 4, kValues = kMatrix, kCoordinates = 2 * kMatrix,
                       kOperand = kCoordinates + (kKind == LowRank::kQuadratic ? kStage * 64 : 0),
                       kQueries = kOperand + kMatrix, kTask = kQueries + kTile * 4, kX = kTask + kWarp * 4,
                       kExponents = kX;
  // Numbers of every lane in the place of x, once the state is added.
  static constexpr int kParked = 12;
  static_assert(kTile * kRowOfX <= kParked * kWarp);
  static SB_HD int64_t exponent_row(const TileParams& p) { return pad_to(p.rank, 16) + 1; }
  static SB_HD int64_t bytes(const TileParams& p) {
    const int64_t floats = kKind == LowRank::kQuadratic  ? kParked * kWarp
                           : kKind == LowRank::kCentroid ? kTile * exponent_row(p)
                                                         : 0;
    return pad_to(kX + floats * 4, 16);
  }
};

// Byte of the chunk of four numbers `chunk` in row `row` of a matrix of queries or keys, of which lanes 4 g + t read
// chunk t of row g, 32 at a time: two rows lie in different groups of banks.
SB_HD int moved_by_parity(int row) { return (row & 1) << 6; }
template <int D>
SB_HD int swizzled_by_parity(int row, int chunk) {
  return row * D * 4 + ((chunk << 4) ^ moved_by_parity(row));
}

template <int D, LowRank kKind, bool kIsRagged>
class FloatTile {
  typedef FloatTileLayout<D, kKind> Layout;
  static constexpr bool kHasQuadratic = kKind == LowRank::kQuadratic, kHasClusters = kKind == LowRank::kCentroid,
                        kHasLowRank = kKind != LowRank::kNone;
  static constexpr int kChunks = D / 8, kGroups = D / 16, kSpans = D / 32, kKeyTiles = kStage / 8;

 public:
  SB_DEVICE FloatTile(const TileParams& p, int base, int32_t b, int32_t h, int32_t first_slot)
      : p(p),
        base(base),
        b(b),
        h(h),
        kv(int32_t(p.kv_head(h))),
        head(int32_t(b * p.kv_heads + kv)),
        first_slot(first_slot),
        lane(lane_index()),
        g(lane / 4),
        t(lane % 4) {
    // Of what this lane reads, so that its other places are at constant distances.
    SB_UNROLL
    for (int e = 0; e < 2; ++e) {
      of_row[e] = base + swizzled_by_parity<D>(g, 4 * e + t);
      of_values[e] = base + Layout::kValues + swizzled<4 * D>(2 * t + e, g);
    }
  }

  SB_DEVICE void run() {
    const RowRange range = load(p.rows + b);
    if (!find_queries(p, range, b, h, first_slot, queries())) return;
    first_key = range.k_first;
    if constexpr (kIsRagged) {
      edges = TileEdges(p, range, first_slot);
      state_slot = edges.state_slot;
    } else {
      state_slot = int32_t(p.slots - 1);
    }
    do {
      begin();
      if constexpr (kIsRagged) {
        TileRows rows(p, edges, range, b, h, first_slot, queries().get(lane % kTile) >= 0);
        go_through_rows<kKind>(rows, [&](auto is_behind, const auto& next) { add_stages<is_behind.value>(next); });
      } else {
        StagesOfList list(p, range, b, h, first_slot);
        add_stages<false>([&](StageKeys& keys) { return list.next(keys); });
      }
      sync_warp();  // before a second time
    } while (!finish());
  }

 private:
  // -------------------- the tile's queries

  // Queries and the state.
  SB_DEVICE void begin() {
    read_queries();
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] = 0;
    of_features = FeatureSums{};
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      top[r] = log_state[r] = float(kLowestLog), correction[r] = 1;
      exact[r] = removed[r] = 0, listed_before[r] = 0;
    }
    if (kHasQuadratic) {
      kappa_ref = log_of_state<float>(p, head, state_slot);
      SB_UNROLL
      for (int r = 0; r < 2; ++r) rho[r] = x().get(row_of(r) * kRowOfX + kLogOfX);
      if (kappa_ref > float(kNoKeyLog)) add_state_of_features();
      park();
    }
    if (kHasClusters) add_state_of_clusters();
  }

  SB_DEVICE void read_queries() {
    SB_UNROLL_COPIES
    for (int j = 0; j < kTile * D / 4 / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / (D / 4), chunk = i % (D / 4);
      const int64_t query = queries().get(row);
      const bool is_there = query >= 0 && chunk * 4 < p.head_dim;
      copy_async(base + Layout::kOperand + swizzled_by_parity<D>(row, chunk),
                 p.q.at<const float>(b, h, is_there ? query : 0) + (is_there ? chunk * 4 : 0), is_there);
    }
    commit_copies();
    if (kHasQuadratic) {
      for (int i = lane; i < kTile * kRowOfX; i += kWarp)
        x().set(i, coordinate_of_query(p, b, h, queries().get(i / kRowOfX), i % kRowOfX));
    }
    wait_copies<0>();
    sync_warp();
  }
  // Columns [16 s + 4 t, 16 s + 4 t + 4) of rows g and g + 8.
  SB_DEVICE void queries_of_group(int s, float (&to)[2][4]) const {
    SB_UNROLL
    for (int r = 0; r < 2; ++r) load_four(Layout::kOperand + place_in_rows(r, s), to[r]);
  }

  // Chunk 4 s + t of row 8 n + g.
  SB_DEVICE int place_in_rows(int n, int s) const { return of_row[s % 2] + n * 8 * D * 4 + s / 2 * 128; }
  SB_DEVICE void load_four(int offset, float (&to)[4]) const {
    const FourWords words = shared_array<FourWords>(offset).get(0);
    SB_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = same_bits<float>(words.at[i]);
  }
  SB_DEVICE Shared<int32_t> queries() const { return shared_array<int32_t>(base + Layout::kQueries); }
  SB_DEVICE Shared<float> x() const { return shared_array<float>(base + Layout::kX); }
  SB_DEVICE int row_of(int r) const { return g + 8 * r; }

  // -------------------- the state

  SB_DEVICE const float* state() const { return state_of<float>(p, head, p.stored_state(state_slot)); }

  // sum += features times rows [8 step, 8 step + 8) of the state, of which this lane's are the two from 8 step + 2 t
  // on.
  SB_DEVICE void add_rows_of_state(int64_t step, const LeftParts& features) {
    const int64_t first = step * 8 + 2 * t, columns = p.value_pad + 1;
    const bool is_there[2] = {first < p.features, first + 1 < p.features};
    const float* row = state() + (is_there[0] ? first : 0) * columns + 4 * g;
    SB_UNROLL
    for (int span = 0; span < kSpans; ++span) {
      if (span * 32 >= p.value_pad) continue;
      sync_warp();  // or the compiler has all of the state in registers at once
      const bool in_row = span * 32 + 4 * g < p.value_pad;
      float part[4][4];
      SB_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float* at = row + span * 32 + j;
        const float of_first = is_there[0] && in_row ? load(at) : 0.0f,
                    of_second = is_there[1] && in_row ? load(at + columns) : 0.0f;
        SB_UNROLL
        for (int i = 0; i < 4; ++i) part[j][i] = 0;
        add_product(part[j], part[j], features, of_first, of_second);
      }
      add_part(span, part);
    }
  }
  SB_DEVICE void add_part(int span, const float (&part)[4][4]) {
    SB_UNROLL
    for (int j = 0; j < 4; ++j) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[4 * span + j][i] += part[j][i];
  }

  // In the place of x: x as an operand, half of the coordinates, then 1; and sums over the state. Registers are for
  // the loop.
  SB_DEVICE void park() {
    float x_rows[2][4];
    SB_UNROLL
    for (int r = 0; r < 2; ++r) SB_UNROLL
    for (int i = 0; i < 4; ++i) x_rows[r][i] = half_coordinate(p, x(), row_of(r), 4 * t + i);
    const float of_lane = of_features.of_lane(), of_hz = quad_sum(of_features.squares_of_state);
    sync_warp();
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      FourWords words;
      SB_UNROLL
      for (int i = 0; i < 4; ++i) words.at[i] = same_bits<uint32_t>(x_rows[r][i]);
      shared_array<FourWords>(parked(4 * r)).set(lane, words);
      shared_array<float>(parked(10 + r)).set(lane, rho[r]);
    }
    shared_array<float>(parked(8)).set(lane, of_lane);
    shared_array<float>(parked(9)).set(lane, of_hz);
  }
  // Byte of the numbers from `which` on.
  SB_DEVICE int parked(int which) const { return base + Layout::kX + which * kWarp * 4; }

  // F(x) H and F(x).hz, over exp(rho + kappa_ref).
  SB_DEVICE void add_state_of_features() {
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const LogOfState state(rho[r], kappa_ref);
      log_state[r] = top[r] = state.log, correction[r] = state.correction;
    }
    SB_NO_UNROLL
    for (int step = 0; step < kTileFeatures / 8; ++step) {
      if (step * 8 >= p.features) break;
      float feature[2][2];
      SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = step * 8 + 2 * t + i;
        const float of_state = column < p.features ? load(state() + column * (p.value_pad + 1) + p.value_pad) : 0.0f;
        of_features.add(x(), column, of_state, feature[i][0], feature[i][1]);
      }
      add_rows_of_state(step, LeftParts(feature[0][0], feature[0][1], feature[1][0], feature[1][1]));
    }
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      of_features.total[r] *= correction[r];
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) sum[c][2 * r] *= correction[r], sum[c][2 * r + 1] *= correction[r];
    }
  }

  // Exact attention to the clusters, 8 at a time; exponents stay in shared memory for the listed keys.
  SB_DEVICE void add_state_of_clusters() {
    const auto exponents = shared_array<float>(base + Layout::kExponents);
    const int64_t width = Layout::exponent_row(p);
    const float scale = float(p.scale * kLog2e);
    SB_NO_UNROLL
    for (int64_t step = 0; step < ceil_div(p.rank, 8); ++step) {
      float exponent[4] = {0, 0, 0, 0}, small[4] = {0, 0, 0, 0};
      const int64_t cluster = step * 8 + g;
      const float* row = static_cast<const float*>(p.given_representatives) +
                         (head * p.rank + (cluster < p.rank ? cluster : 0)) * p.head_dim;
      SB_UNROLL
      for (int s = 0; s < kGroups; ++s) {
        if (s >= p.head_steps) continue;
        sync_warp();  // as above
        float of_queries[2][4], of_cluster[4];
        queries_of_group(s, of_queries);
        SB_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int column = 16 * s + 4 * t + i;
          of_cluster[i] = cluster < p.rank && column < p.head_dim ? load(row + column) : 0.0f;
        }
        SB_UNROLL
        for (int e = 0; e < 4; e += 2)
          add_product(exponent, small,
                      LeftParts(of_queries[0][e], of_queries[1][e], of_queries[0][e + 1], of_queries[1][e + 1]),
                      of_cluster[e], of_cluster[e + 1]);
      }
      float step_top[2] = {top[0], top[1]}, mass[2], weight[2][2];
      SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t c = step * 8 + 2 * t + i;
        const bool is_cluster = c < p.rank;
        const float log = log_of_cluster(p, head, c);
        mass[i] = is_cluster ? load(state() + c * (p.value_pad + 1) + p.value_pad) : 0.0f;
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          float& of_pair = exponent[2 * r + i];
          of_pair += small[2 * r + i];
          of_pair = exponent_of_cluster(of_pair * scale, log);
          if (is_cluster) exponents.set(row_of(r) * width + c, of_pair);
          step_top[r] = larger(step_top[r], of_pair);
        }
      }
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        raise(r, quad_max(step_top[r]));
        SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          weight[i][r] = exp2_of(exponent[2 * r + i] - top[r]);
          of_features.total[r] += weight[i][r] * mass[i];
        }
      }
      add_rows_of_state(step, LeftParts(weight[0][0], weight[0][1], weight[1][0], weight[1][1]));
    }
  }

  // All sums of row r relative to the larger exponent `to`.
  SB_DEVICE void raise(int r, float to) {
    const float scale = exp2_of(top[r] - to);
    top[r] = to;
    if (ballot(!(scale == 1.0f)) == 0) return;
    exact[r] *= scale;
    if (kHasClusters) of_features.total[r] *= scale, removed[r] *= scale;
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) sum[c][2 * r] *= scale, sum[c][2 * r + 1] *= scale;
  }

  // -------------------- listed keys

  // This lane's key of a stage is that at lane % kStage.
  struct Fetched : StageKeys {
    int32_t cluster = 0;
    float log = 0;  // log scale of what a state holds of the key; relative to that of its cluster, if it has one
  };

  // Rows of a stage's keys, of `width` numbers, whose chunks a swizzle leaves within 128 bytes: that of row r is the
  // chunk's byte with those of parity(r) exchanged. A lane copies one chunk of every kLanes-th row.
  template <class Parity>
  SB_DEVICE void copy_rows(const StridedTensor& rows, int32_t of_lane, int64_t width, int to, const Parity& parity) {
    constexpr int kLanes = D / 4, kRowsAtOnce = kWarp / kLanes;
    const int row = lane / kLanes, chunk = lane % kLanes;
    const bool in_row = chunk * 4 < width;
    const float* from = rows.at<const float>(b, kv, first_key) + (in_row ? chunk * 4 : 0);
    const int place = (chunk << 4) ^ parity(row);
    to += base + row * D * 4;
    SB_UNROLL
    for (int j = 0; j < kStage; j += kRowsAtOnce) {
      const int32_t key = shuffle_from(of_lane, row + j);
      copy_async(to + j * D * 4 + (place ^ parity(j)), from + (key < 0 ? 0 : key) * rows.row, in_row && key >= 0);
    }
  }
  SB_DEVICE void fetch_keys(Fetched& of_lane) {
    if (kHasLowRank && of_lane.key >= 0) {
      of_lane.log = load(p.key_log + head * p.k_tokens + first_key + of_lane.key);
      if (kHasClusters) of_lane.cluster = int32_t(cluster_of(p, head, first_key + of_lane.key));
    }
    copy_rows(p.k, of_lane.key, p.head_dim, 0, [](int row) { return moved_by_parity(row); });
    if (kHasQuadratic) SB_UNROLL
    for (int j = 0; j < kStage * 4 / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / 4, chunk = i % 4;
      const int32_t key = shuffle_from(of_lane.key, row);
      copy_async(base + Layout::kCoordinates + row * 64 + chunk * 16,
                 p.key_rows + (head * p.k_tokens + first_key + (key < 0 ? 0 : key)) * 16 + chunk * 4, key >= 0);
    }
    commit_copies();
  }
  SB_DEVICE void fetch_values(const Fetched& of_lane) {
    copy_rows(p.v, of_lane.key, p.value_pad, Layout::kValues, [](int row) { return (row & 7) << 4; });
    commit_copies();
  }

  // next(keys) gives the next stage, or false behind the last. `kIsBehind`: keys behind the tile's state.
  template <bool kIsBehind, class Next>
  SB_DEVICE void add_stages(const Next& next_stage) {
    Fetched next;
    bool has_next = next_stage(next);
    if (!has_next) return;
    fetch_keys(next), fetch_values(next);
    while (has_next) {
      const Fetched of_lane = next;
      has_next = next_stage(next);
      float weight[kKeyTiles][4], root[kKeyTiles][4];
      wait_copies<1>();
      sync_warp();
      multiply_keys(weight, root);
      sync_warp();  // before keys are overwritten
      if (has_next)
        fetch_keys(next);
      else
        commit_copies();
      uint32_t seen[2];
      weigh<kIsBehind>(of_lane, weight, root, seen);
      wait_copies<1>();
      sync_warp();
      if (is_careful) set_aside(weight, seen);
      multiply_values(weight);
      sync_warp();  // before values are overwritten
      if (has_next) fetch_values(next);
    }
    wait_copies<0>();
  }

  // q.k of the stage, and 1 + x.y / 2.
  SB_DEVICE void multiply_keys(float (&weight)[kKeyTiles][4], float (&root)[kKeyTiles][4]) {
    float small[kKeyTiles][4];
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) weight[n][i] = small[n][i] = root[n][i] = 0;
    SB_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      if (s >= p.head_steps) continue;
      float of_queries[2][4];
      queries_of_group(s, of_queries);
      add_products_of_rows(weight, small, of_queries, [&](int n) { return place_in_rows(n, s); });
    }
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) weight[n][i] += small[n][i];
    if (kHasQuadratic) {
      float x_rows[2][4];
      SB_UNROLL
      for (int r = 0; r < 2; ++r) load_four(parked(4 * r) + lane * 16, x_rows[r]);
      add_products_of_rows(root, root, x_rows,
                           [&](int n) { return base + Layout::kCoordinates + (8 * n + g) * 64 + t * 16; });
    }
  }
  // Four columns of this lane, in two products of a depth of 8.
  template <class Place>
  SB_DEVICE void add_products_of_rows(float (&to)[kKeyTiles][4], float (&small)[kKeyTiles][4],
                                      const float (&left)[2][4], const Place& place) const {
    float right[kKeyTiles][4];
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) load_four(place(n), right[n]);
    SB_UNROLL
    for (int e = 0; e < 4; e += 2) {
      const LeftParts parts(left[0][e], left[1][e], left[0][e + 1], left[1][e + 1]);
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) add_product(to[n], small[n], parts, right[n][e], right[n][e + 1]);
    }
  }

  // Scores to weights, less what the state holds of a listed key. `seen`: of rows g and g + 8, which keys they see.
  template <bool kIsBehind>
  SB_DEVICE void weigh(const Fetched& of_lane, float (&weight)[kKeyTiles][4], float (&root)[kKeyTiles][4],
                       uint32_t (&seen)[2]) {
    const uint32_t valid = ballot(of_lane.key >= 0);  // of the keys twice
    // Of rows g and g + 8: keys that they list, and keys that they see and do not list.
    uint32_t listed[2], others[2];
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      listed[r] = kIsRagged ? valid & shuffle_from(of_lane.pattern, row_of(r)) : valid, others[r] = 0;
      if (kIsBehind && kHasQuadratic) others[r] = valid & edges.seen_by(row_of(r), of_lane.begin) & ~listed[r];
      if (!kIsBehind) listed_before[r] += bits_set(listed[r] & ((1u << kStage) - 1));
      seen[r] = listed[r] | others[r];
    }
    if (kIsBehind && kHasQuadratic) SB_UNROLL
    for (int r = 0; r < 2; ++r) rho[r] = shared_array<float>(parked(10 + r)).get(lane);
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
          stage_top[r] = larger(stage_top[r], rho[r] + of_column);
        }
        stage_top[r] = larger(stage_top[r], score);
        if (!kIsBehind && kHasQuadratic) held = is_listed ? of_column * held * held : 0.0f;
        if (kHasClusters) held = is_listed ? of_column : 0.0f;
      }
    }
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float to = quad_max(stage_top[r]);
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
  }

  SB_DEVICE void multiply_values(const float (&weight)[kKeyTiles][4]) {
    const LeftParts parts[kKeyTiles] = {LeftParts(weight[0][0], weight[0][2], weight[0][1], weight[0][3]),
                                        LeftParts(weight[1][0], weight[1][2], weight[1][1], weight[1][3])};
    SB_UNROLL
    for (int span = 0; span < kSpans; ++span) {
      if (span * 32 >= p.value_pad) continue;
      float part[4][4];
      SB_UNROLL
      for (int j = 0; j < 4; ++j) SB_UNROLL
      for (int i = 0; i < 4; ++i) part[j][i] = 0;
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        float value[2][4];
        SB_UNROLL
        for (int e = 0; e < 2; ++e) load_four(of_values[e] + n * 8 * D * 4 + span * 128, value[e]);
        SB_UNROLL
        for (int j = 0; j < 4; ++j) add_product(part[j], part[j], parts[n], value[0][j], value[1][j]);
      }
      add_part(span, part);
    }
  }

  // Values whose parts are no numbers must not meet the weights 0 of rows that do not see their keys, nor the second
  // part of a weight: where a row of values has one, it is added to those that see it alone, and zeros take its place.
  SB_DEVICE void set_aside(const float (&weight)[kKeyTiles][4], const uint32_t (&seen)[2]) {
    const auto at = [&](int key, int column) {
      return shared_array<float>(base + Layout::kValues + swizzled<4 * D>(key, column / 4) + column % 4 * 4);
    };
    const uint32_t bad = keys_without_numbers(D, [&](int key, int column) {
      uint32_t high, low;
      split(at(key, column).get(0), high, low);
      return same_bits<float>(low) * 0.0f == 0.0f;
    });
    if (bad == 0) return;
    SB_NO_UNROLL
    for (int key = 0; key < kStage; ++key) {
      if (!(bad >> key & 1)) continue;
      float of_key[2];
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float even = key < 8 ? weight[0][2 * r] : weight[1][2 * r],
                    odd = key < 8 ? weight[0][2 * r + 1] : weight[1][2 * r + 1];
        of_key[r] = shuffle_from(key % 2 == 0 ? even : odd, lane / 4 * 4 + key % 8 / 2);
      }
      SB_UNROLL
      for (int c = 0; c < kChunks; c += 4) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        sync_warp();  // as for the state
        float value[4];
        load_four(base + Layout::kValues + swizzled<4 * D>(key, column_of(c, i) / 4), value);
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          if (!(seen[r] >> key & 1)) continue;
          SB_UNROLL
          for (int j = 0; j < 4; ++j) sum[c + j][2 * r + i] += of_key[r] * value[j];
        }
      }
    }
    clear_keys(bad, D, [&](int key, int column) { at(key, column).set(0, 0.0f); });
  }
  // Of sum[c][i] and sum[c][2 + i].
  SB_DEVICE int column_of(int c, int i) const { return c / 4 * 32 + 4 * (2 * t + i) + c % 4; }
  SB_DEVICE float exponent_of(int row, int32_t cluster) const {
    return shared_array<float>(base + Layout::kExponents).get(row * Layout::exponent_row(p) + cluster);
  }

  // -------------------- results

  // False where it has to be done again, carefully.
  SB_DEVICE bool finish() {
    if (!is_careful) {
      is_careful = !are_numbers(sum);
      if (is_careful) return false;
    }
    const int32_t in_state = kHasLowRank ? load(p.valid_before + b * p.slots + state_slot) : 0;
    float of_hz = 0;
    if (kHasQuadratic) {
      of_features.set(shared_array<float>(parked(8)).get(lane));
      of_hz = shared_array<float>(parked(9)).get(lane);
    }
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float all_exact = quad_sum(exact[r]), all_removed = quad_sum(removed[r]),
                  all_total = quad_sum(of_features.total[r]), all_squares = quad_sum(of_features.squares[r]);
      const float a = kHasQuadratic ? exp2_of(log_state[r] - top[r]) : 1.0f,
                  lost = kHasQuadratic ? a * correction[r] * all_removed : all_removed, left = a * all_total - lost;
      RowResult<kKind, kIsRagged> result(p, all_exact, lost, left, in_state, listed_before[r]);
      if (kHasQuadratic && in_state > 0) result.flag_large_terms(a, all_squares, of_hz);
      const int64_t query = queries().get(row_of(r));
      if (query < 0) continue;
      if (t == 0) result.store_numbers(p, (b * p.q_heads + h) * p.q_tokens + query, head, top[r]);
      if (result.is_flagged) continue;
      const float inverse = result.inverse();
      float* out = p.out.at<float>(b, h, query);
      SB_UNROLL
      for (int span = 0; span < kSpans; ++span) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = column_of(4 * span, i);
        if (column >= p.value_pad) continue;
        FourWords words;
        SB_UNROLL
        for (int j = 0; j < 4; ++j)
          words.at[j] = same_bits<uint32_t>(result.mean(sum[4 * span + j][2 * r + i], inverse));
        store(reinterpret_cast<FourWords*>(out + column), words);
      }
    }
    return true;
  }

  static constexpr int kCopiesAtOnce = 4;  // of SB_UNROLL_COPIES

  const TileParams& p;
  const int base;  // of the warp's shared memory
  const int32_t b, h, kv, head, first_slot;
  const int lane, g, t;
  int of_row[2], of_values[2];  // bytes of shared memory
  int32_t first_key = 0, state_slot = 0;
  TileEdges edges;
  bool is_careful = false;   // some value is no number
  int32_t listed_before[2];  // keys of the state
  // By row g and g + 8. Sums are relative to exp(top), of the state of features to exp(log_state) times the correction.
  float sum[kChunks][4], top[2], exact[2], removed[2], log_state[2], correction[2], rho[2], kappa_ref = 0;
  FeatureSums of_features;  // with clusters `total` is that of their masses
};

template <int D, LowRank kKind, bool kIsRagged>
SB_KERNEL SB_THREADS_AT_MOST(kMostFloatTileThreads) attention_tile_float(TileParams p) {
  if (kKind == LowRank::kQuadratic) write_feature_table(p);
  for_each_tile<FloatTileLayout<D, kKind>>(p, [&](int base, int32_t b, int32_t h, int32_t first_slot) {
    FloatTile<D, kKind, kIsRagged>(p, base, b, h, first_slot).run();
  });
}

}  // namespace sb::cuda

// Forward pass on tensor cores: a warp computes a tile of 16 query slots that share a list of keys, bidirectional, for
// bfloat16 and float16 (docs/gpu.md). The same sums as attention_forward.cuh's: listed keys and what they take back
// from the state together, then the state's complement in one denominator; the same rule flags a query for float64.
//
// Listed keys come in stages of kStage, whose rows of K and V are copied into the warp's own shared memory while the
// stage before is computed, without a barrier of the block. Weights and values meet in 16 bits; exponents, the two
// sides of the low-rank part and the state are exact to float32, in two or three parts of 16 bits each.
#pragma once
#include "key_list.cuh"
#include "low_rank.cuh"
#include "matrix.h"

namespace sb::cuda {

inline constexpr int kTile = 16;   // query slots of a tile
inline constexpr int kStage = 16;  // keys of a stage
inline constexpr int kRowParts = 3;
// Columns of a query's row of coordinates in shared memory: up to 15 of them, then 1 behind them, and the log scale.
inline constexpr int kRowOfX = 17, kLogOfX = 16;

// Byte of the chunk of 16 bytes `chunk` in row `row` of a matrix in shared memory. Eight rows of one chunk lie in eight
// different groups of banks.
template <int kRowBytes>
SB_HD int64_t swizzled(int row, int chunk) {
  static_assert(kRowBytes % 128 == 0 || kRowBytes == 64);
  if (kRowBytes == 64) return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
  return int64_t(row) * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Shared memory of a warp, in bytes. Queries pass through the first stage's keys.
template <int D, LowRank kKind>
struct TileLayout {
  static constexpr int64_t kMatrix = kStage * D * 2, kCoordinates = kKind == LowRank::kQuadratic ? kStage * 64 : 0,
                           kStageBytes = 2 * kMatrix + kCoordinates, kQueries = 2 * kStageBytes,
                           kX = kQueries + kTile * 4, kExponents = kX;
  static SB_HD int64_t exponent_row(const TileParams& p) { return pad_to(p.rank, 16) + 1; }
  static SB_HD int64_t bytes(const TileParams& p) {
    const int64_t floats = kKind == LowRank::kQuadratic  ? kTile * kRowOfX
                           : kKind == LowRank::kCentroid ? kTile * exponent_row(p)
                                                         : 0;
    return pad_to(kX + floats * 4, 16);
  }
};
// Of a block: which coordinates a feature multiplies, and by what.
inline constexpr int64_t kFeatureTable = kTileFeatures * 8;

template <class E, int D, LowRank kKind>
class Tile {
  typedef TileLayout<D, kKind> Layout;
  static constexpr bool kHasQuadratic = kKind == LowRank::kQuadratic, kHasClusters = kKind == LowRank::kCentroid,
                        kHasLowRank = kKind != LowRank::kNone;
  static constexpr int kChunks = D / 8, kSteps = D / 16, kKeyTiles = kStage / 8;

 public:
  SB_DEVICE Tile(const TileParams& p, int64_t base, int64_t b, int64_t h, int64_t first_slot)
      : p(p),
        base(base),
        b(b),
        h(h),
        kv(p.kv_head(h)),
        head(b * p.kv_heads + kv),
        first_slot(first_slot),
        lane(lane_index()),
        g(lane / 4),
        t(lane % 4),
        queries(shared_array<int32_t>(base + Layout::kQueries)),
        x(shared_array<float>(base + Layout::kX)) {}

  SB_DEVICE void run() {
    const RowRange range = load(p.rows + b);
    if (!find_queries(range)) return;
    const KeyList list(p, range, b, h, first_slot, edge_of_slot(p, range, first_slot));
    first_key = range.k_first;
    read_queries();
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] = 0;
    SB_UNROLL
    for (int r = 0; r < 2; ++r)
      top[r] = float(kLowestLog), exact[r] = removed[r] = total[r] = squares[r] = 0, correction[r] = 1;
    if (kHasQuadratic) add_state_of_features();
    if (kHasClusters) add_state_of_clusters();
    sync_warp();  // the queries' place is free
    add_listed(list);
    finish();
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
    if (lane < kTile) queries.set(lane, query);
    sync_warp();
    return ballot(query >= 0) != 0;
  }

  SB_DEVICE void read_queries() {
    for (int i = lane; i < kTile * kChunks; i += kWarp) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int64_t query = queries.get(row);
      const bool is_there = query >= 0 && chunk * 8 < p.head_dim;
      copy_async(base + swizzled<2 * D>(row, chunk),
                 p.q.at<const E>(b, h, is_there ? query : 0) + (is_there ? chunk * 8 : 0), is_there);
    }
    commit_copies();
    if (kHasQuadratic) {
      for (int i = lane; i < kTile * kRowOfX; i += kWarp) {
        const int row = i / kRowOfX, column = i % kRowOfX;
        const int64_t query = queries.get(row);
        float value = 0;
        if (query >= 0 && (column <= p.rank || column == kLogOfX)) {
          const MapRow<float, float> of_query(p.x_map, b, h, query);
          value = column == kLogOfX ? of_query.log() : column == p.rank ? 1.0f : of_query(column);
        }
        x.set(i, value);
      }
    }
    wait_copies<0>();
    sync_warp();
    SB_UNROLL
    for (int k = 0; k < kSteps; ++k) load_matrices(base + swizzled<2 * D>(lane % 16, 2 * k + lane / 16), q_operand[k]);
  }

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

  // sum += features rows [16 step, 16 step + 16) of the state; both in two parts.
  SB_DEVICE void add_rows_of_state(int64_t step, const uint32_t (&high)[4], const uint32_t (&low)[4]) {
    const FourWords* state =
        p.state_operand + ((head * (p.features_padded / 16) + step) * p.value_chunks) * kWarp + lane;
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      if (c >= p.value_chunks) continue;
      const FourWords of_state = load(state + c * kWarp);
      multiply_add(sum[c], low, of_state.at[0], of_state.at[1], Bfloat16{});
      multiply_add(sum[c], high, of_state.at[2], of_state.at[3], Bfloat16{});
      multiply_add(sum[c], high, of_state.at[0], of_state.at[1], Bfloat16{});
    }
  }

  // F(x) H and F(x).hz, over exp(rho + kappa_ref); also x as an operand: half of the coordinates, then 1.
  SB_DEVICE void add_state_of_features() {
    const float kappa_ref = load(static_cast<const float*>(p.state_log) + head * p.slots + p.slots - 1);
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float rho = x.get(row_of(r) * kRowOfX + kLogOfX);
      top[r] = rho + kappa_ref;
      const float back = top[r] - rho;
      // What the sum lost to rounding.
      correction[r] = exp2_of((rho - (top[r] - back)) + (kappa_ref - back));
      log_state[r] = top[r];
      SB_UNROLL
      for (int e = 0; e < 2; ++e) {
        float pair[2];
        SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int column = 2 * t + 8 * e + i;
          const float value = x.get(row_of(r) * kRowOfX + column);
          pair[i] = column < p.rank ? 0.5f * value : value;
        }
        uint32_t parts[2];
        split(pair[0], pair[1], parts, Bfloat16{});
        x_high[2 * e + r] = parts[0], x_low[2 * e + r] = parts[1];
      }
    }
    const auto table = shared_array<uint32_t>(0);
    const auto factors = shared_array<float>(kTileFeatures * 4);
    const float* hz = p.state_sums + head * p.features_padded;
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
            const float value = factor * x.get(row + int(which & 255)) * x.get(row + int(which >> 8));
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
          const FourWords* parts =
              p.cluster_operand +
              (((head * (p.features_padded / 8) + 2 * step + n) * p.head_steps + k) * kWarp + lane) * 2;
          const FourWords first = load(parts), second = load(parts + 1);
          multiply_add(exponent[n], q_operand[k], second.at[0], second.at[1], E{});
          multiply_add(exponent[n], q_operand[k], first.at[2], first.at[3], E{});
          multiply_add(exponent[n], q_operand[k], first.at[0], first.at[1], E{});
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

  // This lane's key of a stage, lane % kStage; -1: none.
  struct Fetched {
    int32_t key, cluster;
    float log;  // of what the state holds of the key, without the query's share
  };

  SB_DEVICE Fetched fetch(const KeyList& list, int64_t begin, int buffer) {
    const int64_t position = begin + lane % kStage;
    Fetched of_lane{-1, 0, 0};
    if (position < list.positions()) of_lane.key = int32_t(list.key_at(position));
    if (kHasLowRank && of_lane.key >= 0) {
      of_lane.log = load(p.key_log + head * p.k_tokens + first_key + of_lane.key);
      if (kHasClusters) of_lane.cluster = int32_t(cluster_of(p, head, first_key + of_lane.key));
    }
    const int64_t to = base + buffer * Layout::kStageBytes;
    SB_UNROLL_BY_2
    for (int j = 0; j < kStage * kChunks / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / kChunks, chunk = i % kChunks;
      const int32_t key = shuffle_from(of_lane.key, row);
      const int64_t at = first_key + (key < 0 ? 0 : key);
      const bool in_key = key >= 0 && chunk * 8 < p.head_dim, in_value = key >= 0 && chunk < p.value_chunks;
      copy_async(to + swizzled<2 * D>(row, chunk), p.k.at<const E>(b, kv, at) + (in_key ? chunk * 8 : 0), in_key);
      copy_async(to + Layout::kMatrix + swizzled<2 * D>(row, chunk),
                 p.v.at<const E>(b, kv, at) + (in_value ? chunk * 8 : 0), in_value);
    }
    if (kHasQuadratic) SB_UNROLL
    for (int j = 0; j < kStage * 4 / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / 4, chunk = i % 4;
      const int32_t key = shuffle_from(of_lane.key, row);
      copy_async(to + 2 * Layout::kMatrix + swizzled<64>(row, chunk),
                 p.key_coordinates + (head * p.k_tokens + first_key + (key < 0 ? 0 : key)) * 32 + chunk * 8, key >= 0);
    }
    return of_lane;
  }

  SB_DEVICE void add_listed(const KeyList& list) {
    const int64_t positions = list.positions();
    Fetched next = fetch(list, 0, 0);
    commit_copies();
    int buffer = 0;
    for (int64_t begin = 0; begin < positions; begin += kStage) {
      const Fetched of_lane = next;
      if (begin + kStage < positions) next = fetch(list, begin + kStage, 1 - buffer);
      commit_copies();
      wait_copies<1>();
      sync_warp();
      add_stage(of_lane, base + buffer * Layout::kStageBytes);
      sync_warp();  // before the buffer is filled again
      buffer = 1 - buffer;
    }
    wait_copies<0>();
  }

  SB_DEVICE void add_stage(const Fetched& of_lane, int64_t from) {
    const uint32_t valid = ballot(of_lane.key >= 0);  // of the keys twice
    listed += bits_set(valid & ((1u << kStage) - 1));
    float weight[kKeyTiles][4], root[kKeyTiles][4];
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) weight[n][i] = root[n][i] = 0;
    SB_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      if (k >= p.head_steps) continue;
      uint32_t keys[4];
      load_matrices(from + swizzled<2 * D>(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2), keys);
      multiply_add(weight[0], q_operand[k], keys[0], keys[1], E{});
      multiply_add(weight[1], q_operand[k], keys[2], keys[3], E{});
    }
    if (kHasQuadratic) {
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        uint32_t y[4];  // the two halves of the first part, then of the second
        load_matrices(from + 2 * Layout::kMatrix + swizzled<64>(n * 8 + lane % 8, lane / 8), y);
        multiply_add(root[n], x_low, y[0], y[1], Bfloat16{});
        multiply_add(root[n], x_high, y[2], y[3], Bfloat16{});
        multiply_add(root[n], x_high, y[0], y[1], Bfloat16{});
      }
    }

    // Scores in base 2, and what the state holds of a pair.
    const float scale = float(p.scale * kLog2e), own_share = kHasLowRank ? exp2_of(of_lane.log) : 0.0f;
    float stage_top[2] = {top[0], top[1]};
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      const bool is_listed = valid >> column & 1;
      const float share = kHasLowRank ? shuffle_from(own_share, column) : 0.0f;
      const int32_t cluster = kHasClusters ? shuffle_from(of_lane.cluster, column) : 0;
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        float &score = weight[n][2 * r + i], &held = root[n][2 * r + i];
        score = is_listed ? score * scale : float(kLowestLog);
        stage_top[r] = larger(stage_top[r], score);
        if (kHasQuadratic) held = is_listed ? share * held * held : 0.0f;
        if (kHasClusters) held = is_listed ? share : 0.0f, exponent[n][2 * r + i] = exponent_of(row_of(r), cluster);
      }
    }
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      float to = quad_max(stage_top[r]);
      if (kHasQuadratic && kIsHalf) {
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
        float &of_pair = weight[n][2 * r + i], held = root[n][2 * r + i];
        of_pair = exp2_of(of_pair - to);
        if (!(valid >> (8 * n + 2 * t + i) & 1)) of_pair = 0;  // all scores of a row may be the lowest
        exact[r] += of_pair;
        if (kHasQuadratic) removed[r] += held, of_pair -= of_state * held;
        if (kHasClusters) {
          held *= exp2_of(exponent[n][2 * r + i] - to);
          removed[r] += held, of_pair -= held;
        }
      }
    }
    const uint32_t left[4] = {packed(weight[0][0], weight[0][1], E{}), packed(weight[0][2], weight[0][3], E{}),
                              packed(weight[1][0], weight[1][1], E{}), packed(weight[1][2], weight[1][3], E{})};
    SB_UNROLL
    for (int c = 0; c < kChunks; c += 2) {
      if (c >= p.value_chunks) continue;
      uint32_t values[4];
      load_transposed(from + Layout::kMatrix + swizzled<2 * D>(lane % 16, c + lane / 16), values);
      multiply_add(sum[c], left, values[0], values[1], E{});
      multiply_add(sum[c + 1], left, values[2], values[3], E{});
    }
  }
  SB_DEVICE float exponent_of(int row, int32_t cluster) const {
    return shared_array<float>(base + Layout::kExponents).get(row * Layout::exponent_row(p) + cluster);
  }

  // -------------------- results

  SB_DEVICE void finish() {
    const int64_t unlisted = kHasLowRank ? load(p.valid_before + b * p.slots + p.slots - 1) - listed : 0;
    const float of_hz = kHasQuadratic ? quad_sum(squares_of_state) : 0.0f;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float all_exact = quad_sum(exact[r]), all_removed = quad_sum(removed[r]), all_total = quad_sum(total[r]),
                  all_squares = quad_sum(squares[r]);
      const float a = kHasQuadratic ? exp2_of(log_state[r] - top[r]) : 1.0f,
                  lost = kHasQuadratic ? a * correction[r] * all_removed : all_removed, left = a * all_total - lost,
                  den = all_exact + (left < 0.0f ? 0.0f : left);
      bool is_flagged = false;
      if (kHasLowRank) is_flagged = unlisted <= kByKeyLimit || !(lost <= float(p.fallback_bound) * den) || lost > 1e37f;
      if (kHasQuadratic) {
        const double terms = double(a) * double(a) * double(all_squares) * double(of_hz);
        is_flagged = is_flagged || !(terms <= kTermsBound * kTermsBound * double(den) * double(den));
      }
      const int64_t query = queries.get(row_of(r));
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
  }

  static constexpr bool kIsHalf = std::is_same_v<E, Half>;

  const TileParams& p;
  const int64_t base, b, h, kv, head, first_slot;
  const int lane, g, t;
  const Shared<int32_t> queries;
  const Shared<float> x;
  int64_t first_key = 0;
  int32_t listed = 0;
  uint32_t q_operand[kSteps][4];  // of the tile's queries
  uint32_t x_high[4], x_low[4];
  // By row g and g + 8. Sums are relative to exp(top), of the state of features to exp(log_state) times the correction.
  float sum[kChunks][4], top[2], exact[2], removed[2], total[2], squares[2], log_state[2], correction[2];
  float squares_of_state = 0;
  float exponent[kKeyTiles][4];  // of the clusters of a stage's pairs
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

template <class E, int D, LowRank kKind>
SB_KERNEL SB_THREADS_AT_MOST(kMostTileThreads) attention_tile(TileParams p) {
  if (kKind == LowRank::kQuadratic) write_feature_table(p);
  const int64_t tiles = ceil_div(p.q_tokens, kTile), all = p.batch * p.q_heads * tiles, warps = block_threads() / kWarp;
  const int64_t base = kFeatureTable + warp_index() * TileLayout<D, kKind>::bytes(p);
  for_each_task(ceil_div(all, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index(), row = at / tiles;
    if (at >= all) return;
    Tile<E, D, kKind>(p, base, row / p.q_heads, row % p.q_heads, at % tiles * kTile).run();
  });
}

// -------------------- operands

// The state by rows of 16 features and columns of 8 values, as the right operand of a product, in two parts; and hz.
SB_KERNEL tile_state(TileParams p) {
  const int64_t steps = p.features_padded / 16, columns = p.value_pad + 1, size = steps * p.value_chunks * kWarp;
  for_each_element(p.batch * p.kv_heads * size, [&](int64_t at) {
    const int64_t head = at / size, step = at / (p.value_chunks * kWarp) % steps, chunk = at / kWarp % p.value_chunks;
    const int g = int(at % kWarp / 4), t = int(at % 4);
    const float* state = static_cast<const float*>(p.kv_state) + (head * p.slots + p.slots - 1) * p.slot_size;
    const auto entry = [&](int64_t f, int64_t column) {
      return f < p.features ? load(state + f * columns + column) : 0.0f;
    };
    FourWords words;
    SB_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t f = step * 16 + 2 * t + 8 * half, column = chunk * 8 + g;
      uint32_t parts[2];
      split(entry(f, column), entry(f + 1, column), parts, Bfloat16{});
      words.at[half] = parts[0], words.at[2 + half] = parts[1];
      if (chunk == 0 && g == 0) SB_UNROLL
      for (int i = 0; i < 2; ++i) store(p.state_sums + head * p.features_padded + f + i, entry(f + i, p.value_pad));
    }
    store(p.state_operand + at, words);
  });
}

// What a listed key takes back: its log scale over that of the state, and of the quadratic kernel its coordinates, then
// 1, as rows of 16 in two parts.
template <LowRank kKind>
SB_KERNEL tile_keys(TileParams p) {
  for_each_element(p.batch * p.kv_heads * p.k_tokens, [&](int64_t at) {
    const int64_t head = at / p.k_tokens, j = at % p.k_tokens;
    if (kKind == LowRank::kCentroid) {
      const float largest = load(static_cast<const float*>(p.cluster_log) + head * p.rank + cluster_of(p, head, j));
      store(p.key_log + at, log_mass_of<float, float>(p, head, j) - largest);
      return;
    }
    const MapRow<float, float> y(p.y_map, head / p.kv_heads, head % p.kv_heads, j);
    store(p.key_log + at, y.log() - load(static_cast<const float*>(p.state_log) + head * p.slots + p.slots - 1));
    auto* rows = reinterpret_cast<uint32_t*>(p.key_coordinates + at * 32);
    for (int64_t a = 0; a < 16; a += 2) {
      const auto coordinate = [&](int64_t i) { return i < p.rank ? y(i) : i == p.rank ? 1.0f : 0.0f; };
      uint32_t parts[2];
      split(coordinate(a), coordinate(a + 1), parts, Bfloat16{});
      store(rows + a / 2, parts[0]), store(rows + 8 + a / 2, parts[1]);
    }
  });
}

// Representatives by columns of 8 clusters and rows of 16 of their entries, as the right operand, in three parts.
template <class E>
SB_KERNEL tile_clusters(TileParams p) {
  const int64_t columns = p.features_padded / 8, size = columns * p.head_steps * kWarp;
  for_each_element(p.batch * p.kv_heads * size, [&](int64_t at) {
    const int64_t head = at / size, c = at / (p.head_steps * kWarp) % columns * 8 + at % kWarp / 4,
                  step = at / kWarp % p.head_steps;
    const float* row = static_cast<const float*>(p.given_representatives) + (head * p.rank + c) * p.head_dim;
    const auto entry = [&](int64_t e) { return c < p.rank && e < p.head_dim ? load(row + e) : 0.0f; };
    FourWords words[2];
    SB_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t e = step * 16 + at % 4 * 2 + 8 * half;
      uint32_t parts[kRowParts];
      split(entry(e), entry(e + 1), parts, E{});
      words[0].at[half] = parts[0], words[0].at[2 + half] = parts[1];
      words[1].at[half] = parts[2], words[1].at[2 + half] = 0;
    }
    SB_UNROLL
    for (int i = 0; i < 2; ++i) store(p.cluster_operand + 2 * at + i, words[i]);
  });
}

}  // namespace sb::cuda

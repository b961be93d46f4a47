// Backward pass of queries on tensor cores: a warp computes a tile of 16 query slots that share a list of keys,
// bidirectional, for bfloat16 and float16 (docs/gpu.md). It goes through the list twice: for the record of every slot,
// which says what a weight is and what the mean of dO.v is, and for gradients. The same sums as those of
// attention_forward.cuh and attention_backward_queries.cuh, whose place it takes.
//
// Stages of keys come as in the forward pass. Gradients of scores meet keys in bfloat16, or in two parts of float16;
// those of x.y meet coordinates in two parts of bfloat16. dO.v, exponents and the state are exact to float32.
#pragma once
#include "attention_backward.cuh"
#include "tile_memory.cuh"

namespace sb::cuda {

// Columns of a slot's rows in shared memory: up to 15 numbers, and one more at kLastColumn.
inline constexpr int kRowWidth = 17, kLastColumn = 16;
inline constexpr int kBackwardTileThreads = 128;

// Shared memory of a warp, in bytes. `rows`: by slot, x with its log scale and the gradients by x that come from dO H
// and from hz; or exponents of clusters and their gradients. dO H passes through the stages.
template <int D, LowRank kKind>
struct BackwardTileLayout {
  static constexpr int64_t kMatrix = kStage * D * 2, kCoordinates = kKind == LowRank::kQuadratic ? kStage * 64 : 0,
                           kStageBytes = 2 * kMatrix + kCoordinates, kGradients = kMatrix, kStages = 2 * kMatrix,
                           kQueries = kStages + 2 * kStageBytes, kRows = kQueries + kTile * 4,
                           kSmallRow = kTile * kRowWidth * 4, kPairs = kRows + 3 * kSmallRow;
  static_assert(kKind != LowRank::kQuadratic || (kTile + 1) * (kTileFeatures + 1) * 4 <= 2 * kStageBytes);
  // Of a slot's exponents.
  static SB_HD int32_t width(const ForwardParams& p) { return int32_t(pad_to(p.rank, 16)) + 1; }
  static SB_HD int64_t bytes(const ForwardParams& p) {
    if (kKind == LowRank::kQuadratic) return kPairs;
    return kKind == LowRank::kCentroid ? pad_to(kRows + (2 * width(p) + kRowWidth) * kTile * 4, 16) : kRows;
  }
};

template <class E, int D, LowRank kKind>
class BackwardTile {
  typedef BackwardTileLayout<D, kKind> Layout;
  static constexpr bool kHasQuadratic = kKind == LowRank::kQuadratic, kHasClusters = kKind == LowRank::kCentroid,
                        kHasLowRank = kKind != LowRank::kNone, kIsHalf = std::is_same_v<E, Half>;
  static constexpr int kChunks = D / 8, kSteps = D / 16, kKeyTiles = kStage / 8, kGradientRow = kTileFeatures + 1;

 public:
  SB_DEVICE BackwardTile(const BackwardTileParams& p, int64_t base, int64_t b, int64_t h, int64_t first_slot)
      : p(p),
        base(int32_t(base)),
        b(int32_t(b)),
        h(int32_t(h)),
        kv(int32_t(p.kv_head(h))),
        head(b * p.kv_heads + kv),
        first_slot(int32_t(first_slot)),
        lane(lane_index()),
        g(lane / 4),
        t(lane % 4),
        queries(shared_array<int32_t>(base + Layout::kQueries)),
        x(shared_array<float>(base + Layout::kRows)),
        d_x(shared_array<float>(base + Layout::kRows + Layout::kSmallRow)),
        of_hz(shared_array<float>(base + Layout::kRows + 2 * Layout::kSmallRow)) {}

  SB_DEVICE void run() {
    const RowRange range = load(p.rows + b);
    if (!find_queries(range)) return;
    const KeyList list(p, range, b, h, first_slot, edge_of_slot(p, range, first_slot));
    first_key = range.k_first;
    read_queries();
    SB_UNROLL
    for (int r = 0; r < 2; ++r) sums[r] = Sums{}, slot[r] = Slot{}, log_state[r] = 0, correction[r] = 1;
    if (kHasQuadratic) add_state_of_features();
    if (kHasClusters) add_state_of_clusters();
    go_through<false>(list);
    if (!write_records()) return;
    if (kHasClusters) weigh_state_of_clusters();
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) dq[c][i] = 0;
    SB_UNROLL
    for (int c = 0; c < 2; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) dx[c][i] = 0;
    go_through<true>(list);
    finish();
  }

 private:
  // Of row g or g + 8 and of this lane's pairs. `exact`, `removed` and `total` are weights of listed keys, of what they
  // take back and of all that the state holds; the others their sums times dO.v. Relative to exp(top); of the state of
  // features all lanes have the whole, relative to exp(log_state) times the correction.
  struct Sums {
    float top = float(kLowestLog), exact = 0, exact_value = 0, removed = 0, removed_value = 0, total = 0,
          total_value = 0, largest = 0;
  };
  // What gradients are from, as SlotRecord, `shift` for the delta with its correction; `scale` keeps gradients of
  // scores inside of float16.
  struct Slot {
    float log = 0, inverse = 0, state_weight = 0, shift = 0, scale = 1;
  };

  // -------------------- the tile's queries

  // Whether there are any.
  SB_DEVICE bool find_queries(const RowRange& range) {
    int32_t query = -1;
    if (lane < kTile && first_slot + lane < slots_of_row(p, range)) {
      const int64_t at = query_of_slot(p, range, b, h, first_slot + lane);
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
      const int64_t query = queries.get(row), from = query < 0 ? 0 : query;
      const bool in_query = query >= 0 && chunk * 8 < p.head_dim, in_value = query >= 0 && chunk * 8 < p.value_pad;
      copy_async(base + swizzled<2 * D>(row, chunk), p.q.at<const E>(b, h, from) + (in_query ? chunk * 8 : 0),
                 in_query);
      copy_async(base + Layout::kGradients + swizzled<2 * D>(row, chunk),
                 p.d_out.at<const E>(b, h, from) + (in_value ? chunk * 8 : 0), in_value);
    }
    commit_copies();
    if (kHasQuadratic)
      for (int i = lane; i < kTile * kRowWidth; i += kWarp) {
        const int row = i / kRowWidth, column = i % kRowWidth;
        const int64_t query = queries.get(row);
        float value = 0;
        if (query >= 0 && (column <= p.rank || column == kLastColumn)) {
          const MapRow<float, float> of_query(p.x_map, b, h, query);
          value = column == kLastColumn ? of_query.log() : column == p.rank ? 1.0f : of_query(column);
        }
        x.set(i, value), d_x.set(i, 0.0f), of_hz.set(i, 0.0f);
      }
    wait_copies<0>();
    sync_warp();
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

  // sum[n] += dO times columns [8 (first + n), 8 (first + n) + 8) of the state.
  template <int kCount>
  SB_DEVICE void multiply_state(int64_t first, float (&sum)[kCount][4]) const {
    const int64_t columns = p.features_padded / 8;
    add_product_of_tokens<E, D>(base + Layout::kGradients, p.value_steps,
                                p.state_operand + head * p.value_steps * columns * kWarp, columns, first, sum);
  }

  // The gradients by x that come from dO H and, not yet times -dO.o, from hz: F'(x) of both, by a lane each. With them
  // F(x) dO H and F(x).hz, over exp(rho + kappa_ref). Also x as an operand: half of
  // the coordinates, then 1.
  SB_DEVICE void add_state_of_features() {
    const auto gradients = shared_array<float>(base + Layout::kStages);
    float of_feature[kTileFeatures / 8][4];
    SB_UNROLL
    for (int n = 0; n < kTileFeatures / 8; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) of_feature[n][i] = 0;
    multiply_state(0, of_feature);
    SB_UNROLL
    for (int n = 0; n < kTileFeatures / 8; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) gradients.set(row_of(i / 2) * kGradientRow + 8 * n + 2 * t + i % 2, of_feature[n][i]);
    for (int64_t f = lane; f < p.features_padded; f += kWarp) {
      const float of_state = load(p.state_sums + head * p.features_padded + f);
      gradients.set(kTile * kGradientRow + f, of_state);
      squares_of_state += of_state * of_state;
    }
    squares_of_state = warp_sum(squares_of_state);
    sync_warp();
    const int row = lane % kTile, place = row * kRowWidth, from = (lane < kTile ? row : kTile) * kGradientRow;
    const auto to = shared_array<float>(base + Layout::kRows + (lane < kTile ? 1 : 2) * Layout::kSmallRow);
    QuadraticKernel::chain(
        p.rank, 1.0f, [&](int64_t a) { return x.get(place + a); }, [&](int64_t f) { return gradients.get(from + f); },
        [&](int64_t a) { return to.get(place + a); }, [&](int64_t a, float value) { to.set(place + a, value); });
    float product = 0;  // F(x) of both, which F'(x) has all terms of
    for (int64_t a = 0; a < p.rank; ++a) product += x.get(place + a) * to.get(place + a);
    to.set(place + kLastColumn, to.get(place + p.rank) + 0.5f * product);
    sync_warp();

    const float kappa_ref = load(static_cast<const float*>(p.state_log) + head * p.slots + p.slots - 1);
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int at = row_of(r) * kRowWidth;
      const float rho = x.get(at + kLastColumn);
      log_state[r] = rho + kappa_ref;
      const float back = log_state[r] - rho;
      // What the sum lost to rounding.
      correction[r] = exp2_of((rho - (log_state[r] - back)) + (kappa_ref - back));
      sums[r].top = log_state[r];
      sums[r].total = of_hz.get(at + kLastColumn), sums[r].total_value = d_x.get(at + kLastColumn);
      SB_UNROLL
      for (int e = 0; e < 2; ++e) {
        float pair[2];
        SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int column = 2 * t + 8 * e + i;
          const float value = x.get(at + column);
          pair[i] = column < p.rank ? 0.5f * value : value;
        }
        uint32_t parts[2];
        split(pair[0], pair[1], parts, Bfloat16{});
        x_high[2 * e + r] = parts[0], x_low[2 * e + r] = parts[1];
      }
    }
  }

  // Exponents of the clusters and dO H, 16 at a time; both stay in shared memory, for the listed keys and for later.
  SB_DEVICE void add_state_of_clusters() {
    const float scale = float(p.scale * kLog2e);
    for (int64_t step = 0; step < p.features_padded / 16; ++step) {
      float exponent[2][4], of_state[2][4];
      SB_UNROLL
      for (int n = 0; n < 2; ++n) SB_UNROLL
      for (int i = 0; i < 4; ++i) exponent[n][i] = of_state[n][i] = 0;
      SB_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        if (k >= p.head_steps) continue;
        uint32_t q[4];
        load_left<2 * D>(base, k, q);
        SB_UNROLL
        for (int n = 0; n < 2; ++n) {
          const FourWords* parts =
              p.cluster_operand +
              (((head * (p.features_padded / 8) + 2 * step + n) * p.head_steps + k) * kWarp + lane) * 2;
          const FourWords first = load(parts), second = load(parts + 1);
          multiply_add(exponent[n], q, second.at[0], second.at[1], E{});
          multiply_add(exponent[n], q, first.at[2], first.at[3], E{});
          multiply_add(exponent[n], q, first.at[0], first.at[1], E{});
        }
      }
      multiply_state(2 * step, of_state);
      SB_UNROLL
      for (int n = 0; n < 2; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t c = step * 16 + 8 * n + 2 * t + i;
        const float largest =
            c < p.rank ? load(static_cast<const float*>(p.cluster_log) + head * p.rank + c) : float(kLowestLog);
        const float mass = load(p.state_sums + head * p.features_padded + c);
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          Sums& of = sums[r];
          const float of_pair =
              largest > float(kNoKeyLog) ? exponent[n][2 * r + i] * scale + largest : float(kLowestLog);
          exponents().set(row_of(r) * width() + c, of_pair);
          d_exponents().set(row_of(r) * width() + c, of_state[n][2 * r + i]);
          if (largest > float(kNoKeyLog)) {
            raise(of, of_pair);
            const float weight = exp2_of(of_pair - of.top);
            of.total += weight * mass, of.total_value += weight * of_state[n][2 * r + i];
          }
        }
      }
    }
    sync_warp();
  }

  // In place of dO H, the gradients by exponents that the state gives.
  SB_DEVICE void weigh_state_of_clusters() {
    for (int64_t c = 2 * t; c < p.features_padded; c += 8) SB_UNROLL
    for (int i = 0; i < 2; ++i) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Slot& of = slot[r];
      const int64_t at = row_of(r) * width() + c + i;
      const float mass = load(p.state_sums + head * p.features_padded + c + i);
      d_exponents().set(at,
                        exp2_of(exponents().get(at) - of.log) * of.inverse * (d_exponents().get(at) - of.shift * mass));
    }
    sync_warp();
  }

  SB_DEVICE int32_t width() const { return Layout::width(p); }
  SB_DEVICE Shared<float> exponents() const { return shared_array<float>(base + Layout::kRows); }
  SB_DEVICE Shared<float> d_exponents() const {
    return shared_array<float>(base + Layout::kRows + width() * kTile * 4);
  }
  SB_DEVICE Shared<float> pairs() const { return shared_array<float>(base + Layout::kRows + 2 * width() * kTile * 4); }

  // All sums relative to the larger exponent `to`, if it is larger.
  SB_DEVICE static void raise(Sums& of, float to) {
    if (to <= of.top) return;
    const float scale = exp2_of(of.top - to);
    of.top = to, of.exact *= scale, of.exact_value *= scale;
    if (kHasClusters) of.removed *= scale, of.removed_value *= scale, of.total *= scale, of.total_value *= scale;
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
      if (kHasQuadratic) of_lane.log -= load(static_cast<const float*>(p.state_log) + head * p.slots + p.slots - 1);
      if (kHasClusters) of_lane.cluster = int32_t(cluster_of(p, head, first_key + of_lane.key));
    }
    const int64_t to = stage(buffer);
    SB_UNROLL_BY_2
    for (int j = 0; j < kStage * kChunks / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / kChunks, chunk = i % kChunks;
      const int32_t key = shuffle_from(of_lane.key, row);
      const int64_t at = first_key + (key < 0 ? 0 : key);
      const bool in_key = key >= 0 && chunk * 8 < p.head_dim, in_value = key >= 0 && chunk * 8 < p.value_pad;
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
  SB_DEVICE int64_t stage(int buffer) const { return base + Layout::kStages + buffer * Layout::kStageBytes; }

  template <bool kForGradients>
  SB_DEVICE void go_through(const KeyList& list) {
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
      add_stage<kForGradients>(of_lane, stage(buffer));
      sync_warp();  // before the buffer is filled again
      buffer = 1 - buffer;
    }
    wait_copies<0>();
  }

  template <bool kForGradients>
  SB_DEVICE void add_stage(const Fetched& of_lane, int64_t from) {
    const uint32_t valid = ballot(of_lane.key >= 0);                     // of the keys twice
    float score[kKeyTiles][4], value[kKeyTiles][4], root[kKeyTiles][4];  // q.k; dO.v; 1 + x.y / 2
    SB_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) score[n][i] = value[n][i] = root[n][i] = 0;
    SB_UNROLL
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

    const float scale = float(p.scale * kLog2e), own_share = kHasLowRank ? exp2_of(of_lane.log) : 0.0f;
    if constexpr (kForGradients) {
      uint32_t d_score[4], d_rest[4], d_high[4], d_low[4];
      float d_product[kKeyTiles][4];  // of x.y, or of the exponent of a cluster
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        float ds[4];
        SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + 2 * t + i;
          const bool is_listed = valid >> column & 1;
          const float share = kHasLowRank ? shuffle_from(own_share, column) : 0.0f;
          const int32_t cluster = kHasClusters ? shuffle_from(of_lane.cluster, column) : 0;
          SB_UNROLL
          for (int r = 0; r < 2; ++r) {
            const Slot& of = slot[r];
            const int at = 2 * r + i;
            const float gradient = value[n][at] - of.shift;
            ds[at] = is_listed ? exp2_of(score[n][at] * scale - of.log) * of.inverse * gradient : 0.0f;
            if (kIsHalf) ds[at] *= of.scale;
            if (kHasQuadratic) d_product[n][at] = is_listed ? -(of.state_weight * share) * root[n][at] * gradient : 0;
            if (kHasClusters)
              d_product[n][at] =
                  is_listed ? -(share * exp2_of(exponent_of(row_of(r), cluster) - of.log) * of.inverse) * gradient : 0;
          }
        }
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          uint32_t parts[2];
          split(ds[2 * r], ds[2 * r + 1], parts, E{});
          d_score[2 * n + r] = parts[0], d_rest[2 * n + r] = parts[1];
          if (kHasQuadratic) {
            split(d_product[n][2 * r], d_product[n][2 * r + 1], parts, Bfloat16{});
            d_high[2 * n + r] = parts[0], d_low[2 * n + r] = parts[1];
          }
        }
      }
      SB_UNROLL
      for (int c = 0; c < kChunks; c += 2) {
        if (c * 8 >= p.head_dim) continue;
        uint32_t keys[4];
        load_transposed(from + swizzled<2 * D>(lane % 16, c + lane / 16), keys);
        if (kIsHalf) {
          multiply_add(dq[c], d_rest, keys[0], keys[1], E{});
          multiply_add(dq[c + 1], d_rest, keys[2], keys[3], E{});
        }
        multiply_add(dq[c], d_score, keys[0], keys[1], E{});
        multiply_add(dq[c + 1], d_score, keys[2], keys[3], E{});
      }
      if (kHasQuadratic) {
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
      if (kHasClusters) add_to_clusters(of_lane, valid, d_product);
    } else {
      listed += bits_set(valid & ((1u << kStage) - 1));
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        Sums& of = sums[r];
        float to = of.top;
        SB_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          float& of_pair = score[n][2 * r + i];
          of_pair = valid >> (8 * n + 2 * t + i) & 1 ? of_pair * scale : float(kLowestLog);
          to = larger(to, of_pair);
        }
        raise(of, to);
      }
      SB_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + 2 * t + i;
        const bool is_listed = valid >> column & 1;
        const float share = kHasLowRank ? shuffle_from(own_share, column) : 0.0f;
        const int32_t cluster = kHasClusters ? shuffle_from(of_lane.cluster, column) : 0;
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          Sums& of = sums[r];
          const float of_value = value[n][2 * r + i], of_root = root[n][2 * r + i];
          const float weight = is_listed ? exp2_of(score[n][2 * r + i] - of.top) : 0.0f;
          of.exact += weight, of.exact_value += weight * of_value;
          if (kIsHalf) of.largest = larger(of.largest, of_value < 0 ? -of_value : of_value);
          float held = 0;
          if (kHasQuadratic) held = is_listed ? share * of_root * of_root : 0.0f;
          if (kHasClusters) held = is_listed ? share * exp2_of(exponent_of(row_of(r), cluster) - of.top) : 0.0f;
          if (kHasLowRank) of.removed += held, of.removed_value += held * of_value;
        }
      }
    }
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
  SB_DEVICE bool write_records() {
    const int64_t unlisted = kHasLowRank ? load(p.valid_before + b * p.slots + p.slots - 1) - listed : 0;
    bool has_any = false;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      Sums& of = sums[r];
      raise(of, quad_max(of.top));
      const float exact = quad_sum(of.exact), exact_value = quad_sum(of.exact_value), removed = quad_sum(of.removed),
                  removed_value = quad_sum(of.removed_value);
      const float total = kHasQuadratic ? of.total : quad_sum(of.total),
                  total_value = kHasQuadratic ? of.total_value : quad_sum(of.total_value),
                  a = kHasQuadratic ? exp2_of(log_state[r] - of.top) * correction[r] : 1.0f;
      const float lost = a * removed, left = a * total - lost, den = exact + (left < 0.0f ? 0.0f : left);
      bool is_flagged = false;
      if (kHasLowRank) is_flagged = unlisted <= kByKeyLimit || !(lost <= float(p.fallback_bound) * den) || lost > 1e37f;
      if (kHasQuadratic) {
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
      sync_warp();
      if (is_flagged && t == 0) queries.set(row_of(r), -1);
      sync_warp();
      if (query < 0 || is_flagged) continue;
      has_any = true;

      // All weights together are one: a total that rounding made negative counts as it is.
      const float sum = exact + left > 0.0f ? exact + left : den, most = 0x1p100f / larger(a, 1.0f);
      Slot& to = slot[r];
      to.log = of.top, to.inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (to.inverse > most) to.inverse = most;
      to.state_weight = a * to.inverse;
      const float delta = ((exact_value + a * total_value) - a * removed_value) * to.inverse;
      const float correction = !p.d_lse ? 0.0f : -load(static_cast<const float*>(p.d_lse) + row + query);
      to.shift = delta + correction;
      if (kIsHalf) to.scale = Scale::of(largest + (to.shift < 0.0f ? -to.shift : to.shift));
      if (t != 0) continue;
      const int64_t at = (b * p.q_heads + h) * p.q_tokens + first_slot + row_of(r);
      store(static_cast<SlotRecord<float>*>(p.records) + at,
            SlotRecord<float>{to.log, to.inverse, kHasQuadratic ? to.state_weight : 0.0f, delta, correction});
      store(p.kinds + at, kHasLowRank ? SlotKind::kState : SlotKind::kListed);
    }
    return ballot(has_any) != 0;
  }

  // -------------------- results

  SB_DEVICE void finish() {
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) dq[c][i] *= float(p.scale) * (kIsHalf ? Scale::inverse(slot[i / 2].scale) : 1.0f);
    if (kHasQuadratic) finish_map();
    if (kHasClusters) finish_clusters();
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int64_t query = queries.get(row_of(r));
      if (query < 0) continue;
      auto* to = reinterpret_cast<uint32_t*>(p.dq.at<E>(b, h, query));
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c)
        if (c * 8 < p.head_dim) store(to + c * 4 + t, packed(dq[c][2 * r], dq[c][2 * r + 1], E{}));
    }
  }

  // The gradients of x and of its log scale, from those of the listed pairs and those of the state.
  SB_DEVICE void finish_map() {
    SB_UNROLL
    for (int c = 0; c < 2; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Slot& of = slot[i / 2];
      const int64_t at = row_of(i / 2) * kRowWidth + 8 * c + 2 * t + i % 2;
      d_x.set(at, dx[c][i] + of.state_weight * (d_x.get(at) - of.shift * of_hz.get(at)));
    }
    sync_warp();
    if (lane < kTile) {
      float product = 0;
      for (int64_t a = 0; a < p.rank; ++a) product += x.get(lane * kRowWidth + a) * d_x.get(lane * kRowWidth + a);
      const int64_t last = lane * kRowWidth + p.rank;
      d_x.set(last, QuadraticKernel::log_gradient(product, d_x.get(last)));
    }
    sync_warp();
    const int64_t columns = p.head_dim / 8;
    if (p.query_weight.data)
      return add_product_of_numbers(d_x, kRowWidth, 0, 1.0f, p.map_operand + (b * p.q_heads + h) * columns * kWarp,
                                    columns, dq);
    for (int64_t i = lane; i < kTile * (p.rank + 1); i += kWarp) {
      const int64_t row = i / (p.rank + 1), a = i % (p.rank + 1), query = queries.get(row);
      if (query >= 0) store(p.d_query_map.at<float>(b, h, query) + a, d_x.get(row * kRowWidth + a));
    }
  }

  // q.b_c is an exponent of the query and of the representative, whose gradient the slot leaves to all of them.
  SB_DEVICE void finish_clusters() {
    sync_warp();
    float* to = static_cast<float*>(p.d_exponent) + ((b * p.q_heads + h) * p.q_tokens + first_slot) * p.rank;
    for (int row = 0; row < kTile; ++row)
      for (int64_t c = lane; c < p.rank && queries.get(row) >= 0; c += kWarp)
        store(to + row * p.rank + c, d_exponents().get(row * width() + c));
    const int64_t steps = p.features_padded / 16, columns = p.head_dim / 8;
    for (int64_t step = 0; step < steps; ++step)
      add_product_of_numbers(d_exponents(), width(), step, float(p.scale),
                             p.map_operand + head * steps * columns * kWarp, columns, dq);
  }

  const BackwardTileParams& p;
  const int32_t base, b, h, kv;
  const int64_t head;
  const int32_t first_slot;
  const int lane, g, t;
  const Shared<int32_t> queries;
  const Shared<float> x, d_x, of_hz;
  int32_t first_key = 0;
  int32_t listed = 0;
  uint32_t x_high[4], x_low[4];
  Sums sums[2];
  Slot slot[2];
  float log_state[2], correction[2], squares_of_state = 0;
  float dq[kChunks][4], dx[2][4];
};

template <class E, int D, LowRank kKind>
SB_KERNEL SB_THREADS_AT_MOST(kBackwardTileThreads) attention_backward_tile(BackwardTileParams p) {
  const int64_t tiles = ceil_div(p.q_tokens, kTile), all = p.batch * p.q_heads * tiles, warps = block_threads() / kWarp;
  const int64_t base = warp_index() * BackwardTileLayout<D, kKind>::bytes(p);
  for_each_task(ceil_div(all, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index(), row = at / tiles;
    if (at >= all) return;
    BackwardTile<E, D, kKind>(p, base, row / p.q_heads, row % p.q_heads, at % tiles * kTile).run();
  });
}

SB_KERNEL right_operand(OperandParams p) {
  const int64_t size = p.row_steps * p.column_chunks * kWarp;
  for_each_element(p.batch * p.heads * size, [&](int64_t at) {
    const int64_t owner = at / size, step = at / (p.column_chunks * kWarp) % p.row_steps,
                  column = at / kWarp % p.column_chunks * 8 + at % kWarp / 4;
    const float* data = p.data + owner / p.heads * p.of_batch + owner % p.heads * p.given_heads / p.heads * p.of_head;
    const auto entry = [&](int64_t row) {
      return row < p.rows && column < p.columns ? load(data + row * p.of_row + column * p.of_column) : 0.0f;
    };
    FourWords words;
    SB_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = step * 16 + at % 4 * 2 + 8 * half;
      uint32_t parts[2];
      split(entry(row), entry(row + 1), parts, Bfloat16{});
      words.at[half] = parts[0], words.at[2 + half] = parts[1];
    }
    store(p.operand + at, words);
  });
}

}  // namespace sb::cuda

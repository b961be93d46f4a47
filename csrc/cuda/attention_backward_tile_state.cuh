// A tile of 16 query slots in the backward pass (attention_backward_tile.cuh): its queries with their gradients, and
// what the state gives to its records and to the gradients of maps, or of clusters' exponents.
#pragma once
#include "attention_backward.cuh"
#include "attention_backward_tile_products.cuh"
#include "attention_tile_queries.cuh"

namespace sb::cuda {

// Columns of a slot's rows in shared memory, x and what belongs to its entries.
inline constexpr int kRowWidth = kRowOfX, kLastColumn = kLogOfX;
inline constexpr int kBackwardTileThreads = 128;

// Shared memory of a warp, in bytes. `rows`: by slot, x with its log scale and the gradients by x that come from dO H
// and from hz; or exponents of clusters and their gradients. dO H passes through the stages. `left`:
// coordinates.
template <class E, int D, LowRank kKind>
struct BackwardTileLayout {
  static constexpr int64_t kMatrix = TokenRows<E, D>::kBytes,
                           kCoordinates = kKind == LowRank::kQuadratic ? kStage * 64 : 0,
                           kStageBytes = 2 * kMatrix + kCoordinates, kGradients = kMatrix, kStages = 2 * kMatrix,
                           kQueries = kStages + 2 * kStageBytes, kRows = kQueries + kTile * 4,
                           kSmallRow = kTile * kRowWidth * 4, kPairs = kRows + 3 * kSmallRow,
                           kLeft = pad_to(kPairs, 128);
  static_assert(kKind != LowRank::kQuadratic || (kTile + 1) * (kTileFeatures + 1) * 4 <= 2 * kStageBytes);
  // Of a slot's exponents.
  static SB_HD int32_t width(const ForwardParams& p) { return int32_t(pad_to(p.rank, 16)) + 1; }
  static SB_HD int64_t bytes(const ForwardParams& p) {
    if (kKind == LowRank::kQuadratic) return kLeft + CoordinateRows<E>::kBytes;
    return kKind == LowRank::kCentroid ? pad_to(kRows + (2 * width(p) + kRowWidth) * kTile * 4, 16) : kRows;
  }
};

// Halves of a tile's coordinates, then 1, as the left operand of products with those of a stage's keys: in shared
// memory at `place`. In 16 bits each lane reads its own words again, so that registers suffice for more warps.
template <class E>
struct LeftCoordinates {
  SB_DEVICE void set(const ForwardParams& p, const Shared<float>& x, int place) {
    FourWords parts[2];
    split_coordinates(p, x, parts[0].at, parts[1].at);
    SB_UNROLL
    for (int i = 0; i < 2; ++i) shared_array<FourWords>(place).set(i * kWarp + lane_index(), parts[i]);
  }
  SB_DEVICE void multiply(int place, int keys, float (&sum)[2][4]) const {
    const FourWords high = shared_array<FourWords>(place).get(lane_index()),
                    low = shared_array<FourWords>(place).get(kWarp + lane_index());
    add_product_of_coordinates(high.at, low.at, keys, sum);
  }
};
template <>
struct LeftCoordinates<float> {
  SB_DEVICE void set(const ForwardParams& p, const Shared<float>& x, int place) {
    for (int i = lane_index(); i < kTile * 16; i += kWarp) {
      const int row = i / 16, column = i % 16;
      shared_array<float>(place + CoordinateRows<float>::place(row, column / 4))
          .set(column % 4, half_coordinate(p, x, row, column));
    }
    sync_warp();
  }
  SB_DEVICE void multiply(int place, int keys, float (&sum)[2][4]) const {
    multiply_coordinates<true>(place, keys, sum);
  }
};

template <class E, int D, LowRank kKind>
class BackwardTileState {
 protected:
  typedef BackwardTileLayout<E, D, kKind> Layout;
  typedef TokenRows<E, D> Rows;
  static constexpr bool kHasQuadratic = kKind == LowRank::kQuadratic, kHasClusters = kKind == LowRank::kCentroid,
                        kHasLowRank = kKind != LowRank::kNone, kIsHalf = std::is_same_v<E, Half>, kIsWide = kIsFloat<E>;
  static constexpr int kChunks = D / 8, kSteps = D / 16, kKeyTiles = kStage / 8, kGradientRow = kTileFeatures + 1;

  SB_DEVICE BackwardTileState(const BackwardTileParams& p, int64_t base, int64_t b, int64_t h, int64_t first_slot)
      : p(p),
        base(int32_t(base)),
        b(int32_t(b)),
        h(int32_t(h)),
        kv(int32_t(p.kv_head(h))),
        head(int32_t(b * p.kv_heads + kv)),
        first_slot(int32_t(first_slot)),
        lane(lane_index()),
        g(lane / 4),
        t(lane % 4),
        queries(shared_array<int32_t>(base + Layout::kQueries)),
        x(shared_array<float>(base + Layout::kRows)),
        d_x(shared_array<float>(base + Layout::kRows + Layout::kSmallRow)),
        of_hz(shared_array<float>(base + Layout::kRows + 2 * Layout::kSmallRow)) {}

  // Of row g or g + 8 and of this lane's pairs. `exact`, `removed` and `total` are weights of listed keys, of what they
  // take back and of all that the state holds; the others their sums times dO.v. Relative to exp(top); of the state of
  // features all lanes have the whole, relative to exp(log_state) times the correction.
  struct Sums {
    float top = float(kLowestLog), exact = 0, exact_value = 0, removed = 0, removed_value = 0, total = 0,
          total_value = 0, largest = 0;
  };
  // What gradients are from, as SlotRecord, `shift` for the delta, in 16 bits with its correction; `scale` keeps
  // gradients of scores inside of float16. Without a query, or flagged, a slot has no weights.
  struct Slot {
    float log = -float(kLowestLog), inverse = 0, state_weight = 0, shift = 0, correction = 0, scale = 1;
    // dO.v less its mean. A mean of float32 is as exact as that of its weights: nothing large rounds what is small.
    SB_DEVICE float gradient(float value) const { return kIsWide ? (value - shift) - correction : value - shift; }
  };

  // -------------------- the tile's queries

  SB_DEVICE void read_queries() {
    for (int i = lane; i < kTile * Rows::kRowChunks; i += kWarp) {
      const int row = i / Rows::kRowChunks, chunk = i % Rows::kRowChunks, column = chunk * Rows::kNumbers;
      const int64_t query = queries.get(row), from = query < 0 ? 0 : query;
      const bool in_query = query >= 0 && column < p.head_dim, in_value = query >= 0 && column < p.value_pad;
      copy_async(base + Rows::place(row, chunk), p.q.at<const E>(b, h, from) + (in_query ? column : 0), in_query);
      copy_async(base + Layout::kGradients + Rows::place(row, chunk),
                 p.d_out.at<const E>(b, h, from) + (in_value ? column : 0), in_value);
    }
    commit_copies();
    if (kHasQuadratic) {
      kappa_ref = log_of_state<float>(p, head, state_slot);
      for (int i = lane; i < kTile * kRowWidth; i += kWarp) {
        x.set(i, coordinate_of_query(p, b, h, queries.get(i / kRowWidth), i % kRowWidth)), d_x.set(i, 0.0f),
            of_hz.set(i, 0.0f);
      }
    }
    wait_copies<0>();
    sync_warp();
    if (kHasQuadratic) left_x.set(p, x, base + int(Layout::kLeft));
  }

  SB_DEVICE void begin_sums() {
    SB_UNROLL
    for (int r = 0; r < 2; ++r) sums[r] = Sums{}, slot[r] = Slot{}, log_state[r] = float(kLowestLog), correction[r] = 1;
    squares_of_state = 0;
  }

  SB_DEVICE int row_of(int r) const { return g + 8 * r; }

  // -------------------- the state

  SB_DEVICE int64_t operand_of_state() const { return p.is_causal ? head * p.slots + state_slot : head; }

  SB_DEVICE float hz_of(int64_t f) const {
    if (f >= p.features) return 0;
    return load(state_of<float>(p, head, state_slot) + f * (p.value_pad + 1) + p.value_pad);
  }

  // sum[n] += dO times columns [8 (first + n), 8 (first + n) + 8) of the state, its features.
  template <int kCount>
  SB_DEVICE void multiply_state(int64_t first, float (&sum)[kCount][4]) const {
    if constexpr (kIsWide) {
      const int64_t pitch = p.value_pad + 1;
      add_product_with_global_rows<D>(base + int(Layout::kGradients),
                                      state_of<float>(p, head, state_slot) + 8 * first * pitch, p.features - 8 * first,
                                      pitch, p.value_pad, sum);
    } else {
      const int64_t columns = p.features_padded / 8;
      add_product_of_tokens<E, D>(base + Layout::kGradients, p.value_steps,
                                  p.state_operand + operand_of_state() * p.value_steps * columns * kWarp, columns,
                                  first, sum);
    }
  }

  // The gradients by x that come from dO H and, not yet times -dO.o, from hz: F'(x) of both, by a lane each. With them
  // F(x) dO H and F(x).hz, over exp(rho + kappa_ref).
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
      const float of_state = hz_of(f);
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

    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int at = row_of(r) * kRowWidth;
      const LogOfState state(x.get(at + kLastColumn), kappa_ref);
      log_state[r] = state.log, correction[r] = state.correction;
      sums[r].top = log_state[r];
      sums[r].total = of_hz.get(at + kLastColumn), sums[r].total_value = d_x.get(at + kLastColumn);
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
      multiply_clusters(step, exponent), multiply_state(2 * step, of_state);
      SB_UNROLL
      for (int n = 0; n < 2; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t c = step * 16 + 8 * n + 2 * t + i;
        const float log = log_of_cluster(p, head, c), mass = hz_of(c);
        SB_UNROLL
        for (int r = 0; r < 2; ++r) {
          Sums& of = sums[r];
          const float of_pair = exponent_of_cluster(exponent[n][2 * r + i] * scale, log);
          if (kIsWide && c < p.rank && queries.get(row_of(r)) >= 0)
            store(p.cluster_scores + ((b * p.q_heads + h) * p.q_tokens + queries.get(row_of(r))) * p.rank + c,
                  exponent[n][2 * r + i]);
          exponents().set(row_of(r) * width() + c, of_pair);
          d_exponents().set(row_of(r) * width() + c, of_state[n][2 * r + i]);
          if (log > float(kNoKeyLog)) {
            raise(of, of_pair);
            const float weight = exp2_of(of_pair - of.top);
            of.total += weight * mass, of.total_value += weight * of_state[n][2 * r + i];
          }
        }
      }
    }
    sync_warp();
  }

  // sum[n] = the queries times representatives 16 step + 8 n and the seven behind it.
  SB_DEVICE void multiply_clusters(int64_t step, float (&sum)[2][4]) const {
    if constexpr (kIsWide) {
      const float* rows = static_cast<const float*>(p.given_representatives) + (head * p.rank + 16 * step) * p.head_dim;
      multiply_with_global_rows<D>(base, rows, p.rank - 16 * step, p.head_dim, sum);
    } else {
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
          multiply_add(sum[n], q, second.at[0], second.at[1], E{});
          multiply_add(sum[n], q, first.at[2], first.at[3], E{});
          multiply_add(sum[n], q, first.at[0], first.at[1], E{});
        }
      }
    }
  }

  // Goes through this lane's clusters of rows g and g + 8: visit(r, where its number stands, its weight, its mass).
  template <class Visit>
  SB_DEVICE void visit_clusters(const Visit& visit) const {
    for (int64_t c = 2 * t; c < p.features_padded; c += 8) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float mass = hz_of(c + i);
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t at = row_of(r) * width() + c + i;
        visit(r, at, exp2_of(exponents().get(at) - slot[r].log) * slot[r].inverse, mass);
      }
    }
  }

  // In place of dO H, the gradients by exponents that the state gives.
  SB_DEVICE void weigh_state_of_clusters() {
    visit_clusters([&](int r, int64_t at, float weight, float mass) {
      float gradient = d_exponents().get(at) - slot[r].shift * mass;
      if (kIsWide) gradient -= slot[r].correction * mass;
      d_exponents().set(at, weight * gradient);
    });
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

  const BackwardTileParams& p;
  const int32_t base, b, h, kv;
  const int32_t head;
  const int32_t first_slot;
  const int lane, g, t;
  const Shared<int32_t> queries;
  const Shared<float> x, d_x, of_hz;
  int32_t first_key = 0, state_slot = 0;
  float kappa_ref = 0;
  LeftCoordinates<E> left_x;
  Sums sums[2];
  Slot slot[2];
  float log_state[2], correction[2], squares_of_state = 0;
};

}  // namespace sb::cuda

// What tiles of 16 query slots have in common, of every type of tokens and in both directions (attention_tile.cuh,
// attention_tile_float.cuh, attention_backward_tile.cuh): a tile's queries, their coordinates and features, what sums
// over the state are relative to, and what follows from a row's sums. Lane l = 4 g + t has a part of the sums of rows g
// and g + 8.
#pragma once
#include "feature_table.cuh"
#include "tile_memory.cuh"

namespace sb::cuda {

// Writes a tile's queries, or -1 for those that there are not or that are ignored; whether there are any.
SB_DEVICE bool find_queries(const ForwardParams& p, const RowRange& range, int32_t b, int32_t h, int32_t first_slot,
                            const Shared<int32_t>& queries) {
  const int lane = lane_index();
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

// -------------------- coordinates of the quadratic kernel

// A column of a query's row of coordinates (feature_table.cuh); zeros without a query.
SB_DEVICE float coordinate_of_query(const ForwardParams& p, int32_t b, int32_t h, int64_t query, int column) {
  if (query < 0 || (column > p.rank && column != kLogOfX)) return 0;
  const MapRow<float, float> of_query(p.x_map, b, h, query);
  return column == kLogOfX ? of_query.log() : column == p.rank ? 1.0f : of_query(column);
}
// That of the left side of 1 + x.y / 2: half of the coordinates, then 1.
SB_DEVICE float half_coordinate(const ForwardParams& p, const Shared<float>& x, int row, int column) {
  const float value = x.get(row * kRowOfX + column);
  return column < p.rank ? 0.5f * value : value;
}
// All of it as a left operand, in two parts.
SB_DEVICE void split_coordinates(const ForwardParams& p, const Shared<float>& x, uint32_t (&high)[4],
                                 uint32_t (&low)[4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  SB_UNROLL
  for (int e = 0; e < 2; ++e) SB_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int row = g + 8 * r, column = 2 * t + 8 * e;
    uint32_t parts[2];
    split(half_coordinate(p, x, row, column), half_coordinate(p, x, row, column + 1), parts, Bfloat16{});
    high[2 * e + r] = parts[0], low[2 * e + r] = parts[1];
  }
}
// sum[n] += the left operand times coordinates of a stage of keys: rows of two parts from byte `keys` on.
template <int kKeyTiles>
SB_DEVICE void add_product_of_coordinates(const uint32_t (&high)[4], const uint32_t (&low)[4], int keys,
                                          float (&sum)[kKeyTiles][4]) {
  SB_UNROLL
  for (int n = 0; n < kKeyTiles; ++n) {
    uint32_t y[4];  // the two halves of the first part, then of the second
    load_matrices(keys + swizzled<64>(lane_index() % 8, lane_index() / 8) + n * 512, y);
    multiply_add(sum[n], low, y[0], y[1], Bfloat16{});
    multiply_add(sum[n], high, y[2], y[3], Bfloat16{});
    multiply_add(sum[n], high, y[0], y[1], Bfloat16{});
  }
}

// -------------------- the state

// Of sums over the state of features, that are relative to exp(rho + kappa_ref): the exponent rounded, and as a factor
// what it lost.
struct LogOfState {
  float log, correction;
  SB_DEVICE LogOfState(float rho, float kappa_ref) : log(rho + kappa_ref) {
    const float back = log - rho;
    correction = exp2_of((rho - (log - back)) + (kappa_ref - back));
  }
};

// By row g and g + 8, this lane's part of F(x).hz and of |F(x)|^2; and of |hz|^2.
struct FeatureSums {
  float total[2] = {0, 0}, squares[2] = {0, 0}, squares_of_state = 0;

  // A feature of rows g and g + 8, whose entry of hz is `of_state`, by the table of the block.
  SB_DEVICE void add(const Shared<float>& x, int column, float of_state, float& value_0, float& value_1) {
    const int g = lane_index() / 4;
    const uint32_t which = shared_array<uint32_t>(0).get(column);
    const float factor = shared_array<float>(kTileFeatures * 4).get(column);
    float* const values[2] = {&value_0, &value_1};
    squares_of_state += of_state * of_state;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = (g + 8 * r) * kRowOfX;
      const float value = factor * x.get(row + int(which & 255)) * x.get(row + int(which >> 8));
      total[r] += value * of_state, squares[r] += value * value;
      *values[r] = value;
    }
  }

  // Registers are for the loop: over the four lanes of a row, lane t has the sum of one kind.
  SB_DEVICE float of_lane() const {
    const float sums[4] = {quad_sum(total[0]), quad_sum(total[1]), quad_sum(squares[0]), quad_sum(squares[1])};
    const int t = lane_index() % 4;
    return t == 0 ? sums[0] : t == 1 ? sums[1] : t == 2 ? sums[2] : sums[3];
  }
  // Back again.
  SB_DEVICE void set(float of_lane) {
    const int t = lane_index() % 4;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) total[r] = t == r ? of_lane : 0.0f, squares[r] = t == 2 + r ? of_lane : 0.0f;
  }
};

// -------------------- results

// Whether all sums are numbers, of all lanes.
template <int kChunks>
SB_DEVICE bool are_numbers(const float (&sum)[kChunks][4]) {
  bool is_number = true;
  SB_UNROLL
  for (int r = 0; r < 2; ++r) {
    float zero = 0;
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) zero += sum[c][2 * r] * 0.0f + sum[c][2 * r + 1] * 0.0f;
    is_number = is_number && zero == 0.0f;
  }
  return ballot(!is_number) == 0;
}

// What follows from the sums of a row: `lost`, of listed keys, and `left` are what the state gives, relative as
// `exact`; `listed` keys of `in_state`.
template <LowRank kKind, bool kIsRagged>
struct RowResult {
  float den;
  bool is_flagged = false;

  SB_DEVICE RowResult(const ForwardParams& p, float exact, float lost, float left, int32_t in_state, int32_t listed) {
    const int32_t unlisted = in_state - listed;
    den = exact + (left < 0.0f || (kIsRagged && unlisted == 0) ? 0.0f : left);
    if (kKind != LowRank::kNone && in_state > 0)
      is_flagged =
          (!p.is_causal && unlisted <= kByKeyLimit) || !(lost <= float(p.fallback_bound) * den) || lost > 1e37f;
  }
  // Of the quadratic kernel where there is a state: `a` is the factor of its sums.
  SB_DEVICE void flag_large_terms(float a, float squares_of_features, float squares_of_state) {
    const double terms = double(a) * double(a) * double(squares_of_features) * double(squares_of_state);
    is_flagged =
        is_flagged || !(terms <= kTermsBoundOfPlainStates * kTermsBoundOfPlainStates * double(den) * double(den));
  }

  // The flag and, without one, lse of a query, by one lane of its row.
  SB_DEVICE void store_numbers(const ForwardParams& p, int64_t at, int64_t head, float top) const {
    if (kKind != LowRank::kNone) {
      store(p.flags + at, uint8_t(is_flagged));
      if (is_flagged) store(p.any_flagged + head, uint8_t(1));  // by whom does not matter
    }
    if (!is_flagged)
      store(static_cast<float*>(p.lse) + at, den == 0.0f ? -float(INFINITY) : float(kLn2) * (top + log2_of(den)));
  }
  // Of a sum over values; `inverse` of the weight.
  SB_DEVICE float inverse() const { return den == 0.0f ? 0.0f : 1.0f / den; }
  SB_DEVICE float mean(float sum, float inverse) const { return den == 0.0f ? 0.0f : sum * inverse; }
};

// -------------------- the tiles of a warp

// Calls body(base, b, h, first_slot) for each; `base`: of the warp's shared memory, behind the block's table of
// features. The number of a lane's task waits there, at Layout::kTask: tiles need registers.
template <class Layout, class Body>
SB_DEVICE void for_each_tile(const TileParams& p, const Body& body) {
  // Of 16 queries each, so that 32 bits count them.
  const auto tiles = [&] { return uint32_t(ceil_div(p.q_tokens, kTile)); };
  const auto all = [&] { return uint32_t(p.batch * p.q_heads) * tiles(); };
  const auto first_of_block = [&](uint32_t task) { return task * uint32_t(block_threads() / kWarp); };
  const auto base = [&] { return int(kFeatureTable + warp_index() * Layout::bytes(p)); };
  const auto kept = [&] { return shared_array<uint32_t>(base() + Layout::kTask + lane_index() * 4); };
  SB_NO_UNROLL
  for (auto task = uint32_t(block_index()); first_of_block(task) < all();
       task = kept().get(0) + uint32_t(grid_blocks())) {
    kept().set(0, task);
    const uint32_t at = first_of_block(task) + uint32_t(warp_index()), row = at / tiles(), heads = uint32_t(p.q_heads);
    if (at < all()) body(base(), int32_t(row / heads), int32_t(row % heads), int32_t(at % tiles() * kTile));
  }
}

}  // namespace sb::cuda

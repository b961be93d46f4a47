// Sums over tokens of their features times rows of 16 bits, on tensor cores: states from keys and values, and gradients
// of states, of projections and of representatives. As exact as the same sums in float32.
//
// A block sums kFeatureTile features times D columns, a warp 16 of the features, over chunks of kChunk tokens. Rows are
// exact in 16 bits. Features, computed in float32, are sums of 16-bit parts that hold all of their digits: three parts
// of bfloat16; two of float16, relative to the largest of a feature in 32 tokens, since their range is short. Products
// of 32 tokens are added up before they are added to those of the tokens before: short chains round little.
#pragma once
#include <type_traits>

#include "low_rank.cuh"
#include "matrix.h"

namespace sb::cuda {

inline constexpr int kProductThreads = int(kFeatureTile / 16) * kWarp;

// What is summed: features, of the quadratic kernel by `rank` coordinates, or given; rows of `width`, and how many
// columns a sum has: `width`, or one more for the tokens' last numbers.
struct SummedFeatures {
  int64_t features, rank;
  bool is_quadratic;
  int64_t width, columns;
  static SB_HD SummedFeatures of_state(const ForwardParams& p) {
    return {p.features, p.rank, p.low_rank == LowRank::kQuadratic, p.value_pad, p.value_pad + 1};
  }
  static SB_HD SummedFeatures of_given(int64_t features, int64_t width, int64_t columns) {
    return {features, 0, false, width, columns};
  }
  // Coordinates that a tile of features needs.
  SB_HD int64_t coordinates() const { return is_quadratic ? rank : kFeatureTile; }
  SB_HD int64_t tiles() const { return ceil_div(features, kFeatureTile); }
};

// A token of a sum: its index, or -1 for none, its weight, and its number in the column behind the others.
struct SummedToken {
  int64_t at;
  float weight, last;
};

// Feature f is its factor times two of the coordinates, of which number `rank` is 1.
struct FeatureFactors {
  int64_t a, b;
  float factor;
  // In the order of QuadraticKernel::expand.
  static SB_DEVICE FeatureFactors of_quadratic(int64_t rank, int64_t f) {
    if (f <= rank) return {f == 0 ? rank : f - 1, rank, 1.0f};
    int64_t pair = f - rank - 1, a = 0;
    for (; pair >= rank - a; ++a) pair -= rank - a;
    return {a, a + pair, pair == 0 ? 0.5f : 0.70710678118654752440f};
  }
};

template <class E, int D>
class FeatureProducts {
  static constexpr int kTokens = int(kChunk), kSteps = 2, kGroup = 4, kChunks = D / 8,
                       kParts = std::is_same_v<E, Bfloat16> ? 3 : 2;
  static constexpr bool kIsScaled = std::is_same_v<E, Half>;
  static constexpr int64_t kRows = kTokens * D * 2, kWeights = 2 * kRows, kLasts = kWeights + kTokens * 4,
                           kCoordinates = kLasts + kTokens * 4;
  struct alignas(16) Four {
    float at[4];
  };

 public:
  static constexpr int kColumns = D;
  static SB_HD int64_t bytes(const SummedFeatures& p) { return kCoordinates + (p.coordinates() + 1) * 2 * kTokens * 4; }

  SB_DEVICE FeatureProducts(const SummedFeatures& p, int64_t first_feature, int64_t first_column)
      : p(p),
        first_feature(first_feature),
        first_column(first_column),
        count(p.is_quadratic                              ? p.rank
              : p.features - first_feature < kFeatureTile ? p.features - first_feature
                                                          : kFeatureTile),
        lane(lane_index()),
        g(lane / 4),
        t(lane % 4) {
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] = 0;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int64_t f = feature_of(r);
      last[r] = 0;
      of_row[r] = f >= p.features  ? FeatureFactors{count, count, 0.0f}
                  : p.is_quadratic ? FeatureFactors::of_quadratic(p.rank, f)
                                   : FeatureFactors{f - first_feature, count, 1.0f};
    }
  }

  // Adds the tokens [0, tokens): token(i) says which, map(at)(a) and row(at) are its coordinates and its row. No thread
  // uses shared memory before the first barrier in it or after the last.
  template <class Token, class Map, class Row>
  SB_DEVICE void add(int64_t tokens, const Token& token, const Map& map, const Row& row) {
    sync_block();
    if (tokens <= 0) return;
    const int own = warp_index() * 16 + lane % 16;  // the token of a chunk that this lane brings
    set_coordinate(count, own, lane / 16, 1.0f);
    const auto token_at = [&](int64_t i) { return i < tokens ? token(i) : SummedToken{-1, 0, 0}; };
    SummedToken next = token_at(own);
    copy_rows(next, 0, row);
    int buffer = 0;
    for (int64_t begin = 0; begin < tokens; begin += kTokens) {
      const SummedToken of_lane = next;
      if (begin + kTokens < tokens)
        next = token_at(begin + kTokens + own), copy_rows(next, 1 - buffer, row);
      else
        commit_copies();
      const auto number = shared_array<float>(lane < 16 ? kWeights : kLasts);
      number.set(place_of(own, lane / 16), lane < 16 ? of_lane.weight : of_lane.last);
      set_coordinates(of_lane, own, map);
      wait_copies<1>();
      sync_block();
      add_chunk(buffer * kRows);
      sync_block();
      buffer = 1 - buffer;
    }
    wait_copies<0>();
  }

  // To rows of all columns.
  SB_DEVICE void store_sums(float* to) const {
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float of_last = quad_sum(last[r]) * of_row[r].factor;
      const int64_t f = feature_of(r);
      if (f >= p.features) continue;
      if (t == 0 && first_column == 0 && p.columns > p.width) store(to + f * p.columns + p.width, of_last);
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t column = first_column + 8 * c + 2 * t + i;
        if (column < p.width) store(to + f * p.columns + column, sum[c][2 * r + i] * of_row[r].factor);
      }
    }
  }

 private:
  SB_DEVICE int64_t feature_of(int r) const { return first_feature + warp_index() * 16 + g + 8 * r; }

  // -------------------- shared memory

  // Numbers of the tokens of a chunk stand in two copies, whose banks differ: a lane reads four neighbours at once from
  // copy g % 2, so that rows of even and of odd features never meet.
  static SB_DEVICE int64_t place_of(int token, int copy) { return token ^ copy << 4; }
  SB_DEVICE void set_coordinate(int64_t a, int token, int copy, float value) const {
    shared_array<float>(kCoordinates).set((2 * a + copy) * kTokens + place_of(token, copy), value);
  }
  template <class Map>
  SB_DEVICE void set_coordinates(const SummedToken& token, int own, const Map& map) const {
    if (token.at < 0) {
      for (int64_t a = 0; a < count; ++a) set_coordinate(a, own, lane / 16, 0.0f);
      return;
    }
    const auto coordinate = map(token.at);
    const int64_t first = p.is_quadratic ? 0 : first_feature;
    for (int64_t a = 0; a < count; ++a) set_coordinate(a, own, lane / 16, coordinate(first + a));
  }
  // Of the tokens 16 step + 4 t and the three behind it. They are columns 2t, 2t + 1, 2t + 8 and 2t + 9 of the left
  // operand.
  SB_DEVICE Four four_at(int64_t offset, int step, int copy) const {
    return shared_array<Four>(offset).get(place_of(16 * step + 4 * t, copy) / 4);
  }
  SB_DEVICE Four coordinates_at(int64_t a, int step) const {
    return four_at(kCoordinates + (2 * a + g % 2) * kTokens * 4, step, g % 2);
  }
  // Byte of 8 columns of a token's row. The tokens of a matrix of a right operand lie in different groups of banks.
  static SB_DEVICE int64_t place_of_row(int token, int chunk) {
    return token * (D * 2) + ((chunk ^ ((token & 1) | (token >> 1 & 6))) << 4);
  }

  template <class Row>
  SB_DEVICE void copy_rows(const SummedToken& of_lane, int buffer, const Row& row) const {
    const int32_t own = int32_t(of_lane.at);
    SB_UNROLL_BY_2
    for (int j = 0; j < 16 * kChunks / kWarp; ++j) {
      const int i = lane + j * kWarp, chunk = i % kChunks;
      const int64_t at = shuffle_from(own, i / kChunks), column = first_column + chunk * 8;
      const bool is_there = at >= 0 && column < p.width;
      copy_async(buffer * kRows + place_of_row(warp_index() * 16 + i / kChunks, chunk),
                 row(is_there ? at : 0) + (is_there ? column : 0), is_there);
    }
    commit_copies();
  }

  // -------------------- products

  SB_DEVICE void add_chunk(int64_t rows) {
    if (first_feature + warp_index() * 16 >= p.features) return;
    SB_NO_UNROLL
    for (int first = 0; first < kTokens / 16; first += kSteps) add_steps(rows, first);
  }

  // Of kSteps times 16 tokens.
  SB_DEVICE void add_steps(int64_t rows, int first) {
    float value[kSteps][2][4], of_last[2] = {0, 0};
    SB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const Four weight = four_at(kWeights, first + s, 0), factor = four_at(kLasts, first + s, 1);
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        const Four a = coordinates_at(of_row[r].a, first + s), b = coordinates_at(of_row[r].b, first + s);
        SB_UNROLL
        for (int i = 0; i < 4; ++i) {
          value[s][r][i] = weight.at[i] * a.at[i] * b.at[i];
          of_last[r] += value[s][r][i] * factor.at[i];
        }
      }
    }
    float back[2] = {1, 1};
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      last[r] += of_last[r];
      if (kIsScaled) back[r] = scale_row(r, value);
    }
    uint32_t left[kSteps][kParts][4];
    SB_UNROLL
    for (int s = 0; s < kSteps; ++s) SB_UNROLL
    for (int r = 0; r < 2; ++r) SB_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t parts[kParts];
      split(value[s][r][2 * half], value[s][r][2 * half + 1], parts, E{});
      SB_UNROLL
      for (int k = 0; k < kParts; ++k) left[s][k][2 * half + r] = parts[k];
    }

    const int of_matrix = lane % 8 / 2 * 4 + lane % 2 + lane / 8 % 2 * 2 + lane / 16 * 16;  // a token of 32
    SB_UNROLL
    for (int c = 0; c < kChunks; c += kGroup) {
      if (first_column + c * 8 >= p.width) continue;
      float of_steps[kGroup][4];
      SB_UNROLL
      for (int n = 0; n < kGroup; ++n) SB_UNROLL
      for (int i = 0; i < 4; ++i) of_steps[n][i] = 0;
      uint32_t right[kGroup][4];
      SB_UNROLL
      for (int n = 0; n < kGroup; ++n) load_transposed(rows + place_of_row(16 * first + of_matrix, c + n), right[n]);
      SB_UNROLL
      for (int s = 0; s < kSteps; ++s) SB_UNROLL
      for (int k = kParts - 1; k >= 0; --k) SB_UNROLL
      for (int n = 0; n < kGroup; ++n) multiply_add(of_steps[n], left[s][k], right[n][2 * s], right[n][2 * s + 1], E{});
      SB_UNROLL
      for (int n = 0; n < kGroup; ++n) SB_UNROLL
      for (int i = 0; i < 4; ++i) sum[c + n][i] += kIsScaled ? of_steps[n][i] * back[i / 2] : of_steps[n][i];
    }
  }

  // Multiplies row r by the power of two that brings its largest number near the largest float16, and returns what
  // undoes it.
  SB_DEVICE static float scale_row(int r, float (&value)[kSteps][2][4]) {
    float most = 0;
    SB_UNROLL
    for (int s = 0; s < kSteps; ++s) SB_UNROLL
    for (int i = 0; i < 4; ++i) most = larger(most, value[s][r][i] < 0 ? -value[s][r][i] : value[s][r][i]);
    float back;
    const float scale = scale_to_half(quad_max(most), back);
    SB_UNROLL
    for (int s = 0; s < kSteps; ++s) SB_UNROLL
    for (int i = 0; i < 4; ++i) value[s][r][i] *= scale;
    return back;
  }

  const SummedFeatures p;
  const int64_t first_feature, first_column;
  const int64_t count;  // coordinates
  const int lane, g, t;
  // By rows g and g + 8 of the warp's features.
  FeatureFactors of_row[2];
  float sum[kChunks][4], last[2];
};

// A task of a kernel of products: `row` of what it makes, and a block's features and columns of it.
template <int D>
struct ProductTask {
  int64_t row, first, column;
  static SB_HD int64_t blocks(const SummedFeatures& p) { return p.tiles() * ceil_div(p.width, D); }
  SB_DEVICE ProductTask(const SummedFeatures& p, int64_t task)
      : row(task / blocks(p)),
        first(task / ceil_div(p.width, D) % p.tiles() * kFeatureTile),
        column(task % ceil_div(p.width, D) * D) {}
};

}  // namespace sb::cuda

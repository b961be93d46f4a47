// Matrices of tiles in the backward pass: 16 rows of tokens, or of coordinates, in shared memory, by the type of the
// tokens; and the products of those of float32. Products over 16 rows, or over 16 columns of what is in global memory,
// begin at zero and are added to sums in float32.
#pragma once
#include "float_products.cuh"
#include "tile_memory.cuh"

namespace sb::cuda {

template <class E>
inline constexpr bool kIsFloat = std::is_same_v<E, float>;

// Rows of tokens, D wide. Of float32 lanes 4 g + t read chunk 4 s + t of row g as of a side whose columns are the depth
// of a product, and chunk 8 s + g of rows 2 t and 2 t + 1 as of one whose rows are: eight lanes at once read in eight
// different groups of banks.
template <class E, int D>
struct TokenRows {
  static constexpr int kRowBytes = D * int(sizeof(E)), kBytes = kTile * kRowBytes, kNumbers = 16 / int(sizeof(E)),
                       kRowChunks = kRowBytes / 16;
  // Byte of a chunk of kNumbers.
  SB_HD static int place(int row, int chunk) {
    if (!kIsFloat<E>) return swizzled<kRowBytes>(row, chunk);
    return row * kRowBytes + ((chunk ^ moved_by(row)) << 4);
  }
  SB_HD static int moved_by(int row) { return ((row ^ row >> 2) & 1) << 2 | (row & 2); }
};

// Coordinates of 16 tokens: rows of 64 bytes, two parts of bfloat16 or float32. Of float32 two rows lie in 128 bytes;
// lanes read chunk t of row g, or a word of column g of row 2 t.
template <class E>
struct CoordinateRows {
  static constexpr int kRowBytes = 64, kBytes = kTile * kRowBytes;
  SB_HD static int place(int row, int chunk) {
    if (!kIsFloat<E>) return swizzled<kRowBytes>(row, chunk);
    return row / 2 * 128 + (((row % 2 * 4 + chunk) ^ (row & 6)) << 4);
  }
};

// -------------------- products of float32

inline constexpr int kExactParts = 3;
// Four numbers of a lane as two pairs, each in parts.
SB_DEVICE void split_exactly(const float (&numbers)[4], uint32_t (&parts)[2][kExactParts]) {
  SB_UNROLL
  for (int i = 0; i < 2; ++i) split(numbers[2 * i], numbers[2 * i + 1], parts[i], Bfloat16{});
}
SB_DEVICE void load_exact_parts(int offset, uint32_t (&parts)[2][kExactParts]) {
  float numbers[4];
  load_four_numbers(offset, numbers);
  split_exactly(numbers, parts);
}

// sum[n] = the rows at `left` times the right rows [8 n, 8 n + 8), of which 16 `steps` columns count; right(n, s,
// parts) gives the columns 16 s + 4 t and the three behind it of row 8 n + g. Scores and dO.v decide how exact all
// gradients are, and in a call they are as exact as exact products that are added up in float32: both sides are three
// parts of bfloat16, which hold all digits, and six products are all that counts in them; that is as much work as three
// products of TF32. Of queries and keys, of gradients and values, and of coordinates a pair has the same bits on
// whichever side its query is: kIsOfQueries says that it is the left one. So what weights of a slot are divided by is
// made of the weights that its keys have. kStepsAtOnce: of SB_UNROLL_STEPS.
template <bool kIsOfQueries, int kSteps, int kStepsAtOnce, class Rows, class Right>
SB_DEVICE void multiply_rows_with(int left, const Right& right, int64_t steps, float (&sum)[2][4], const Rows&) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  float small[2][4];
  SB_UNROLL
  for (int n = 0; n < 2; ++n) SB_UNROLL
  for (int i = 0; i < 4; ++i) sum[n][i] = small[n][i] = 0;
  SB_UNROLL_STEPS
  for (int s = 0; s < kSteps; ++s) {
    if (s >= steps) continue;
    uint32_t of_left[kExactParts][4];
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t parts[2][kExactParts];
      load_exact_parts(left + Rows::place(g + 8 * r, 4 * s + t), parts);
      SB_UNROLL
      for (int i = 0; i < kExactParts; ++i) of_left[i][r] = parts[0][i], of_left[i][2 + r] = parts[1][i];
    }
    SB_UNROLL
    for (int n = 0; n < 2; ++n) {
      uint32_t of_right[2][kExactParts];
      right(n, s, of_right);
      // By parts of the query and of the key.
      const auto add = [&](float (&to)[4], int of_query, int of_key) SB_INLINE_LAMBDA {
        const int l = kIsOfQueries ? of_query : of_key, r = kIsOfQueries ? of_key : of_query;
        multiply_add(to, of_left[l], of_right[0][r], of_right[1][r], Bfloat16{});
      };
      add(small[n], 0, 2), add(small[n], 2, 0), add(small[n], 1, 1), add(small[n], 0, 1), add(small[n], 1, 0);
      add(sum[n], 0, 0);
    }
  }
  SB_UNROLL
  for (int n = 0; n < 2; ++n) SB_UNROLL
  for (int i = 0; i < 4; ++i) sum[n][i] += small[n][i];
}
// With those in shared memory at `right`.
template <bool kIsOfQueries, int kSteps, int kStepsAtOnce, class Rows>
SB_DEVICE void multiply_rows(int left, int right, int64_t steps, float (&sum)[2][4], const Rows& rows) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto load_right = [&](int n, int s, uint32_t (&parts)[2][kExactParts])
                              SB_INLINE_LAMBDA { load_exact_parts(right + Rows::place(g + 8 * n, 4 * s + t), parts); };
  multiply_rows_with<kIsOfQueries, kSteps, kStepsAtOnce>(left, load_right, steps, sum, rows);
}
template <bool kIsOfQueries, int D, int kStepsAtOnce>
SB_DEVICE void multiply_rows(int left, int right, int64_t steps, float (&sum)[2][4]) {
  multiply_rows<kIsOfQueries, D / 16, kStepsAtOnce>(left, right, steps, sum, TokenRows<float, D>{});
}
template <bool kIsOfQueries>
SB_DEVICE void multiply_coordinates(int left, int right, float (&sum)[2][4]) {
  multiply_rows<kIsOfQueries, 1, 1>(left, right, 1, sum, CoordinateRows<float>{});
}
// The rows of tokens at `left` with 16 of `count` rows of `width` numbers in global memory.
template <int D>
SB_DEVICE void multiply_with_global_rows(int left, const float* rows, int64_t count, int64_t width,
                                         float (&sum)[2][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto load_right = [&](int n, int s, uint32_t (&parts)[2][kExactParts]) SB_INLINE_LAMBDA {
    const int64_t row = 8 * n + g, column = 16 * s + 4 * t;
    const bool is_there = row < count && column < width;
    float numbers[4];
    SB_UNROLL
    for (int i = 0; i < 4; ++i) numbers[i] = is_there ? load(rows + row * width + column + i) : 0.0f;
    split_exactly(numbers, parts);
  };
  multiply_rows_with<true, D / 16, 1>(left, load_right, ceil_div(width, 16), sum, TokenRows<float, D>{});
}

// Sums of products over 16 rows, [8 n, 8 n + 8) in numbers[n], as a left operand.
struct LeftNumbers {
  LeftParts first, second;
  SB_DEVICE explicit LeftNumbers(const float (&numbers)[2][4])
      : first(numbers[0][0], numbers[0][2], numbers[0][1], numbers[0][3]),
        second(numbers[1][0], numbers[1][2], numbers[1][1], numbers[1][3]) {}
  SB_DEVICE const LeftParts& of(int n) const { return n == 0 ? first : second; }
};

// sum += numbers times the 16 rows at `from`, `width` wide; sums are by column_of_float_sum.
template <int D>
SB_DEVICE void add_product_with_rows(const float (&numbers)[2][4], int from, int64_t width, float (&sum)[D / 8][4]) {
  typedef TokenRows<float, D> Rows;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const LeftNumbers left(numbers);
  SB_UNROLL
  for (int span = 0; span < D / 32; ++span) {
    if (span * 32 >= width) continue;
    sync_warp();  // or the compiler has all rows in registers at once
    float part[4][4];
    SB_UNROLL
    for (int j = 0; j < 4; ++j) SB_UNROLL
    for (int i = 0; i < 4; ++i) part[j][i] = 0;
    SB_UNROLL
    for (int n = 0; n < 2; ++n) {
      float row[2][4];
      SB_UNROLL
      for (int e = 0; e < 2; ++e) load_four_numbers(from + Rows::place(8 * n + 2 * t + e, 8 * span + g), row[e]);
      SB_UNROLL
      for (int j = 0; j < 4; ++j) add_product(part[j], part[j], left.of(n), row[0][j], row[1][j]);
    }
    SB_UNROLL
    for (int j = 0; j < 4; ++j) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[4 * span + j][i] += part[j][i];
  }
}

// sum[c] += numbers times columns [8 c, 8 c + 8) of the 16 rows of coordinates at `from`.
SB_DEVICE void add_product_with_coordinates(const float (&numbers)[2][4], int from, float (&sum)[2][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const LeftNumbers left(numbers);
  SB_UNROLL
  for (int c = 0; c < 2; ++c) {
    float part[4] = {0, 0, 0, 0};
    SB_UNROLL
    for (int n = 0; n < 2; ++n) {
      float row[2];
      SB_UNROLL
      for (int e = 0; e < 2; ++e)
        row[e] = shared_array<float>(from + CoordinateRows<float>::place(8 * n + 2 * t + e, 2 * c + g / 4)).get(g % 4);
      add_product(part, part, left.of(n), row[0], row[1]);
    }
    SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] += part[i];
  }
}

// -------------------- with matrices of float32 in global memory, whose rows lie `pitch` apart

// sum[n] += the 16 rows of tokens at `from` times rows [8 n, 8 n + 8) of `count`, `width` wide.
template <int D, int kCount>
SB_DEVICE void add_product_with_global_rows(int from, const float* rows, int64_t count, int64_t pitch, int64_t width,
                                            float (&sum)[kCount][4]) {
  typedef TokenRows<float, D> Rows;
  const int g = lane_index() / 4, t = lane_index() % 4;
  SB_NO_UNROLL
  for (int s = 0; s < D / 16; ++s) {
    if (16 * s >= width) break;
    float tokens[2][4];
    SB_UNROLL
    for (int r = 0; r < 2; ++r) load_four_numbers(from + Rows::place(g + 8 * r, 4 * s + t), tokens[r]);
    const LeftParts first(tokens[0][0], tokens[1][0], tokens[0][1], tokens[1][1]),
        second(tokens[0][2], tokens[1][2], tokens[0][3], tokens[1][3]);
    SB_UNROLL
    for (int n = 0; n < kCount; ++n) {
      if (8 * n >= count) continue;
      sync_warp();  // or the compiler has all of the matrix in registers at once
      const int64_t row = 8 * n + g, column = 16 * s + 4 * t;
      const bool is_there = row < count && column < width;
      const float* at = rows + (is_there ? row * pitch + column : 0);
      float right[4], part[4] = {0, 0, 0, 0};
      SB_UNROLL
      for (int i = 0; i < 4; ++i) right[i] = is_there ? load(at + i) : 0.0f;
      add_product(part, part, first, right[0], right[1]);
      add_product(part, part, second, right[2], right[3]);
      SB_UNROLL
      for (int i = 0; i < 4; ++i) sum[n][i] += part[i];
    }
  }
}

// sum += 16 rows of `count` numbers in shared memory, `numbers_pitch` apart, times as many rows, `width` wide; sums are
// by column_of_float_sum.
template <int kChunks>
SB_DEVICE void add_product_of_shared_numbers(const Shared<float>& numbers, int64_t numbers_pitch, const float* rows,
                                             int64_t count, int64_t pitch, int64_t width, float (&sum)[kChunks][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  SB_NO_UNROLL
  for (int64_t first = 0; first < count; first += 8) {
    const int64_t row = first + 2 * t;
    const bool is_there[2] = {row < count, row + 1 < count};
    float number[2][2];
    SB_UNROLL
    for (int i = 0; i < 2; ++i) SB_UNROLL
    for (int r = 0; r < 2; ++r) number[i][r] = is_there[i] ? numbers.get((g + 8 * r) * numbers_pitch + row + i) : 0.0f;
    const LeftParts parts(number[0][0], number[0][1], number[1][0], number[1][1]);
    SB_UNROLL
    for (int span = 0; span < kChunks / 4; ++span) {
      if (span * 32 >= width) continue;
      sync_warp();  // as above
      const int64_t column = span * 32 + 4 * g;
      const bool in_row = column < width;
      const float* at = rows + (is_there[0] && in_row ? row * pitch + column : 0);
      float part[4][4];
      SB_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float of_first = is_there[0] && in_row ? load(at + j) : 0.0f,
                    of_second = is_there[1] && in_row ? load(at + pitch + j) : 0.0f;
        SB_UNROLL
        for (int i = 0; i < 4; ++i) part[j][i] = 0;
        add_product(part[j], part[j], parts, of_first, of_second);
      }
      SB_UNROLL
      for (int j = 0; j < 4; ++j) SB_UNROLL
      for (int i = 0; i < 4; ++i) sum[4 * span + j][i] += part[j][i];
    }
  }
}

// -------------------- what is no number

// Whether all parts of a float32 are numbers: what rounds to infinity in bfloat16 has none.
SB_DEVICE bool has_parts(float v) { return (v - low_of(packed(v, 0.0f, Bfloat16{}), Bfloat16{})) * 0.0f == 0.0f; }
// Puts 0 in place of what is no number of type E in a word of shared memory; whether all of it was one.
template <class E>
SB_DEVICE bool clear_without_number(const Shared<uint32_t>& word, E e) {
  const uint32_t pair = word.get(0);
  uint32_t kept = 0;
  if constexpr (kIsFloat<E>) {
    kept = has_parts(same_bits<float>(pair)) ? ~0u : 0;
  } else {
    if (low_of(pair, e) * 0.0f == 0.0f) kept |= 0xffffu;
    if (high_of(pair, e) * 0.0f == 0.0f) kept |= 0xffff0000u;
  }
  if (kept != ~0u) word.set(0, pair & kept);
  return kept == ~0u;
}

}  // namespace sb::cuda

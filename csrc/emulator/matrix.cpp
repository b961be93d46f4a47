#include "matrix.h"

namespace sb::emulator {
namespace {

constexpr int kWarp = 32, kRowBytes = 16;

struct MatrixRow {
  const unsigned char* row;
  uint32_t* to;
};
struct Operands {
  float* sum;
  const uint32_t* left;
  uint32_t right[2];
};

void give_matrices(void* const* lanes, bool is_transposed) {
  for (int lane = 0; lane < kWarp; ++lane)
    for (int m = 0; m < 4; ++m) {
      const auto element = [&](int row, int column) {
        uint16_t bits;
        std::memcpy(&bits, static_cast<const MatrixRow*>(lanes[m * 8 + row])->row + 2 * column, 2);
        return uint32_t(bits);
      };
      const int g = lane / 4, t = lane % 4 * 2;
      static_cast<const MatrixRow*>(lanes[lane])->to[m] =
          is_transposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
    }
}
void give_rows(void* const* lanes) { give_matrices(lanes, false); }
void give_columns(void* const* lanes) { give_matrices(lanes, true); }

float bfloat16_of(uint32_t bits) {
  bits <<= 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
float float16_of(uint32_t bits) {
  const auto half = uint16_t(bits);
  _Float16 v;
  std::memcpy(&v, &half, sizeof v);
  return float(v);
}

// The upper 19 bits of a float32.
float tf32_of(uint32_t bits) {
  bits &= 0xffffe000;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Products are exact in float32; the device adds those of a step to the sum in an order that it does not say.
template <float number(uint32_t)>
void multiply(void* const* lanes) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& given = *static_cast<const Operands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int high = 0; high < 2; ++high) {
      const auto half = [&](uint32_t pair) { return number(high ? pair >> 16 : pair & 0xffff); };
      for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 8 + high] = half(given.left[i]);
      for (int i = 0; i < 2; ++i) right[t + i * 8 + high][g] = half(given.right[i]);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
      static_cast<const Operands*>(lanes[lane])->sum[i] += sum;
    }
}

// The same of TF32, with a depth of 8.
void multiply_tf32(void* const* lanes) {
  float left[16][8], right[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& given = *static_cast<const Operands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 4] = tf32_of(given.left[i]);
    for (int i = 0; i < 2; ++i) right[t + i * 4][g] = tf32_of(given.right[i]);
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += left[row][k] * right[k][column];
      static_cast<const Operands*>(lanes[lane])->sum[i] += sum;
    }
}

}  // namespace

void load_matrices(int64_t offset, uint32_t (&to)[4], bool is_transposed, Place place) {
  MatrixRow row{static_cast<const unsigned char*>(shared_access(offset, kRowBytes, false, place)), to};
  with_warp(is_transposed ? &give_columns : &give_rows, &row, place);
}

void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1, bool is_bfloat16,
                  Place place) {
  Operands operands{sum, left, {right_0, right_1}};
  with_warp(is_bfloat16 ? &multiply<bfloat16_of> : &multiply<float16_of>, &operands, place);
}

void multiply_add_tf32(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1, Place place) {
  Operands operands{sum, left, {right_0, right_1}};
  with_warp(&multiply_tf32, &operands, place);
}

}  // namespace sb::emulator

// ldmatrix, movmatrix and mma, which the lanes of a warp execute together.
#pragma once
#include "copies.h"

namespace ptx {

class Matrices : public AsynchronousCopies {
 public:
  using AsynchronousCopies::AsynchronousCopies;

 protected:
  // Of an 8 x 8 matrix of 16-bit numbers lane l holds the elements 2 (l % 4) and the next one of row l / 4.
  struct Matrix {
    uint16_t element[8][8];

    uint32_t pair(int lane, bool is_transposed) const {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint32_t low = is_transposed ? element[minor][major] : element[major][minor],
                     high = is_transposed ? element[minor + 1][major] : element[major][minor + 1];
      return low | high << 16;
    }
  };
  // ldmatrix.m8n8: lane l names row l % 8 of matrix l / 8; lanes beyond the last matrix name nothing.
  void load_matrices() {
    Matrix matrices[4];
    for (int lane = 0; lane < 8 * i->results; ++lane) {
      const uint64_t address = get<uint32_t>(0, lane) + uint64_t(i->offset);
      std::memcpy(matrices[lane / 8].element[lane % 8], memory(sp::shared, address, 16, nullptr, lane), 16);
    }
    for (int lane = 0; lane < kWarp; ++lane)
      for (int m = 0; m < i->results; ++m) put(m, lane, matrices[m].pair(lane, i->mode == md::trans));
  }
  void transpose_matrix() {
    Matrix matrix;
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto pair = get<uint32_t>(0, lane);
      std::memcpy(&matrix.element[lane / 4][lane % 4 * 2], &pair, 4);
    }
    for (int lane = 0; lane < kWarp; ++lane) put(0, lane, matrix.pair(lane, true));
  }
  // mma.row.col with 16 rows, 8 columns and `depth` products for each, of pairs of 16-bit numbers or of TF32. Products
  // are exact, and what is added to the sum is rounded to float32, in the order of the products; devices do not say
  // theirs.
  void multiply_add() {
    const bool is_tf32 = i->type == ty::f32;
    const int depth = int(i->offset), lefts = is_tf32 ? 4 : depth / 4, rights = is_tf32 ? 2 : depth / 8,
              of_register = is_tf32 ? 1 : 2;  // numbers; a lane's neighbours are 4 registers on
    double left[16][16], right[16][8];
    float sums[16][8];
    const auto number = [&](int operand, int lane, int half) {
      const auto word = get<uint32_t>(operand, lane);
      if (is_tf32) {
        float upper;
        const uint32_t read = word & 0xffffe000u;
        std::memcpy(&upper, &read, sizeof upper);
        return double(upper);
      }
      const auto bits = uint16_t(word >> 16 * half);
      return i->type == ty::f16 ? wide(F16{bits}) : wide(B16{bits});
    };
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = lane / 4, first = lane % 4 * of_register, next = 4 * of_register, pair = lane % 4 * 2;
      for (int half = 0; half < of_register; ++half) {
        for (int k = 0; k < lefts; ++k) left[row + k % 2 * 8][first + half + k / 2 * next] = number(k, lane, half);
        for (int k = 0; k < rights; ++k) right[first + half + k * next][row] = number(lefts + k, lane, half);
      }
      for (int k = 0; k < 4; ++k) sums[row + k / 2 * 8][pair + k % 2] = get<float>(lefts + rights + k, lane);
    }
    for (int k = 0; k < depth; ++k)
      for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column)
          sums[row][column] = float(double(sums[row][column]) + left[row][k] * right[k][column]);
    for (int lane = 0; lane < kWarp; ++lane)
      for (int k = 0; k < 4; ++k) put(k, lane, sums[lane / 4 + k / 2 * 8][lane % 4 * 2 + k % 2]);
  }
};

}  // namespace ptx

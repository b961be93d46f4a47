// Affine maps of tokens of 16 bits, and their gradients, on tensor cores. As exact as project.cuh: tokens are exact in
// 16 bits, and weights are sums of parts that hold all of their digits, three of bfloat16, or two of float16 relative
// to the largest weight of the output, since their range is short.
#pragma once
#include <type_traits>

#include "feature_products.cuh"
#include "project.cuh"

namespace sb::cuda {

inline constexpr int kProjectWarps = 4, kProjectTiles = 2;  // of a block; of 16 tokens, of a warp
inline constexpr int kProjectTokens = kProjectWarps * kProjectTiles * 16;

// A warp's tokens and 16 outputs at a time. Columns 2t, 2t + 1, 2t + 8 and 2t + 9 of the left operands of two products
// are four neighbours of a token each: a lane reads eight at once.
template <class E>
class ProjectTiles {
  static constexpr int kParts = std::is_same_v<E, Bfloat16> ? 3 : 2, kOutputs = 2, kDepth = 32;
  static constexpr bool kIsScaled = std::is_same_v<E, Half>;

 public:
  SB_DEVICE ProjectTiles(const ProjectParams& p, int64_t row, int64_t first_token)
      : p(p),
        row(row),
        b(row / p.heads),
        h(row % p.heads),
        map(((p.weight_batch == 1 ? 0 : b) * p.weight_heads + h * p.weight_heads / p.heads) * p.outputs),
        first_token(first_token),
        lane(lane_index()),
        g(lane / 4),
        t(lane % 4) {}

  // Outputs [first, first + 16).
  SB_DEVICE void run(int64_t first) {
    float sum[kProjectTiles][kOutputs][4], scale[kOutputs], back[kOutputs];
    SB_UNROLL
    for (int n = 0; n < kOutputs; ++n) {
      scale[n] = back[n] = 1;
      if (kIsScaled) find_scale(first + 8 * n + g, scale[n], back[n]);
      SB_UNROLL
      for (int tile = 0; tile < kProjectTiles; ++tile) SB_UNROLL
      for (int i = 0; i < 4; ++i) sum[tile][n][i] = 0;
    }
    for (int64_t e = 8 * t; e - 8 * t < p.head_dim; e += kDepth) {
      uint32_t right[kOutputs][4][kParts];  // pairs of weights
      SB_UNROLL
      for (int n = 0; n < kOutputs; ++n) SB_UNROLL
      for (int i = 0; i < 4; ++i)
        split(weight(first + 8 * n + g, e + 2 * i) * scale[n], weight(first + 8 * n + g, e + 2 * i + 1) * scale[n],
              right[n][i], E{});
      SB_UNROLL
      for (int tile = 0; tile < kProjectTiles; ++tile) {
        const FourWords low = token(tile, 0, e), high = token(tile, 8, e);
        SB_UNROLL
        for (int s = 0; s < 2; ++s) {
          const uint32_t left[4] = {low.at[2 * s], high.at[2 * s], low.at[2 * s + 1], high.at[2 * s + 1]};
          SB_UNROLL
          for (int k = kParts - 1; k >= 0; --k) SB_UNROLL
          for (int n = 0; n < kOutputs; ++n)
            multiply_add(sum[tile][n], left, right[n][2 * s][k], right[n][2 * s + 1][k], E{});
        }
      }
    }
    SB_UNROLL
    for (int n = 0; n < kOutputs; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t output = first + 8 * n + 2 * t + i;
      const float of_scale = kIsScaled ? shuffle_from(back[n], (2 * t + i) * 4) : 1.0f;
      if (output >= p.outputs) continue;
      const float bias = p.bias ? load(static_cast<const float*>(p.bias) + map + output) : 0.0f;
      SB_UNROLL
      for (int tile = 0; tile < kProjectTiles; ++tile) SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float z = (kIsScaled ? sum[tile][n][2 * r + i] * of_scale : sum[tile][n][2 * r + i]) + bias;
        if (output == p.outputs - 1)
          put(tile, r, p.last, within(z * float(p.last_factor), float(p.log_limit)));
        else
          put(tile, r, output, within(z, float(p.coordinate_limit)));
      }
    }
  }

  // What packed rows have besides outputs: 1 before the last, and zeros behind it.
  SB_DEVICE void fill() const {
    if (p.last == p.outputs - 1) return;
    SB_UNROLL
    for (int tile = 0; tile < kProjectTiles; ++tile) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      for (int64_t column = p.last + 1 + t; column < p.width; column += 4) put(tile, r, column, 0.0f);
      if (t == 0) put(tile, r, p.outputs - 1, 1.0f);
    }
  }

 private:
  SB_DEVICE float weight(int64_t output, int64_t e) const {
    return output < p.outputs && e < p.head_dim
               ? load(static_cast<const float*>(p.weight) + (map + output) * p.head_dim + e)
               : 0.0f;
  }
  // Eight numbers of the token of this lane's row g, or g + 8.
  SB_DEVICE FourWords token(int tile, int eight, int64_t e) const {
    const int64_t at = first_token + 16 * tile + g + eight;
    if (at >= p.tokens || e >= p.head_dim) return FourWords{{0, 0, 0, 0}};
    return load(reinterpret_cast<const FourWords*>(p.x.at<const E>(b, h, at) + e));
  }
  SB_DEVICE void put(int tile, int r, int64_t column, float value) const {
    const int64_t at = first_token + 16 * tile + g + 8 * r;
    if (at < p.tokens) store(static_cast<float*>(p.z) + (row * p.tokens + at) * p.width + column, value);
  }

  // Of the output of row g: the power of two that brings its largest weight near the largest float16, and its inverse.
  SB_DEVICE void find_scale(int64_t output, float& scale, float& back) const {
    float most = 0;
    for (int64_t e = t; e < p.head_dim; e += 4) {
      const float of_weight = weight(output, e);
      most = larger(most, of_weight < 0 ? -of_weight : of_weight);
    }
    most = larger(most, shuffle_xor(most, 1));
    scale = scale_to_half(larger(most, shuffle_xor(most, 2)), back);
  }

  const ProjectParams& p;
  const int64_t row, b, h, map, first_token;
  const int lane, g, t;
};

template <class E>
SB_KERNEL SB_THREADS_AT_MOST(kProjectWarps* kWarp) project_products(ProjectParams p) {
  const int64_t pieces = ceil_div(p.tokens, kProjectTokens);
  for_each_task(p.batch * p.heads * pieces, [&](int64_t task) {
    const int64_t first = task % pieces * kProjectTokens + warp_index() * kProjectTiles * 16;
    if (first >= p.tokens) return;
    ProjectTiles<E> tiles(p, task / pieces, first);
    for (int64_t output = 0; output < p.outputs; output += 16) tiles.run(output);
    tiles.fill();
  });
}

// As project_backward_parts: gradients of maps are the features, and the bias has the column behind the others.
template <class E, int D>
SB_KERNEL SB_THREADS_AT_MOST(kProductThreads) project_parts_products(ProjectParams p) {
  const SummedFeatures sums = SummedFeatures::of_given(p.outputs, p.head_dim, p.head_dim + 1);
  for_each_task(p.batch * p.heads * p.parts * ProductTask<D>::blocks(sums), [&](int64_t i) {
    const ProductTask<D> task(sums, i);
    const int64_t head = task.row / p.parts, begin = task.row % p.parts * kTokensPerPart,
                  end = begin + kTokensPerPart < p.tokens ? begin + kTokensPerPart : p.tokens;
    const float* grad = static_cast<const float*>(p.grad) + head * p.tokens * p.outputs;
    FeatureProducts<E, D> products(sums, task.first, task.column);
    products.add(
        end - begin,
        [&](int64_t i) {
          bool has_gradient = false;  // else it may be padding
          for (int64_t o = 0; o < p.outputs; ++o)
            if (load(grad + (begin + i) * p.outputs + o) != 0.0f) has_gradient = true;
          return SummedToken{has_gradient ? begin + i : -1, has_gradient ? 1.0f : 0.0f, 1.0f};
        },
        [&](int64_t token) { return [=](int64_t o) { return load(grad + token * p.outputs + o); }; },
        [&](int64_t token) { return p.x.at<const E>(head / p.heads, head % p.heads, token); });
    products.store_sums(static_cast<float*>(p.partial) + task.row * p.outputs * sums.columns);
  });
}

}  // namespace sb::cuda

// Launcher of the projections: blocks of tokens in parallel; partial weight gradients are added in block order.
#include "../profile.h"
#include "launchers.h"
#include "tensor_rows.h"

#include <limits>

namespace sb::cpu {
namespace {

// Shapes of a projection of tokens (B, H, N, d) by a weight (1 or B, heads, outputs, d).
struct Projection {
  Projection(const Tensor& tokens, const Tensor& weight)
      : batch(tokens.size(0)),
        heads(tokens.size(1)),
        n(tokens.size(2)),
        weight_heads(weight.size(1)),
        weight_batch(weight.size(0)),
        blocks(ceil_div(n, kTokensPerTask)) {
    p.head_dim = tokens.size(3), p.head_pad = pad_to(p.head_dim, kPad), p.outputs = weight.size(2),
    p.outputs_pad = pad_to(p.outputs, kPad);
  }
  ProjectParams block(int64_t i) const {
    ProjectParams part = p;
    part.tokens = std::min(kTokensPerTask, n - i * kTokensPerTask);
    return part;
  }
  // The tokens of block i as rows, in place or in scratch.
  template <class T>
  BlockRows<T> rows(const Tensor& tokens, int64_t b, int64_t h, int64_t i, T* scratch) const {
    return rows_of_block<T>(tokens, p.head_pad, b, h, i * kTokensPerTask, block(i).tokens, scratch);
  }
  int64_t weight_of(int64_t b, int64_t h) const {
    return (weight_batch == 1 ? 0 : b) * weight_heads + h * weight_heads / heads;
  }

  ProjectParams p{};
  int64_t batch, heads, n, weight_heads, weight_batch, blocks;
};

// Outputs that are vectorised (ProjectParams). The last never is, because packed rows have it at a column of its own.
int64_t lanes_of(int64_t outputs) {
  const int64_t whole = (outputs - 1) / 16 * 16, left = outputs - 1 - whole;
  return whole + (left > 10 ? 16 : left > 4 ? 8 : 0);
}

// The weights of every map of a call in the kernel's layout. Rows of results have `width` columns. The last output goes
// to column `last`, multiplied by `last_factor`.
template <class T>
class Weights {
 public:
  Weights(Projection& call, const Tensor& weight, const MaybeTensor& bias, int64_t width, int64_t last, T last_factor,
          MapLimits<T> limits)
      : last_factor(last_factor), limits(limits) {
    call.p.outputs_pad = width, call.p.lanes = lanes_of(call.p.outputs);
    const int64_t in_lanes = std::min(call.p.lanes, call.p.outputs - 1);
    call.p.dots = call.p.outputs - in_lanes;
    p = call.p;
    const int64_t maps = call.weight_batch * call.weight_heads;
    of_lanes.resize(size_t(maps * p.head_dim * p.lanes)), rows.resize(size_t(maps * p.dots * p.head_pad));
    offsets.resize(size_t(maps * width));
    for (int64_t o = in_lanes; o < p.outputs; ++o) columns.push_back(int32_t(o + 1 < p.outputs ? o : last));
    const Tensor packed = as_contiguous(weight);
    const T* w = static_cast<const T*>(packed.data_ptr());
    for (int64_t m = 0; m < maps; ++m, w += p.outputs * p.head_dim) {
      for (int64_t o = 0; o < in_lanes; ++o)
        for (int64_t e = 0; e < p.head_dim; ++e)
          of_lanes[size_t((m * p.head_dim + e) * p.lanes + o)] = w[o * p.head_dim + e];
      for (int64_t o = in_lanes; o < p.outputs; ++o)
        std::copy_n(w + o * p.head_dim, p.head_dim, &rows[size_t((m * p.dots + o - in_lanes) * p.head_pad)]);
    }
    if (!bias) return;
    const Tensor flat = as_contiguous(*bias);
    const T* from = static_cast<const T*>(flat.data_ptr());
    for (int64_t m = 0; m < maps; ++m)
      for (int64_t o = 0; o < p.outputs; ++o)
        offsets[size_t(m * width + (o + 1 < p.outputs ? o : last))] = from[m * p.outputs + o];
  }
  // Puts `value` into this column of every row of results.
  void set(int64_t column, T value) {
    for (size_t at = size_t(column); at < offsets.size(); at += size_t(p.outputs_pad)) offsets[at] = value;
  }
  ProjectWeights<T> of(int64_t map) const {
    return {of_lanes.data() + map * p.head_dim * p.lanes,
            rows.data() + map * p.dots * p.head_pad,
            columns.data(),
            offsets.data() + map * p.outputs_pad,
            last_factor,
            limits};
  }

 private:
  ProjectParams p;
  T last_factor;
  MapLimits<T> limits;
  std::vector<T> of_lanes, rows, offsets;
  std::vector<int32_t> columns;
};

// Rows of outputs, or `packed`: coordinates, a column of ones, the log scale in base 2.
template <class T>
Tensor forward(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias, bool packed) {
  Projection call(tokens, weight);
  const int64_t last = call.p.outputs - 1, padded = packed ? packed_width(last) : call.p.outputs_pad,
                width = packed ? padded : call.p.outputs;
  constexpr T kUnlimited = std::numeric_limits<T>::infinity();  // who reads a map that is not packed limits it
  const MapLimits<T> limits = packed ? map_limits<T>(LowRank::kQuadratic) : MapLimits<T>{kUnlimited, kUnlimited};
  Weights<T> w(call, weight, bias, padded, packed ? last + 1 : last, T(packed ? kLog2e : 1), limits);
  if (packed) w.set(last, T(1));
  Tensor out = empty({call.batch, call.heads, call.n, width}, kScalar<T>);
  T* z = static_cast<T*>(out.data_ptr());
  // Heads inside blocks: the heads of a token are often neighbours in memory.
  parallel_units(call.batch, call.blocks, call.heads, kTokensPerTask * (call.p.head_pad + padded) * int64_t(sizeof(T)),
                 [&](int64_t b, int64_t i, int64_t h, void* scratch) {
                   const ProjectParams block = call.block(i);
                   T* to = z + ((b * call.heads + h) * call.n + i * kTokensPerTask) * width;
                   T* rows = width == padded ? to : static_cast<T*>(scratch) + kTokensPerTask * call.p.head_pad;
                   const BlockRows<T> in = call.rows<T>(tokens, b, h, i, static_cast<T*>(scratch));
                   project_kernels<T>().project(block, w.of(call.weight_of(b, h)), in.data, in.row, rows);
                   for (int64_t at = 0; rows != to && at < block.tokens; ++at)
                     std::copy_n(rows + at * padded, width, to + at * width);
                 });
  return out;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight) {
  const Projection call(tokens, weight);
  const ProjectParams& p = call.p;
  const Tensor g = as_contiguous(grad);
  const int64_t size = p.outputs * p.head_pad;
  const TensorRows padded = as_rows<T>(as_contiguous(weight), p.head_pad);

  Tensor d_tokens = empty_like_tokens(tokens, p.head_dim, tokens.scalar_type());
  const TensorRows d_rows = result_rows<T>(d_tokens, p.head_pad);
  const ZeroRow<T> zero_row(p.head_pad);
  const int64_t parts = call.batch * call.heads * call.blocks;
  std::vector<T> weights(size_t(parts * size));
  std::vector<double> biases(size_t(parts * p.outputs));
  parallel_units(
      call.batch, call.heads, call.blocks, kTokensPerTask * p.head_pad * int64_t(sizeof(T)),
      [&](int64_t b, int64_t h, int64_t i, void* scratch) {
        const BlockRows<T> in = call.rows<T>(tokens, b, h, i, static_cast<T*>(scratch));
        const int64_t part = (b * call.heads + h) * call.blocks + i;
        project_kernels<T>().project_backward(
            call.block(i),
            static_cast<const T*>(g.data_ptr()) + ((b * call.heads + h) * call.n + i * kTokensPerTask) * p.outputs,
            in.data, in.row, static_cast<const T*>(padded.rows.data) + call.weight_of(b, h) * size,
            static_cast<const T*>(zero_row.data()), d_rows.rows.template at<T>(b, h, i * kTokensPerTask),
            d_rows.rows.row, &weights[size_t(part * size)], &biases[size_t(part * p.outputs)]);
      });
  Tensor d_weight = zeros({call.weight_batch, call.weight_heads, p.outputs, p.head_dim}, kScalar<T>);
  Tensor d_bias = zeros({call.weight_batch, call.weight_heads, p.outputs}, kScalar<T>);
  T *dw = static_cast<T*>(d_weight.data_ptr()), *db = static_cast<T*>(d_bias.data_ptr());
  std::vector<double> bias(size_t(p.outputs));  // of one batch row and head
  for (int64_t part = 0; part < parts; ++part) {
    const T* from = weights.data() + part * size;
    const int64_t m = call.weight_of(part / (call.heads * call.blocks), part / call.blocks % call.heads);
    const bool is_last = (part + 1) % call.blocks == 0;
    for (int64_t o = 0; o < p.outputs; ++o) {
      for (int64_t e = 0; e < p.head_dim; ++e) dw[(m * p.outputs + o) * p.head_dim + e] += from[o * p.head_pad + e];
      double& sum = bias[size_t(o)];
      sum += biases[size_t(part * p.outputs + o)];
      if (is_last) db[m * p.outputs + o] += T(sum), sum = 0;
    }
  }
  write_back<T>(d_rows, d_tokens);
  return {d_tokens, d_weight, d_bias};
}

}  // namespace

Tensor project(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias) {
  const Stage stage("projection");
  return (tokens.scalar_type() == ScalarType::Double ? forward<double> : forward<float>)(tokens, weight, bias, false);
}

Tensor project_packed(const Tensor& tokens, const Tensor& weight, const MaybeTensor& bias) {
  const Stage stage("projection");
  return (tokens.scalar_type() == ScalarType::Double ? forward<double> : forward<float>)(tokens, weight, bias, true);
}

std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight) {
  const Stage stage("backward of projection");
  return (tokens.scalar_type() == ScalarType::Double ? backward<double> : backward<float>)(grad, tokens, weight);
}

}  // namespace sb::cpu

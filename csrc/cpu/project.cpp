// Launcher of the projections: blocks of tokens in parallel; partial weight gradients are added in block order.
#include <algorithm>

#include "../launchers.h"
#include "../profile.h"
#include "attention_call.h"
#include "project.h"

namespace sb::cpu {
namespace {

constexpr int64_t kTokensPerTask = 256;

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
  // Tokens of block i, and the bytes of scratch that takes.
  template <class T>
  BlockRows<T> rows(const Tensor& tokens, int64_t b, int64_t h, int64_t i, T* scratch) const {
    return rows_of_block<T>(tokens, p.head_pad, b, h, i * kTokensPerTask, block(i).tokens, scratch);
  }
  template <class T>
  int64_t bytes_of_rows() const {
    return kTokensPerTask * p.head_pad * int64_t(sizeof(T));
  }
  int64_t weight_of(int64_t b, int64_t h) const {
    return (weight_batch == 1 ? 0 : b) * weight_heads + h * weight_heads / heads;
  }

  ProjectParams p{};
  int64_t batch, heads, n, weight_heads, weight_batch, blocks;
};

// Transposed weights and offsets with padded rows: the outputs are the lanes. Output o is column column_of(o).
template <class T>
struct TransposedWeight {
  template <class ColumnOf>
  TransposedWeight(const Projection& call, const Tensor& weight, const std::optional<Tensor>& bias,
                   const ColumnOf& column_of)
      : p(call.p),
        values(size_t(maps(call) * p.head_dim * p.outputs_pad), T(0)),
        offsets(size_t(maps(call) * p.outputs_pad), T(0)) {
    const Tensor packed = as_contiguous(weight);
    const T* w = static_cast<const T*>(packed.data_ptr());
    for (int64_t m = 0; m < maps(call); ++m)
      for (int64_t o = 0; o < p.outputs; ++o)
        for (int64_t e = 0; e < p.head_dim; ++e)
          values[size_t((m * p.head_dim + e) * p.outputs_pad + column_of(o))] = w[(m * p.outputs + o) * p.head_dim + e];
    if (!bias) return;
    const Tensor flat = as_contiguous(*bias);
    const T* from = static_cast<const T*>(flat.data_ptr());
    for (int64_t m = 0; m < maps(call); ++m)
      for (int64_t o = 0; o < p.outputs; ++o)
        offsets[size_t(m * p.outputs_pad + column_of(o))] = from[m * p.outputs + o];
  }
  static int64_t maps(const Projection& call) { return call.weight_batch * call.weight_heads; }
  const T* of(int64_t map) const { return &values[size_t(map * p.head_dim * p.outputs_pad)]; }
  const T* offset_of(int64_t map) const { return &offsets[size_t(map * p.outputs_pad)]; }

  ProjectParams p;
  std::vector<T> values, offsets;
};

template <class T>
Tensor forward(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Projection call(tokens, weight);
  const ProjectParams& p = call.p;
  const TransposedWeight<T> w(call, weight, bias, [](int64_t o) { return o; });
  Tensor out = empty_cpu({call.batch, call.heads, call.n, p.outputs}, kScalar<T>);
  T* z = static_cast<T*>(out.data_ptr());
  // Heads within blocks: the heads of a token are often neighbours in memory.
  parallel_units(call.batch, call.blocks, call.heads,
                 kTokensPerTask * (p.head_pad + p.outputs_pad) * int64_t(sizeof(T)),
                 [&](int64_t b, int64_t i, int64_t h, void* scratch) {
                   const ProjectParams block = call.block(i);
                   const int64_t m = call.weight_of(b, h);
                   T* rows = static_cast<T*>(scratch);
                   const BlockRows<T> in = call.rows<T>(tokens, b, h, i, rows + kTokensPerTask * p.outputs_pad);
                   project_kernels<T>().project(block, in.data, in.row, w.of(m), w.offset_of(m), rows);
                   T* to = z + ((b * call.heads + h) * call.n + i * kTokensPerTask) * p.outputs;
                   for (int64_t at = 0; at < block.tokens; ++at)
                     std::copy_n(rows + at * p.outputs_pad, p.outputs, to + at * p.outputs);
                 });
  return out;
}

// Packed rows: the column of ones is an output of its own with a weight of zero.
template <class T>
Tensor forward_packed(const Tensor& tokens, const Tensor& weight, const Tensor& bias) {
  Projection call(tokens, weight);
  const int64_t rank = call.p.outputs - 1, width = packed_width(rank);
  call.p.outputs_pad = width;
  TransposedWeight<T> w(call, weight, bias, [rank](int64_t o) { return o + (o == rank); });
  for (int64_t m = 0; m < w.maps(call); ++m) w.offsets[size_t(m * width + rank)] = T(1);
  Tensor out = empty_cpu({call.batch, call.heads, call.n, width}, kScalar<T>);
  T* z = static_cast<T*>(out.data_ptr());
  parallel_units(call.batch, call.blocks, call.heads, call.bytes_of_rows<T>(),
                 [&](int64_t b, int64_t i, int64_t h, void* scratch) {
                   const ProjectParams block = call.block(i);
                   const int64_t m = call.weight_of(b, h);
                   const BlockRows<T> in = call.rows<T>(tokens, b, h, i, static_cast<T*>(scratch));
                   T* rows = z + ((b * call.heads + h) * call.n + i * kTokensPerTask) * width;
                   project_kernels<T>().project(block, in.data, in.row, w.of(m), w.offset_of(m), rows);
                   for (int64_t at = 0; at < block.tokens; ++at)
                     rows[at * width + rank + 1] *= T(1.44269504088896340736);
                 });
  return out;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight) {
  const Projection call(tokens, weight);
  const ProjectParams& p = call.p;
  const Tensor g = as_contiguous(grad);
  const int64_t size = p.outputs * p.head_pad;
  const std::vector<T> padded = padded_weight<T>(weight);

  Tensor d_tokens = empty_like_tokens(tokens, p.head_dim, tokens.scalar_type());
  const Operand d_rows = result_rows<T>(d_tokens, p.head_pad);
  const ZeroRow<T> zero_row(p.head_pad);
  std::vector<T> partial(size_t(call.batch * call.heads * call.blocks * (size + p.outputs)));
  parallel_units(
      call.batch, call.heads, call.blocks, call.bytes_of_rows<T>(),
      [&](int64_t b, int64_t h, int64_t i, void* scratch) {
        const BlockRows<T> in = call.rows<T>(tokens, b, h, i, static_cast<T*>(scratch));
        T* d_weight = &partial[size_t(((b * call.heads + h) * call.blocks + i) * (size + p.outputs))];
        project_kernels<T>().project_backward(
            call.block(i),
            static_cast<const T*>(g.data_ptr()) + ((b * call.heads + h) * call.n + i * kTokensPerTask) * p.outputs,
            in.data, in.row, &padded[size_t(call.weight_of(b, h) * size)], static_cast<const T*>(zero_row.data()),
            d_rows.rows.template at<T>(b, h, i * kTokensPerTask), d_rows.rows.row, d_weight, d_weight + size);
      });
  Tensor d_weight = zeros_cpu({call.weight_batch, call.weight_heads, p.outputs, p.head_dim}, kScalar<T>);
  Tensor d_bias = zeros_cpu({call.weight_batch, call.weight_heads, p.outputs}, kScalar<T>);
  T *dw = static_cast<T*>(d_weight.data_ptr()), *db = static_cast<T*>(d_bias.data_ptr());
  for (int64_t at = 0; at < call.batch * call.heads * call.blocks; ++at) {
    const T* from = &partial[size_t(at * (size + p.outputs))];
    const int64_t m = call.weight_of(at / (call.heads * call.blocks), at / call.blocks % call.heads);
    for (int64_t o = 0; o < p.outputs; ++o) {
      for (int64_t e = 0; e < p.head_dim; ++e) dw[(m * p.outputs + o) * p.head_dim + e] += from[o * p.head_pad + e];
      db[m * p.outputs + o] += from[size + o];
    }
  }
  write_back<T>(d_rows, d_tokens);
  return {d_tokens, d_weight, d_bias};
}

}  // namespace

template <class T>
std::vector<T> padded_weight(const Tensor& weight) {
  const int64_t rows = weight.size(0) * weight.size(1) * weight.size(2), width = weight.size(3),
                padded_width = pad_to(width, kPad);
  const Tensor packed = as_dtype(as_contiguous(weight), kScalar<T>);
  std::vector<T> padded(size_t(rows * padded_width), T(0));
  const T* w = static_cast<const T*>(packed.data_ptr());
  for (int64_t row = 0; row < rows; ++row) std::copy_n(w + row * width, width, &padded[size_t(row * padded_width)]);
  return padded;
}
template std::vector<float> padded_weight<float>(const Tensor&);
template std::vector<double> padded_weight<double>(const Tensor&);

Tensor project(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Stage stage("projection");
  return tokens.scalar_type() == ScalarType::Double ? forward<double>(tokens, weight, bias)
                                                    : forward<float>(tokens, weight, bias);
}

Tensor project_packed(const Tensor& tokens, const Tensor& weight, const Tensor& bias) {
  const Stage stage("projection");
  return tokens.scalar_type() == ScalarType::Double ? forward_packed<double>(tokens, weight, bias)
                                                    : forward_packed<float>(tokens, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& tokens, const Tensor& weight) {
  const Stage stage("backward of projection");
  return tokens.scalar_type() == ScalarType::Double ? backward<double>(grad, tokens, weight)
                                                    : backward<float>(grad, tokens, weight);
}

}  // namespace sb::cpu

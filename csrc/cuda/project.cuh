// Affine maps of tokens and their gradients, one thread per element of a result.
#pragma once
#include "device.h"

namespace sb::cuda {

// Token i of head h, and the map that its head has.
struct ProjectedToken {
  int64_t b, h, i;
  SB_DEVICE ProjectedToken(const ProjectParams& p, int64_t row)
      : b(row / (p.heads * p.tokens)), h(row / p.tokens % p.heads), i(row % p.tokens) {}
  SB_DEVICE int64_t map(const ProjectParams& p) const {
    return (p.weight_batch == 1 ? 0 : b) * p.weight_heads + h * p.weight_heads / p.heads;
  }
};

template <class T>
SB_DEVICE T within(T value, T limit) {
  return value > limit ? limit : value < -limit ? -limit : value;  // NaN stays NaN
}

template <class E>
SB_KERNEL project(ProjectParams p) {
  typedef AccType<E> T;
  for_each_element(p.batch * p.heads * p.tokens * p.width, [&](int64_t at) {
    const int64_t column = at % p.width;
    const ProjectedToken token(p, at / p.width);
    const bool is_last = column == p.last;
    T z = T(0);
    if (column < p.outputs - 1 || is_last) {
      const int64_t output = is_last ? p.outputs - 1 : column, row = token.map(p) * p.outputs + output;
      const T* weight = static_cast<const T*>(p.weight) + row * p.head_dim;
      const E* x = p.x.at<const E>(token.b, token.h, token.i);
      for (int64_t e = 0; e < p.head_dim; ++e) z += load(weight + e) * T(widened(load(x + e)));
      if (p.bias) z += load(static_cast<const T*>(p.bias) + row);
      z = is_last ? within(z * T(p.last_factor), T(p.log_limit)) : within(z, T(p.coordinate_limit));
    } else if (column == p.outputs - 1) {
      z = T(1);  // of packed rows
    }
    store(static_cast<T*>(p.z) + at, z);
  });
}

template <class E>
SB_KERNEL project_backward_tokens(ProjectParams p) {
  typedef AccType<E> T;
  for_each_element(p.batch * p.heads * p.tokens * p.head_dim, [&](int64_t at) {
    const int64_t row = at / p.head_dim, e = at % p.head_dim;
    const ProjectedToken token(p, row);
    const T* weight = static_cast<const T*>(p.weight) + token.map(p) * p.outputs * p.head_dim + e;
    const T* grad = static_cast<const T*>(p.grad) + row * p.outputs;
    T sum = T(0);
    for (int64_t o = 0; o < p.outputs; ++o) sum += load(grad + o) * load(weight + o * p.head_dim);
    store(p.dx.at<E>(token.b, token.h, token.i) + e, Narrow<E>::of(sum));
  });
}

// Sums over kTokensPerPart tokens; column head_dim is of the bias. A token without gradient is not read: it may be
// padding.
template <class E>
SB_KERNEL project_backward_parts(ProjectParams p) {
  typedef AccType<E> T;
  const int64_t columns = p.head_dim + 1, size = p.outputs * columns;
  for_each_element(p.batch * p.heads * p.parts * size, [&](int64_t at) {
    const int64_t e = at % columns, o = at / columns % p.outputs, part = at / size % p.parts,
                  head = at / size / p.parts, begin = part * kTokensPerPart,
                  end = begin + kTokensPerPart < p.tokens ? begin + kTokensPerPart : p.tokens;
    const T* grad = static_cast<const T*>(p.grad) + head * p.tokens * p.outputs + o;
    T sum = T(0);
    for (int64_t i = begin; i < end; ++i) {
      const T g = load(grad + i * p.outputs);
      if (g == T(0)) continue;
      sum += e == p.head_dim ? g : g * T(widened(load(p.x.at<const E>(head / p.heads, head % p.heads, i) + e)));
    }
    store(static_cast<T*>(p.partial) + at, sum);
  });
}

// Adds the parts of all tokens that share a weight, in their order.
template <class T>
SB_KERNEL project_backward_weight(ProjectParams p) {
  const int64_t columns = p.head_dim + 1, size = p.outputs * columns, group = p.heads / p.weight_heads,
                shared = p.weight_batch == 1 ? p.batch : 1;
  for_each_element(p.weight_batch * p.weight_heads * size, [&](int64_t at) {
    const int64_t e = at % columns, row = at / columns, map = at / size;
    T sum = T(0);
    for (int64_t i = 0; i < shared; ++i) {
      const int64_t b = p.weight_batch == 1 ? i : map / p.weight_heads;
      for (int64_t h = map % p.weight_heads * group; h < (map % p.weight_heads + 1) * group; ++h)
        for (int64_t part = 0; part < p.parts; ++part)
          sum += load(static_cast<const T*>(p.partial) + ((b * p.heads + h) * p.parts + part) * size + at % size);
    }
    store(e == p.head_dim ? static_cast<T*>(p.d_bias) + row : static_cast<T*>(p.d_weight) + row * p.head_dim + e, sum);
  });
}

}  // namespace sb::cuda

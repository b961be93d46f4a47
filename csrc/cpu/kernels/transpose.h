// Rows of several tokens as [element][lane], a token in every lane.
#pragma once
#include "element_types.h"

namespace sb::SB_ISA {

// Calls visit(step, first lane, vector of lanes) for the steps of kLanes rows, ascending in every lane.
template <class E, int kLanes, class Visit>
SB_INLINE void for_each_step(const E* const* rows, int64_t width, const Visit& visit) {
  typedef StepOf<E> S;
  constexpr int N = kLaneWidth<S, kLanes>;
  const int64_t steps = steps_of<E>(width);
  int64_t e = 0;
  for (; e + N <= steps; e += N)
    for (int lane = 0; lane < kLanes; lane += N) {
      Vector<S, N> square[N];
      SB_EACH (i, N) square[i] = load<S, N>(reinterpret_cast<const S*>(rows[lane + i]) + e);
      transpose_square<S, N>(square);
      SB_EACH (i, N) visit(e + i, lane, square[i]);
    }
  for (; e < steps; ++e)
    for (int lane = 0; lane < kLanes; lane += N) {
      Vector<S, N> one;
      SB_EACH (i, N) one[i] = step_at<E>(rows[lane + i], e);
      visit(e, lane, one);
    }
}

// [step][lane] from kLanes rows, without a change of bits.
template <class E, int kLanes>
SB_INLINE void transpose_steps(const E* const* rows, int64_t width, StepOf<E>* out) {
  typedef StepOf<E> S;
  constexpr int N = kLaneWidth<S, kLanes>;
  for_each_step<E, kLanes>(rows, width, [&](int64_t e, int lane, Vector<S, N> v) SB_INLINE_LAMBDA {
    store<S, N>(out + e * kLanes + lane, v);
  });
}

// out[lane] = rows[lane] . lanes, summed in the order of products of operands in lanes.
template <class E, int kLanes>
SB_INLINE void dot_of_lanes(const E* const* rows, int64_t width, const StepOf<E>* lanes, AccType<E>* out) {
  typedef AccType<E> T;
  typedef StepOf<E> S;
  constexpr int N = kLaneWidth<S, kLanes>;
  Vector<T, N> sum[kLanes / N]{};
  for_each_step<E, kLanes>(rows, width, [&](int64_t e, int lane, Vector<S, N> v) SB_INLINE_LAMBDA {
    auto& s = sum[lane / N];
    s = multiply_add<T, S, N>(s, v, load<S, N>(lanes + e * kLanes + lane));
  });
  SB_EACH (v, kLanes / N) store<T, N>(out + v * N, sum[v]);
}

// [coordinate][lane] from kLanes rows, times `factor`. Rows are read up to the next multiple of a vector.
template <class T, int kLanes>
SB_INLINE void transpose_rows(const T* const* rows, int64_t width, T factor, T* out) {
  constexpr int N = kLaneWidth<T, kLanes>;
  static_assert(kPad % N == 0, "rows are padded to whole squares");
  for (int64_t e = 0; e < width; e += N)
    for (int lane = 0; lane < kLanes; lane += N) {
      Vector<T, N> square[N];
      SB_EACH (i, N) square[i] = load<T, N>(rows[lane + i] + e) * factor;
      transpose_square<T, N>(square);
      T* to = out + e * kLanes + lane;
      if (e + N <= width) {
        SB_EACH (i, N) store<T, N>(to + i * kLanes, square[i]);
      } else {
        SB_EACH (i, N)
          if (e + i < width) store<T, N>(to + i * kLanes, square[i]);
      }
    }
}

// [element][lane] in the accumulation type from [step][lane]: the steps themselves, or a copy in `wide`.
template <class E, int kLanes>
SB_INLINE const AccType<E>* widen_steps(const StepOf<E>* steps, int64_t width, AccType<E>* wide) {
  if constexpr (kPaired<E>) {
    constexpr int N = kLaneWidth<float, kLanes>;
    for (int64_t e = 0; e < steps_of<E>(width); ++e)
      for (int lane = 0; lane < kLanes; lane += N) {
        const auto words = load<Word, N>(steps + e * kLanes + lane);
        store<float, N>(wide + 2 * e * kLanes + lane, (Vector<float, N>)(words << 16));
        store<float, N>(wide + (2 * e + 1) * kLanes + lane, (Vector<float, N>)(words & 0xffff0000u));
      }
    return wide;
  } else {
    return steps;
  }
}

}  // namespace sb::SB_ISA

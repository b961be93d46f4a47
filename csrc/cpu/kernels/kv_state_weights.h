// Weights of the state in each query's own scale.
#pragma once
#include <cstdint>

#include "features.h"
#include "isa.h"
#include "vec.h"

namespace sb::SB_ISA {

// exp(kappa_j - kappa_ref) of entries [begin, end) of a list.
template <class T>
SB_INLINE void decay_of_keys(const LogScales<T>& kappa, T kappa_ref, const int32_t* key, int64_t begin, int64_t end,
                             T* decay) {
  constexpr int N = kWidth<T>;
  for (int64_t i = begin; i < end; ++i) decay[i] = kappa(key[i]) - kappa_ref;
  for (int64_t i = begin; i < end; i += N) store<T, N>(decay + i, exp2v<N>(load<T, N>(decay + i)));
}

// exp(rho + kappa_ref - log) of each lane, 0 where kv_state_log says that no state is used. The exponent is formed in
// double: its error would scale a query's whole complement against its exact part.
template <class T, int kLanes>
SB_INLINE void kv_state_weights(const T* rho, T kappa_ref, const T* log, const T* kv_state_log, T* weight) {
  constexpr int N = kLanes < kWidth<double> ? kLanes : kWidth<double>;
  double exponent[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    exponent[lane] = kv_state_log[lane] <= T(-1e29) ? -1e30 : double(rho[lane]) + double(kappa_ref) - double(log[lane]);
  for (int lane = 0; lane < kLanes; lane += N) {
    const auto power = exp2v<N>(load<double, N>(exponent + lane));
    SB_EACH (i, N) weight[lane + i] = T(power[i]);
  }
}

}  // namespace sb::SB_ISA

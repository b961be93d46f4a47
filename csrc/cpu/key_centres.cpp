#include "key_centres.h"

#include "../math/low_rank_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace sb::cpu {
namespace {

// Writes the mean of the samples' coordinates, weighted with exp(kappa) as in a state, to `mean`. With a causal edge
// the samples are the first chunk, which is past for every query that reads a state; else they lie evenly over the row.
template <class T>
void sample_mean(const AttentionParams& p, int64_t b, int64_t kv, T* mean) {
  const RowRange& row = p.rows[b];
  const int64_t keys = row.k_end - row.k_first, n = std::min(keys, kCentreSamples);
  const auto kappa = [&](int64_t j) { return *p.kappa.at<const T>(b, kv, j); };
  int64_t sample[kCentreSamples], count = 0;
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = row.k_first + (p.is_causal ? i : i * keys / n);
    if (p.k_mask && p.k_mask[b * p.k_tokens + j]) continue;
    sample[count++] = j, top = std::max(top, kappa(j));
  }
  T total = T(0);
  for (int64_t i = 0; i < count; ++i) {
    const T weight = std::exp2(kappa(sample[i]) - top);
    const T* y = p.y.at<const T>(b, kv, sample[i]);
    for (int64_t a = 0; a < p.rank; ++a) mean[a] += weight * y[a];
    total += weight;
  }
  for (int64_t a = 0; a < p.rank && count > 0; ++a) mean[a] /= total;
}

}  // namespace

template <class T>
void KeyCentres<T>::set(AttentionParams& p) {
  if (p.low_rank != LowRank::kQuadratic) return;
  rows.assign(size_t(p.batch * p.kv_heads * p.map_pad), T(0));
  bool any = false;
  for (int64_t head = 0; head < p.batch * p.kv_heads; ++head) {
    T* centre = &rows[size_t(head * p.map_pad)];
    sample_mean<T>(p, head / p.kv_heads, head % p.kv_heads, centre);
    T square = T(0);
    for (int64_t a = 0; a < p.rank; ++a) square += centre[a] * centre[a];
    const bool is_far = square >= T(kCentreBound) && square < T(1e30);  // not of NaN
    centre[p.rank] = T(is_far), any |= is_far;
  }
  p.centre = any ? rows.data() : nullptr;
}

template struct KeyCentres<float>;
template struct KeyCentres<double>;

}  // namespace sb::cpu

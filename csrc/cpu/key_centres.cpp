#include "key_centres.h"

#include "../math/low_rank_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace sb::cpu {
namespace {

// The mean of some keys' coordinates, weighted with exp(kappa) as in a state.
template <class T>
class WeightedMean {
 public:
  WeightedMean(const AttentionParams& p, int64_t b, int64_t kv) : p(p), b(b), kv(kv), sum(size_t(p.rank)) {}

  void add(int64_t key) {
    if (p.k_mask && p.k_mask[b * p.k_tokens + key]) return;
    const T kappa = *p.kappa.at<const T>(b, kv, key);
    if (kappa > top) {
      const T factor = std::exp2(top - kappa);
      for (T& s : sum) s *= factor;
      total *= factor, top = kappa;
    }
    const T weight = std::exp2(kappa - top);
    const T* y = p.y.at<const T>(b, kv, key);
    for (int64_t a = 0; a < p.rank; ++a) sum[size_t(a)] += weight * y[a];
    total += weight;
  }
  T at(int64_t a) const { return total > T(0) ? sum[size_t(a)] / total : T(0); }
  // The squared distance from a point, from 0 where it is null.
  T distance(const T* point) const {
    T square = T(0);
    for (int64_t a = 0; a < p.rank; ++a)
      square += (at(a) - (point ? point[a] : T(0))) * (at(a) - (point ? point[a] : T(0)));
    return square;
  }

 private:
  const AttentionParams& p;
  int64_t b, kv;
  std::vector<T> sum;
  T total = T(0), top = -std::numeric_limits<T>::infinity();
};

template <class T>
bool is_far(T square) {
  return square >= T(kCentreBound) && square < T(1e30);  // not of NaN
}

// Writes the mean as a centre if it is far from 0; returns whether it is.
template <class T>
bool write_centre(const AttentionParams& p, const WeightedMean<T>& mean, T* centre) {
  const bool is_centre = is_far(mean.distance(nullptr));
  for (int64_t a = 0; a < p.rank; ++a) centre[a] = is_centre ? mean.at(a) : T(0);
  centre[p.rank] = T(is_centre);
  return is_centre;
}

// Samples lie evenly over the row.
template <class T>
bool centre_of_row(const AttentionParams& p, int64_t b, int64_t kv, T* centre) {
  const RowRange& row = p.rows[b];
  const int64_t keys = row.k_end - row.k_first, n = std::min(keys, kCentreSamples);
  WeightedMean<T> mean(p, b, kv);
  for (int64_t i = 0; i < n; ++i) mean.add(row.k_first + i * keys / n);
  return write_centre(p, mean, centre);
}

// The centre of every slot, from keys before it: it stays where it was until their mean is far from there.
template <class T>
bool centres_of_slots(const AttentionParams& p, int64_t b, int64_t kv, T* centres) {
  const RowRange& row = p.rows[b];
  WeightedMean<T> mean(p, b, kv);
  bool any = false;
  for (int64_t slot = 1; slot < p.slots; ++slot) {
    T *centre = centres + slot * p.map_pad, *before = centre - p.map_pad;
    const int64_t begin = row.k_first + (slot - 1) * kChunk, end = std::min<int64_t>(begin + kChunk, row.k_end);
    for (int64_t j = begin; j < end; j += slot == 1 ? 1 : kCentreStep) mean.add(j);
    if (is_far(mean.distance(before)))
      any |= write_centre(p, mean, centre);
    else
      std::copy(before, before + p.map_pad, centre);
  }
  return any;
}

}  // namespace

template <class T>
void KeyCentres<T>::set(AttentionParams& p) {
  if (p.low_rank != LowRank::kQuadratic) return;
  p.centre_slots = p.is_causal ? p.slots : 1;
  rows.assign(size_t(p.batch * p.kv_heads * p.centre_slots * p.map_pad), T(0));
  bool any = false;
  for (int64_t head = 0; head < p.batch * p.kv_heads; ++head) {
    T* of_head = &rows[size_t(head * p.centre_slots * p.map_pad)];
    const int64_t b = head / p.kv_heads, kv = head % p.kv_heads;
    any |= p.is_causal ? centres_of_slots<T>(p, b, kv, of_head) : centre_of_row<T>(p, b, kv, of_head);
  }
  p.centre = any ? rows.data() : nullptr;
}

template struct KeyCentres<float>;
template struct KeyCentres<double>;

}  // namespace sb::cpu

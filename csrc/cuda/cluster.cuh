// Clusters of the keys of each key/value head (docs/algorithm.md, section 2): the mean query, and directions and
// centres from samples. Sums go over segments of kSegment tokens, counted from the row's first, and then over segments
// in order.
#pragma once
#include "../math/clustering.h"
#include "clusters_of_segment.cuh"

namespace sb::cuda {

inline constexpr int kClusterThreads = 256;
inline constexpr int kClusterWarps = kClusterThreads / kWarp;
inline constexpr int kCentreLength = kDirections + 1;  // a centre's coordinates, and minus half of its square
static_assert(kClusterThreads >= kSamples && kClusterThreads >= kWidest);

// What is kept of a head for its next stages.
template <class T>
struct ClusterHead {
  T *mean, *directions, *centres;  // (head_dim), (head_dim, kDirections), (clusters, kCentreLength)
  T* query_mean;                   // (head_dim), a result
  SB_DEVICE ClusterHead(const ClusteringParams& p, int64_t head)
      : mean(static_cast<T*>(p.mean) + head * p.head_dim),
        directions(static_cast<T*>(p.directions) + head * p.head_dim * kDirections),
        centres(static_cast<T*>(p.centres) + head * p.clusters * kCentreLength),
        query_mean(static_cast<T*>(p.query_mean) + head * p.head_dim) {}
};

// -------------------- queries

// Sums of the queries of a segment over all heads that share a key/value head, and how many they are: a thread per
// column.
template <class E>
SB_KERNEL cluster_queries(ClusteringParams p) {
  typedef AccType<E> T;
  for_each_task(p.batch * p.kv_heads * p.q_segments, [&](int64_t task) {
    const int64_t head = task / p.q_segments, b = head / p.kv_heads, group = p.q_heads / p.kv_heads,
                  first_head = head % p.kv_heads * group;
    const RowRange range = load(p.rows + b);
    const TokenSegment tokens(task % p.q_segments, kSegment, range.q_first, range.q_end,
                              p.q_mask ? p.q_mask + b * p.q_tokens : nullptr);
    for (int64_t e = thread_index(); e < p.head_dim; e += block_threads()) {
      T sum = T(0), chain = T(0);
      int32_t count = 0;
      for (int64_t h = first_head; h < first_head + group; ++h)
        for (int64_t i = tokens.begin; i < tokens.end; ++i) {
          if (!tokens.is_valid(i)) continue;
          chain += T(widened(load(p.q.at<const E>(b, h, i) + e)));
          if (++count % kChain == 0) sum += chain, chain = T(0);
        }
      store(static_cast<T*>(p.query_sums) + task * p.head_dim + e, sum + chain);
      if (e == 0) store(p.query_counts + task, count);
    }
  });
}

// -------------------- directions and centres

// The nearest centre of z, the lowest of equals: that of the largest z.centre - |centre|^2 / 2.
template <class T>
SB_DEVICE int32_t nearest_centre(const Shared<T>& centres, int64_t count, const T* z) {
  T best = -T(INFINITY);
  int32_t at = 0;
  for (int64_t c = 0; c < count; ++c) {
    T score = centres.get(c * kCentreLength + kDirections);
    for (int r = 0; r < kDirections; ++r) score += z[r] * centres.get(c * kCentreLength + r);
    if (score > best) best = score, at = int32_t(c);
  }
  return at;
}

// Shared memory of a head's centres. Orthonormal rows in double, the directions made from them and the centres follow
// each other in one place.
template <class T>
struct CentresMemory {
  static SB_HD int64_t place_bytes(const ClusteringParams& p) {
    const int64_t rows = kDirections * p.head_dim * int64_t(sizeof(double)),
                  centres = pad_to(p.clusters * kCentreLength, 2) * int64_t(sizeof(T));
    return rows > centres ? rows : centres;
  }
  static SB_HD int64_t bytes(const ClusteringParams& p) {
    return place_bytes(p) + 2 * kDirections * int64_t(sizeof(double)) +
           (kSamples * kDirections + pad_to(p.head_dim, 2)) * int64_t(sizeof(T)) +
           2 * kSamples * int64_t(sizeof(int32_t));
  }
  Shared<double> rows, square,
      unit;                         // (kDirections, head_dim), and of each its square at first and what makes it 1 long
  Shared<T> directions, centres;    // as in ClusterHead
  Shared<T> z, mean;                // (kSamples, kDirections): coordinates of samples; their mean (head_dim)
  Shared<int32_t> sample, nearest;  // keys; centres
  SB_DEVICE explicit CentresMemory(const ClusteringParams& p)
      : rows(shared_array<double>(0)), directions(shared_array<T>(0)), centres(shared_array<T>(0)) {
    int64_t at = place_bytes(p);
    square = shared_array<double>(at), at += kDirections * int64_t(sizeof(double));
    unit = shared_array<double>(at), at += kDirections * int64_t(sizeof(double));
    z = shared_array<T>(at), at += kSamples * kDirections * int64_t(sizeof(T));
    mean = shared_array<T>(at), at += pad_to(p.head_dim, 2) * int64_t(sizeof(T));
    sample = shared_array<int32_t>(at), at += kSamples * int64_t(sizeof(int32_t));
    nearest = shared_array<int32_t>(at);
  }
};

// A block per head.
template <class E>
class CentresOfHead {
  typedef AccType<E> T;

 public:
  SB_DEVICE CentresOfHead(const ClusteringParams& p, const CentresMemory<T>& memory, int64_t head)
      : p(p), memory(memory), kept(p, head), head(head), b(head / p.kv_heads), kv(head % p.kv_heads), d(p.head_dim) {}

  SB_DEVICE void run() {
    write_query_mean();
    if (!take_samples()) return;
    find_directions();
    find_centres();
  }

 private:
  SB_DEVICE void write_query_mean() {
    if (thread >= d) return;
    T sum = T(0);
    int64_t count = 0;
    for (int64_t s = head * p.q_segments; s < (head + 1) * p.q_segments; ++s) {
      sum += load(static_cast<const T*>(p.query_sums) + s * d + thread);
      count += load(p.query_counts + s);
    }
    store(kept.query_mean + thread, count > 0 ? sum * T(p.scale / double(count)) : T(0));
  }

  // Sample t is the valid key at position t of n spread over all of them; and the samples' mean. False where the row
  // has none.
  SB_DEVICE bool take_samples() {
    const int32_t* before = p.valid_before + b * p.k_slots;
    const int64_t valid = load(before + p.k_slots - 1);
    n = valid < kSamples ? valid : kSamples;
    if (n == 0) return false;
    if (thread < n) {
      const int64_t wanted = spread_position(thread, n, valid);
      int64_t low = 0, high = p.k_slots - 1;  // its segment
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (load(before + middle) <= wanted ? low : high) = middle;
      }
      const TokenSegment keys(low, kSegment, load(p.rows + b).k_first, p.k_tokens,
                              p.k_mask ? p.k_mask + b * p.k_tokens : nullptr);
      int64_t j = keys.begin;
      for (int64_t left = wanted - load(before + low);; ++j)
        if (keys.is_valid(j) && left-- == 0) break;
      memory.sample.set(thread, int32_t(j));
    }
    sync_block();
    if (thread < d) {
      T sum = T(0), chain = T(0);
      for (int64_t i = 0; i < n; ++i) {
        chain += key(i, thread);
        if (i % kChain == kChain - 1) sum += chain, chain = T(0);
      }
      const T mean = (sum + chain) / T(n);
      memory.mean.set(thread, mean), store(kept.mean + thread, mean);
    }
    sync_block();
    return true;
  }
  SB_DEVICE T key(int64_t sample, int64_t e) const {
    return T(widened(load(p.k.at<const E>(b, kv, memory.sample.get(sample)) + e)));
  }
  SB_DEVICE T centred(int64_t sample, int64_t e) const { return key(sample, e) - memory.mean.get(e); }

  // -------------------- directions

  // Some of the centred samples X, then two steps of subspace iteration, W <- orthonormalise(X^T (X W)).
  SB_DEVICE void find_directions() {
    const int64_t count = d < kDirections ? d : kDirections;
    for (int64_t x = thread; x < kDirections * d; x += kClusterThreads)
      memory.rows.set(x, x / d < count ? double(centred(spread_position(x / d, count, n), x % d)) : 0.0);
    take_directions();
    for (int step = 0; step < 2; ++step) {
      set_coordinates();
      for (int64_t x = thread; x < kDirections * d; x += kClusterThreads) {
        T sum = T(0), chain = T(0);
        for (int64_t i = 0; i < n; ++i) {
          chain += memory.z.get(i * kDirections + x / d) * centred(i, x % d);
          if (i % kChain == kChain - 1) sum += chain, chain = T(0);
        }
        memory.rows.set(x, double(sum + chain));
      }
      take_directions();
    }
    for (int64_t x = thread; x < kDirections * d; x += kClusterThreads)
      store(kept.directions + x, memory.directions.get(x));
  }

  // z = W (k - mean) of the samples.
  SB_DEVICE void set_coordinates() {
    for (int64_t x = thread; x < n * kDirections; x += kClusterThreads) {
      const int64_t i = x / kDirections, r = x % kDirections;
      T sum = T(0);
      for (int64_t e = 0; e < d; ++e) sum += centred(i, e) * memory.directions.get(e * kDirections + r);
      memory.z.set(x, sum);
    }
    sync_block();
  }

  // Directions from rows, in their place.
  SB_DEVICE void take_directions() {
    sync_block();
    orthonormalise();
    T column[kDirections];
    for (int r = 0; r < kDirections; ++r)
      column[r] = thread < d && memory.unit.get(r) != 0  // a row that vanished may hold infinities
                      ? T(memory.rows.get(r * d + thread) * memory.unit.get(r))
                      : T(0);
    sync_block();
    for (int r = 0; r < kDirections && thread < d; ++r) memory.directions.set(thread * kDirections + r, column[r]);
    sync_block();
  }

  // Orthogonal rows: Gram-Schmidt, where a finished row is taken off all later ones, a warp per later row. Rows that
  // depend on earlier ones become zero, by their unit.
  SB_DEVICE void orthonormalise() {
    const int warp = warp_index();
    for (int t = warp; t < kDirections; t += kClusterWarps) {
      const double square = dot(t, t);
      if (lane_index() == 0) memory.square.set(t, square);
    }
    for (int t = 0; t < kDirections; ++t) {
      sync_block();
      const double rest = dot(t, t);
      const bool vanishes = !(rest > kVanishing * kVanishing * memory.square.get(t));
      if (thread == 0) memory.unit.set(t, vanishes ? 0.0 : 1.0 / square_root(rest));
      for (int later = t + 1 + warp; later < kDirections; later += kClusterWarps) {
        const double factor = vanishes ? 0.0 : dot(t, later) / rest;
        if (factor == 0.0) continue;
        for (int64_t e = lane_index(); e < d; e += kWarp)
          memory.rows.set(later * d + e, memory.rows.get(later * d + e) - factor * memory.rows.get(t * d + e));
      }
    }
    sync_block();
  }
  SB_DEVICE double dot(int64_t a, int64_t b) const {
    double sum = 0;
    for (int64_t e = lane_index(); e < d; e += kWarp) sum += memory.rows.get(a * d + e) * memory.rows.get(b * d + e);
    return warp_sum(sum);
  }

  // -------------------- centres

  // Some of the samples, then one step of Lloyd's algorithm on all of them. A centre that is nearest to none stays.
  SB_DEVICE void find_centres() {
    set_coordinates();
    for (int64_t x = thread; x < p.clusters * kDirections; x += kClusterThreads) {
      const int64_t c = x / kDirections, r = x % kDirections;
      memory.centres.set(c * kCentreLength + r, memory.z.get(spread_position(c, p.clusters, n) * kDirections + r));
    }
    sync_block();
    set_squares();
    if (thread < n) {
      T z[kDirections];
      for (int r = 0; r < kDirections; ++r) z[r] = memory.z.get(thread * kDirections + r);
      memory.nearest.set(thread, nearest_centre(memory.centres, p.clusters, z));
    }
    sync_block();
    for (int64_t x = thread; x < p.clusters * kDirections; x += kClusterThreads) {
      const int64_t c = x / kDirections, r = x % kDirections;
      T sum = T(0);
      int members = 0;
      for (int64_t i = 0; i < n; ++i)
        if (memory.nearest.get(i) == c) sum += memory.z.get(i * kDirections + r), ++members;
      if (members > 0) memory.centres.set(c * kCentreLength + r, sum / T(members));
    }
    sync_block();
    set_squares();
    for (int64_t x = thread; x < p.clusters * kCentreLength; x += kClusterThreads)
      store(kept.centres + x, memory.centres.get(x));
  }
  SB_DEVICE void set_squares() {
    if (thread < p.clusters) {
      T square = T(0);
      for (int r = 0; r < kDirections; ++r) {
        const T x = memory.centres.get(thread * kCentreLength + r);
        square += x * x;
      }
      memory.centres.set(thread * kCentreLength + kDirections, square * T(-0.5));
    }
    sync_block();
  }

  const ClusteringParams& p;
  const CentresMemory<T>& memory;
  const ClusterHead<T> kept;
  const int64_t head, b, kv, d;
  const int thread = thread_index();
  int64_t n = 0;  // samples
};

template <class E>
SB_KERNEL cluster_centres(ClusteringParams p) {
  const CentresMemory<AccType<E>> memory(p);
  for_each_task(p.batch * p.kv_heads, [&](int64_t head) {
    CentresOfHead<E>(p, memory, head).run();
    sync_block();
  });
}

}  // namespace sb::cuda

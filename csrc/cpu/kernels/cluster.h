// Clusters of the keys of one key/value head: directions and centres from samples, the nearest centre of every key, and
// one representative key per cluster (docs/algorithm.md, section 2). Sums go over segments of kSegment tokens, counted
// from the row's first valid one, and then over segments in order: threads and padding change no bit.
#pragma once
#include "../../math/clustering.h"
#include "arena.h"
#include "gathered_rows.h"
#include "transpose.h"

namespace sb::SB_ISA {

constexpr int kClusterLanes = 32;               // keys whose nearest centre is found together
constexpr int kCentreRows = 16;                 // centres that they are compared with together
constexpr int kCentreLength = kDirections + 1;  // elements of a centre: coordinates, and minus half of its square

// What the stages of one head hand on.
template <class T>
struct ClusterHead {
  T *query_sums, *query_mean;  // (query segments, head_pad); a (head_pad)
  T *directions, *offset;      // W (head_dim, kDirections), a direction per column; -W times the samples' mean
  T* centres;  // (centre_rows / kCentreRows, kCentreLength, kCentreRows): columns of a centre and minus half of its
               // square
  T *sums, *top, *mass;  // of segments of keys: (segments, clusters, head_pad), (segments, clusters) twice
  T* dots;               // a.b (clusters)
  int64_t segments, centre_rows, bytes;

  SB_INLINE ClusterHead(const ClusterParams& p, void* memory)
      : segments(ceil_div(p.k_tokens, kSegment)), centre_rows(pad_to(p.clusters, kCentreRows)) {
    Arena arena{static_cast<char*>(memory), 0};
    query_sums = arena.take<T>(ceil_div(p.q_tokens, kSegment) * p.head_pad), query_mean = arena.take<T>(p.head_pad);
    directions = arena.take<T>(p.head_pad * kDirections), offset = arena.take<T>(kDirections);
    centres = arena.take<T>(centre_rows * kCentreLength);
    sums = arena.take<T>(segments * p.clusters * p.head_pad);
    top = arena.take<T>(segments * p.clusters), mass = arena.take<T>(segments * p.clusters);
    dots = arena.take<T>(p.clusters);
    bytes = arena.used;
  }
};
template <class T>
int64_t cluster_head_bytes(const ClusterParams& p) {
  return ClusterHead<T>(p, nullptr).bytes;
}

// Tokens [first, end) of segment `segment` of [row_first, row_end).
struct ClusterSegment {
  int64_t first, end;
  SB_INLINE ClusterSegment(int64_t segment, int64_t row_first, int64_t row_end)
      : first(row_first + segment * kSegment), end(first + kSegment < row_end ? first + kSegment : row_end) {}
};

// sum += rows, a few at a time: chains are short, so they round little.
template <class T>
SB_INLINE void add_few_rows(int64_t n, const T* const* rows, int64_t columns, T* part, T* sum) {
  constexpr int N = kWidth<T>;
  T ones[kClusterLanes];
  for (int i = 0; i < kClusterLanes; ++i) ones[i] = T(1);
  combine_rows<T>(n, ones, PointedRows<const T>{rows}, columns, part);
  for (int64_t e = 0; e < columns; e += N) store<T, N>(sum + e, load<T, N>(sum + e) + load<T, N>(part + e));
}

// -------------------- queries

// The sum of the valid queries of a segment, over all heads that share key/value head kv. Scratch: a row.
template <class T>
int64_t cluster_queries(const ClusterParams& p, int64_t b, int64_t kv, int64_t segment, void* memory, void* scratch) {
  if (!scratch) return p.head_pad * int64_t(sizeof(T));
  const ClusterSegment tokens(segment, p.rows[b].q_first, p.rows[b].q_end);
  const int64_t group = p.q_heads / p.kv_heads;
  T *part = static_cast<T*>(scratch), *sum = ClusterHead<T>(p, memory).query_sums + segment * p.head_pad;
  for (int64_t e = 0; e < p.head_pad; ++e) sum[e] = T(0);
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    const T* rows[kClusterLanes];
    int64_t n = 0;
    for (int64_t i = tokens.first; i < tokens.end; ++i) {
      if (p.q_mask && p.q_mask[b * p.q_tokens + i]) continue;
      rows[n++] = p.q.at<const T>(b, h, i);
      if (n < kClusterLanes) continue;
      add_few_rows(n, rows, p.head_pad, part, sum);
      n = 0;
    }
    if (n > 0) add_few_rows(n, rows, p.head_pad, part, sum);
  }
  return 0;
}

// -------------------- directions and centres

// Sixteen rows, next to each other for every k.
template <class T>
struct SixteenRows {  // A(row, k) = p[16 k + row]
  const T* p;
  SB_INLINE T operator()(int64_t row, int64_t k) const { return p[16 * k + row]; }
};
static_assert(kDirections == 16 && kCentreRows == 16);

// Orthonormal rows in place of w (kDirections, width): Gram-Schmidt, where a finished row is taken off all later ones.
// Rows that depend on earlier ones become zero.
inline void orthonormalise(int64_t width, double* w) {
  constexpr int N = kWidth<double>;
  double square[kDirections], dots[kDirections];
  for (int64_t t = 0; t < kDirections; ++t)
    dot_rows<double>(1, DenseRows<const double>{w + t * width, width}, w + t * width, width, square + t);
  for (int64_t t = 0; t < kDirections; ++t) {
    double* const row = w + t * width;
    dot_rows<double>(kDirections - t, DenseRows<const double>{row, width}, row, width, dots);
    const double rest = dots[0];
    const bool vanishes = !(rest > kVanishing * kVanishing * square[t]);
    for (int64_t later = t + 1; later < kDirections && !vanishes; ++later) {
      const double factor = dots[later - t] / rest;
      double* other = w + later * width;
      for (int64_t e = 0; e < width; e += N)
        store<double, N>(other + e, load<double, N>(other + e) - factor * load<double, N>(row + e));
    }
    const double unit = vanishes ? 0 : 1 / __builtin_sqrt(rest);
    for (int64_t e = 0; e < width; ++e) row[e] = vanishes ? 0 : row[e] * unit;
  }
}

// z (kClusterLanes, kDirections) of as many keys: W (k - mean).
template <class T>
void centred_coordinates(const ClusterParams& p, const ClusterHead<T>& head, const T* const* keys, T* z) {
  constexpr int N = kWidth<T>;
  for (int i = 0; i < kClusterLanes * kDirections; i += N)
    store<T, N>(z + i, load<T, N>(head.offset + i % kDirections));
  gemm<T, N, true>(kClusterLanes, kDirections, p.head_dim, AcrossSteps<T, PointedRows<const T>>{{keys}},
                   DenseRows<const T>{head.directions, kDirections}, DenseRows<T>{z, kDirections});
}

// nearest[lane]: the centre of the largest z.centre - |centre|^2 / 2, the lowest of equals.
template <class T>
void nearest_centres(const ClusterHead<T>& head, const T* z, int32_t* nearest) {
  constexpr int N = kWidth<T>, NV = kClusterLanes / N;
  typedef decltype(Vector<T, N>{} < Vector<T, N>{}) I;
  alignas(64) T lanes[kCentreLength * kClusterLanes], score[kCentreRows * kClusterLanes];
  alignas(64) T best[kClusterLanes], at[kClusterLanes];  // `at` holds the bits of integers
  const T* rows[kClusterLanes];
  for (int i = 0; i < kClusterLanes; ++i) rows[i] = z + i * kDirections;
  transpose_rows<T, kClusterLanes>(rows, kDirections, T(1), lanes);
  for (int i = 0; i < kClusterLanes; i += N) store<T, N>(lanes + kDirections * kClusterLanes + i, splat<T, N>(T(1)));
  SB_EACH (v, NV) store<T, N>(best + v * N, splat<T, N>(-T(__builtin_inf()))), store<T, N>(at + v * N, Vector<T, N>{});
  for (int64_t first = 0; first < head.centre_rows; first += kCentreRows) {
    const T* centres = head.centres + first * kCentreLength;
    gemm<T, N, false>(kCentreRows, kClusterLanes, kCentreLength, SixteenRows<T>{centres},
                      DenseRows<const T>{lanes, kClusterLanes}, DenseRows<T>{score, kClusterLanes});
    for (int lane = 0; lane < kClusterLanes; lane += N) {
      auto top = load<T, N>(best + lane);
      I of_top = (I)load<T, N>(at + lane), centre = I{} + int32_t(first);
      SB_EACH (c, kCentreRows) {
        const auto s = load<T, N>(score + c * kClusterLanes + lane);
        const I better = s > top;
        top = better ? s : top, of_top = better ? centre : of_top;
        centre += 1;
      }
      store<T, N>(best + lane, top), store<T, N>(at + lane, (Vector<T, N>)of_top);
    }
  }
  for (int lane = 0; lane < kClusterLanes; lane += N) {
    const I of_top = (I)load<T, N>(at + lane);
    SB_EACH (i, N) nearest[lane + i] = int32_t(of_top[i]);
  }
}

// Puts centres, given as rows (clusters, kDirections), into the form in which keys are compared with them.
template <class T>
SB_INLINE void place_centres(const ClusterParams& p, const T* rows, const ClusterHead<T>& head) {
  constexpr int N = kLaneWidth<T, kCentreRows>;
  alignas(64) static const T none[kDirections] = {};
  for (int64_t first = 0; first < head.centre_rows; first += kCentreRows) {
    const T* of_lane[kCentreRows];
    for (int64_t i = 0; i < kCentreRows; ++i)
      of_lane[i] = first + i < p.clusters ? rows + (first + i) * kDirections : none;
    T* to = head.centres + first * kCentreLength;
    transpose_rows<T, kCentreRows>(of_lane, kDirections, T(1), to);
    for (int lane = 0; lane < kCentreRows; lane += N) {
      Vector<T, N> square{};
      for (int r = 0; r < kDirections; ++r) {
        const auto x = load<T, N>(to + r * kCentreRows + lane);
        square += x * x;
      }
      store<T, N>(to + kDirections * kCentreRows + lane, square * T(-0.5));
    }
    for (int64_t i = p.clusters - first > 0 ? p.clusters - first : 0; i < kCentreRows; ++i)
      to[kDirections * kCentreRows + i] = -T(__builtin_inf());  // never the nearest, also where all scores overflow
  }
}

template <class T>
struct CentresScratch {
  double *w, *wide;  // (kDirections, head_pad): W; (head_pad)
  T *centred, *z;    // (kSamples, head_pad), (kSamples, kDirections): samples minus their mean, and W times these
  T *centre, *moved, *next;  // (kSamples, kDirections) twice, (kDirections, head_pad)
  T *mean, *part;            // (head_pad) each
  int64_t bytes;
  SB_INLINE CentresScratch(const ClusterParams& p, void* memory) {
    Arena arena{static_cast<char*>(memory), 0};
    w = arena.take<double>(kDirections * p.head_pad), wide = arena.take<double>(p.head_pad);
    centred = arena.take<T>(kSamples * p.head_pad), z = arena.take<T>(kSamples * kDirections);
    centre = arena.take<T>(kSamples * kDirections), moved = arena.take<T>(kSamples * kDirections);
    next = arena.take<T>(kDirections * p.head_pad);
    mean = arena.take<T>(p.head_pad), part = arena.take<T>(p.head_pad);
    bytes = arena.used;
  }
};

template <class To, class From>
SB_INLINE void convert_numbers(int64_t n, const From* __restrict from, To* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = To(from[i]);
}

// W of n samples, whose centred rows are in the scratch, into the head: some of the rows, then two steps of subspace
// iteration, W <- orthonormalise(X^T (X W)).
template <class T>
SB_INLINE void find_directions(const ClusterParams& p, int64_t n, CentresScratch<T>& s, ClusterHead<T>& head) {
  constexpr int N = kWidth<T>;
  const int64_t d = p.head_dim, width = p.head_pad, count = d < kDirections ? d : kDirections;
  for (int64_t t = 0; t < kDirections; ++t)
    for (int64_t e = 0; e < width; ++e)
      s.w[t * width + e] = t < count ? double(s.centred[spread_position(t, count, n) * width + e]) : 0.0;
  const auto take_directions = [&] {
    orthonormalise(width, s.w);
    convert_numbers(kDirections * width, s.w, s.next);
    const T* rows[kDirections];
    for (int64_t t = 0; t < kDirections; ++t) rows[t] = s.next + t * width;
    transpose_rows<T, kDirections>(rows, d, T(1), head.directions);
  };
  take_directions();
  for (int step = 0; step < 2; ++step) {
    for (int64_t i = 0; i < kDirections * width; i += N) store<T, N>(s.next + i, Vector<T, N>{});
    for (int64_t first = 0; first < n; first += kClusterLanes) {
      alignas(64) T y[kClusterLanes * kDirections];
      const T* rows = s.centred + first * width;
      gemm<T, N, false>(kClusterLanes, kDirections, d, Strided<T>{rows, width, 1},
                        DenseRows<const T>{head.directions, kDirections}, DenseRows<T>{y, kDirections});
      gemm<T, N, true>(kDirections, width, kClusterLanes, SixteenRows<T>{y}, DenseRows<const T>{rows, width},
                       DenseRows<T>{s.next, width});
    }
    convert_numbers(kDirections * width, s.next, s.w);
    take_directions();
  }
  double dots[kDirections];
  convert_numbers(width, s.mean, s.wide);
  dot_rows<double>(kDirections, DenseRows<const double>{s.w, width}, s.wide, width, dots);
  for (int64_t t = 0; t < kDirections; ++t) head.offset[t] = T(-dots[t]);
}

// The mean query, the directions and the centres of one head, from the sums of the queries and the samples.
template <class T>
int64_t cluster_centres(const ClusterParams& p, int64_t b, int64_t kv, void* memory, void* scratch,
                        const void* zero_row) {
  CentresScratch<T> w(p, scratch);
  if (!scratch) return w.bytes;
  constexpr int N = kWidth<T>;
  ClusterHead<T> head(p, memory);

  // 1. a.
  const RowRange& range = p.rows[b];
  const int64_t queries = p.valid_queries[b] * (p.q_heads / p.kv_heads);
  const T factor = queries > 0 ? T(p.scale / double(queries)) : T(0);
  T* a = head.query_mean;
  for (int64_t e = 0; e < p.head_pad; ++e) a[e] = T(0);
  for (int64_t first = range.q_first, s = 0; first < range.q_end; first += kSegment, ++s)
    for (int64_t e = 0; e < p.head_pad; ++e) a[e] += head.query_sums[s * p.head_pad + e];
  for (int64_t e = 0; e < p.head_pad; ++e) a[e] *= factor;
  T* given = static_cast<T*>(p.query_mean) + (b * p.kv_heads + kv) * p.head_dim;
  for (int64_t e = 0; e < p.head_dim; ++e) given[e] = a[e];

  // 2. Samples, their mean and W.
  const int64_t n = p.sampled[b];
  if (n == 0) return 0;
  const int32_t* sample = p.samples + b * kSamples;
  const auto rows_from = [&](int64_t first, const T** rows) {  // and zeros past the last one
    for (int64_t i = 0; i < kClusterLanes; ++i)
      rows[i] = first + i < n ? p.k.at<const T>(b, kv, sample[first + i]) : static_cast<const T*>(zero_row);
    return n - first < kClusterLanes ? n - first : kClusterLanes;
  };
  const T* rows[kClusterLanes];
  for (int64_t e = 0; e < p.head_pad; ++e) w.mean[e] = T(0);
  for (int64_t first = 0; first < n; first += kClusterLanes)
    add_few_rows(rows_from(first, rows), rows, p.head_pad, w.part, w.mean);
  for (int64_t e = 0; e < p.head_pad; ++e) w.mean[e] /= T(n);
  for (int64_t first = 0; first < n; first += kClusterLanes) {
    const int64_t count = rows_from(first, rows);
    T* centred = w.centred + first * p.head_pad;
    for (int64_t i = 0; i < kClusterLanes; ++i)
      for (int64_t e = 0; e < p.head_pad; e += N)
        store<T, N>(centred + i * p.head_pad + e,
                    i < count ? load<T, N>(rows[i] + e) - load<T, N>(w.mean + e) : Vector<T, N>{});
  }
  find_directions(p, n, w, head);

  // 3. Centres, and one step of Lloyd's algorithm on the samples.
  for (int64_t first = 0; first < n; first += kClusterLanes) {
    rows_from(first, rows);
    centred_coordinates(p, head, rows, w.z + first * kDirections);
  }
  const auto row_of = [](T* rows, int64_t i) { return rows + i * kDirections; };
  for (int64_t c = 0; c < p.clusters; ++c)
    for (int r = 0; r < kDirections; r += N)
      store<T, N>(row_of(w.centre, c) + r, load<T, N>(row_of(w.z, spread_position(c, p.clusters, n)) + r));
  place_centres(p, w.centre, head);
  int32_t nearest[kSamples], members[kSamples]{};
  for (int64_t first = 0; first < n; first += kClusterLanes)
    nearest_centres(head, w.z + first * kDirections, nearest + first);
  for (int64_t i = 0; i < p.clusters * kDirections; i += N) store<T, N>(w.moved + i, Vector<T, N>{});
  for (int64_t i = 0; i < n; ++i) {
    ++members[nearest[i]];
    T* sum = row_of(w.moved, nearest[i]);
    for (int r = 0; r < kDirections; r += N) store<T, N>(sum + r, load<T, N>(sum + r) + load<T, N>(row_of(w.z, i) + r));
  }
  for (int64_t c = 0; c < p.clusters; ++c)
    for (int r = 0; r < kDirections && members[c] > 0; r += N)
      store<T, N>(row_of(w.centre, c) + r, load<T, N>(row_of(w.moved, c) + r) / T(members[c]));
  place_centres(p, w.centre, head);
  return 0;
}

// -------------------- keys

// The cluster and a.k of the keys of a segment, and of every cluster the largest a.k there and the weighted sum of its
// keys, relative to it.
template <class T>
void cluster_keys(const ClusterParams& p, int64_t b, int64_t kv, int64_t segment, void* memory, const void* zero_row) {
  constexpr int N = kWidth<T>;
  const ClusterSegment range(segment, p.rows[b].k_first, p.rows[b].k_end);
  const ClusterHead<T> head(p, memory);
  const uint8_t* ignored = p.k_mask ? p.k_mask + b * p.k_tokens : nullptr;
  const int64_t of_head = (b * p.kv_heads + kv) * p.k_tokens;
  int32_t* index = p.index + of_head;
  T* log = static_cast<T*>(p.log_mass) + of_head;
  T *sums = head.sums + segment * p.clusters * p.head_pad, *top = head.top + segment * p.clusters,
    *mass = head.mass + segment * p.clusters;
  for (int64_t i = 0; i < p.clusters * p.head_pad; i += N) store<T, N>(sums + i, Vector<T, N>{});
  for (int64_t c = 0; c < p.clusters; ++c) top[c] = -T(__builtin_inf()), mass[c] = T(0);

  // 1. Clusters and logs.
  const auto is_valid = [&](int64_t j) { return j < range.end && !(ignored && ignored[j]); };
  for (int64_t first = range.first; first < range.end; first += kClusterLanes) {
    const T* rows[kClusterLanes];
    int32_t nearest[kClusterLanes];
    alignas(64) T z[kClusterLanes * kDirections], dots[kClusterLanes];
    for (int64_t i = 0; i < kClusterLanes; ++i)
      rows[i] = is_valid(first + i) ? p.k.at<const T>(b, kv, first + i) : static_cast<const T*>(zero_row);
    centred_coordinates(p, head, rows, z);
    nearest_centres(head, z, nearest);
    dot_rows<T>(kClusterLanes, PointedRows<const T>{rows}, head.query_mean, p.head_pad, dots);
    for (int64_t i = 0; i < kClusterLanes && first + i < range.end; ++i) {
      const int64_t j = first + i;
      if (!is_valid(j)) continue;
      const int32_t c = nearest[i];
      index[j] = c, log[j] = dots[i];
      top[c] = dots[i] > top[c] ? dots[i] : top[c];
    }
  }

  // 2. Weighted sums.
  for (int64_t first = range.first; first < range.end; first += kClusterLanes) {
    T weight[kClusterLanes];
    for (int64_t i = 0; i < kClusterLanes; ++i)
      weight[i] = is_valid(first + i) ? (log[first + i] - top[index[first + i]]) * T(kLog2e) : T(0);
    for (int i = 0; i < kClusterLanes; i += N) store<T, N>(weight + i, exp2v<N>(load<T, N>(weight + i)));
    for (int64_t i = 0; i < kClusterLanes; ++i) {
      if (!is_valid(first + i)) continue;
      const T *row = p.k.at<const T>(b, kv, first + i), w = weight[i];
      const int32_t c = index[first + i];
      T* sum = sums + c * p.head_pad;
      mass[c] += w;
      for (int64_t e = 0; e < p.head_pad; e += N) store<T, N>(sum + e, load<T, N>(sum + e) + w * load<T, N>(row + e));
    }
  }
}

// The representatives, from the sums of the segments.
template <class T>
void cluster_representatives(const ClusterParams& p, int64_t b, int64_t kv, void* memory) {
  constexpr int N = kWidth<T>;
  const ClusterHead<T> head(p, memory);
  const RowRange& range = p.rows[b];
  const int64_t segments = ceil_div(int64_t(range.k_end) - range.k_first, kSegment);
  T* given = static_cast<T*>(p.representatives) + (b * p.kv_heads + kv) * p.clusters * p.head_dim;
  for (int64_t c = 0; c < p.clusters; ++c, given += p.head_dim) {
    T top = -T(__builtin_inf()), total = T(0);
    for (int64_t s = 0; s < segments; ++s)
      top = head.top[s * p.clusters + c] > top ? head.top[s * p.clusters + c] : top;
    T* sum = head.sums + c * p.head_pad;  // of all segments, in place of the first
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t at = s * p.clusters + c;
      const T* from = head.sums + at * p.head_pad;
      const T share = head.mass[at] == T(0) ? T(0) : exp2s<T>((head.top[at] - top) * T(kLog2e));
      total += share * head.mass[at];
      for (int64_t e = 0; e < p.head_pad; e += N) {
        const auto part = share * load<T, N>(from + e);
        store<T, N>(sum + e, s == 0 ? part : load<T, N>(sum + e) + part);
      }
    }
    T dot = T(0);
    for (int64_t e = 0; e < p.head_dim; ++e) {
      given[e] = total == T(0) ? T(0) : sum[e] / total;
      dot += head.query_mean[e] * given[e];
    }
    head.dots[c] = dot;
  }
}

// kappa = a.k - a.b of the keys of a segment.
template <class T>
void cluster_logs(const ClusterParams& p, int64_t b, int64_t kv, int64_t segment, void* memory) {
  const ClusterSegment range(segment, p.rows[b].k_first, p.rows[b].k_end);
  const T* dots = ClusterHead<T>(p, memory).dots;
  const int64_t of_head = (b * p.kv_heads + kv) * p.k_tokens;
  const int32_t* index = p.index + of_head;
  T* log = static_cast<T*>(p.log_mass) + of_head;
  for (int64_t j = range.first; j < range.end; ++j)
    if (index[j] >= 0) log[j] -= dots[index[j]];
}

}  // namespace sb::SB_ISA

// The nearest centres of keys, and their a.k. Both are of a key minus the samples' mean, so that a vector which all
// keys share costs no digits. On tensor cores a warp takes 32 keys at a time; directions and centres, and what they
// meet, are sums of three parts of bfloat16, which hold all digits of a float32. In float64 a thread takes a key.
#pragma once
#include "cluster.cuh"
#include "matrix.h"

namespace sb::cuda {

// What is kept of a head, in shared memory, in float64.
class NearestByThreads {
  typedef double T;

 public:
  static SB_HD int64_t bytes(const ClusteringParams& p) {
    return (p.head_dim * (kDirections + 2) + p.clusters * kCentreLength) * int64_t(sizeof(T));
  }
  SB_DEVICE explicit NearestByThreads(const ClusteringParams& p)
      : p(p),
        directions(shared_array<T>(0)),
        centres(shared_array<T>(p.head_dim * kDirections * int64_t(sizeof(T)))),
        mean(shared_array<T>((p.head_dim * kDirections + p.clusters * kCentreLength) * int64_t(sizeof(T)))),
        query_mean(
            shared_array<T>((p.head_dim * (kDirections + 1) + p.clusters * kCentreLength) * int64_t(sizeof(T)))) {}

  // By all threads of a block; before they read it there is a barrier.
  SB_DEVICE void take(int64_t head) const {
    const ClusterHead<T> kept(p, head);
    const auto copy = [&](int64_t count, const T* from, const Shared<T>& to) {
      for (int64_t x = thread_index(); x < count; x += kClusterThreads) to.set(x, load(from + x));
    };
    copy(p.head_dim * kDirections, kept.directions, directions), copy(p.head_dim, kept.mean, mean);
    copy(p.clusters * kCentreLength, kept.centres, centres), copy(p.head_dim, kept.query_mean, query_mean);
  }

  // key(i): of `count` keys, or null for one that is ignored. Calls found(i, centre, a.k) for the others.
  template <class E, class Key, class Found>
  SB_DEVICE void find(int64_t count, const Key& key, const Found& found) const {
    for (int64_t i = thread_index(); i < count; i += kClusterThreads) {
      const E* of = key(i);
      if (!of) continue;
      T z[kDirections], dot = T(0);
      for (int r = 0; r < kDirections; ++r) z[r] = T(0);
      for (int64_t e = 0; e < p.head_dim; ++e) {
        const T centred = T(widened(load(of + e))) - mean.get(e);
        dot += centred * query_mean.get(e);
        for (int r = 0; r < kDirections; ++r) z[r] += centred * directions.get(e * kDirections + r);
      }
      found(i, nearest_centre(centres, p.clusters, z), dot);
    }
  }

 private:
  const ClusteringParams& p;
  const Shared<T> directions, centres, mean, query_mean;  // as in ClusterHead
};

// The same in float32, and as operands of products. Columns 2t, 2t + 1, 2t + 8 and 2t + 9 of the keys in two products
// are four neighbours of a key each: a lane reads eight at once.
class NearestByTiles {
  static constexpr int kParts = 3, kTiles = 2, kDepth = 32;
  static constexpr int64_t kWordsOfLanes = kWarp * kCopyBytes;
  static_assert(kDirections == 16, "directions are the depth of one product and the columns of two");

 public:
  static SB_HD int64_t bytes(const ClusteringParams& p) {
    return at_centres(p) + ceil_div(p.clusters, 16) * (kParts * kWordsOfLanes + 16 * int64_t(sizeof(float)));
  }
  SB_DEVICE explicit NearestByTiles(const ClusteringParams& p)
      : p(p),
        units(int(ceil_div(p.head_dim, kDepth))),
        pairs(int(ceil_div(p.clusters, 16))),
        g(lane_index() / 4),
        t(lane_index() % 4),
        directions(shared_array<FourWords>(0)),
        mean(shared_array<FourWords>(at_mean(p))),
        query_mean(shared_array<FourWords>(at_mean(p) + units * kDepth * int64_t(sizeof(float)))),
        centres(shared_array<FourWords>(at_centres(p))),
        squares(shared_array<float>(at_centres(p) + pairs * kParts * kWordsOfLanes)) {}

  SB_DEVICE void take(int64_t head) const {
    const ClusterHead<float> kept(p, head);
    const auto direction = [&](int64_t e, int64_t r) {
      return e < p.head_dim ? load(kept.directions + e * kDirections + r) : 0.0f;
    };
    const auto centre = [&](int64_t c, int64_t r) {
      return c < p.clusters ? load(kept.centres + c * kCentreLength + r) : 0.0f;
    };
    const auto write = [&](const Shared<FourWords>& to, int64_t at, const auto& entry) {  // entry(i): pairs
      uint32_t parts[4][kParts];
      for (int i = 0; i < 4; ++i) entry(i, parts[i]);
      for (int k = 0; k < kParts; ++k)
        to.set((at * kParts + k) * kWarp + lane_index(),
               FourWords{{parts[0][k], parts[1][k], parts[2][k], parts[3][k]}});
    };
    for (int64_t step = warp_index(); step < 2 * units; step += kClusterWarps)
      write(directions, step, [&](int i, uint32_t (&parts)[kParts]) {
        const int64_t e = step / 2 * kDepth + 8 * t + step % 2 * 4 + i % 2 * 2, r = i / 2 * 8 + g;
        split(direction(e, r), direction(e + 1, r), parts, Bfloat16{});
      });
    for (int64_t pair = warp_index(); pair < pairs; pair += kClusterWarps)
      write(centres, pair, [&](int i, uint32_t (&parts)[kParts]) {
        const int64_t c = 16 * pair + i / 2 * 8 + g, r = 2 * t + i % 2 * 8;
        split(centre(c, r), centre(c, r + 1), parts, Bfloat16{});
      });
    for (int64_t c = thread_index(); c < 16 * pairs; c += kClusterThreads)
      squares.set(c, c < p.clusters ? centre(c, kDirections) : -float(INFINITY));
    for (int64_t x = thread_index(); x < units * kDepth / 4; x += kClusterThreads) {
      FourWords of_mean, of_query;
      for (int i = 0; i < 4; ++i) {
        const bool is_there = 4 * x + i < p.head_dim;
        of_mean.at[i] = is_there ? same_bits<uint32_t>(load(kept.mean + 4 * x + i)) : 0;
        of_query.at[i] = is_there ? same_bits<uint32_t>(load(kept.query_mean + 4 * x + i)) : 0;
      }
      mean.set(x, of_mean), query_mean.set(x, of_query);
    }
  }

  template <class E, class Key, class Found>
  SB_DEVICE void find(int64_t count, const Key& key, const Found& found) const {
    for (int64_t first = warp_index() * kTiles * 16; first < count; first += kClusterWarps * kTiles * 16) {
      const E* row[kTiles][2];
      SB_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) SB_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t i = first + 16 * tile + 8 * half + g;
        row[tile][half] = i < count ? key(i) : nullptr;
      }
      float z[kTiles][2][4], dot[kTiles][2];
      project(row, z, dot);
      float best[kTiles][2];
      int32_t at[kTiles][2];
      choose(z, best, at);
      SB_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) SB_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float of_row = quad_sum(dot[tile][half]);
        if (t == 0 && row[tile][half]) found(first + 16 * tile + 8 * half + g, at[tile][half], of_row);
      }
      sync_warp();  // products need all lanes again
    }
  }

 private:
  static SB_HD int64_t at_mean(const ClusteringParams& p) {
    return ceil_div(p.head_dim, kDepth) * 2 * kParts * kWordsOfLanes;
  }
  static SB_HD int64_t at_centres(const ClusteringParams& p) {
    return at_mean(p) + 2 * pad_to(p.head_dim, kDepth) * int64_t(sizeof(float));
  }

  // Coordinates along the directions, as a product has its sums, and this lane's share of a.k.
  template <class E>
  SB_DEVICE void project(const E* const (&row)[kTiles][2], float (&z)[kTiles][2][4], float (&dot)[kTiles][2]) const {
    SB_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      dot[tile][0] = dot[tile][1] = 0;
      SB_UNROLL
      for (int n = 0; n < 2; ++n) SB_UNROLL
      for (int i = 0; i < 4; ++i) z[tile][n][i] = 0;
    }
    SB_NO_UNROLL
    for (int unit = 0; unit < units; ++unit) {
      SB_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        float x[2][8];
        SB_UNROLL
        for (int half = 0; half < 2; ++half) read_eight(row[tile][half], unit * kDepth + 8 * t, x[half]);
        SB_UNROLL
        for (int four = 0; four < 2; ++four) {
          const FourWords of_mean = mean.get(unit * (kDepth / 4) + 2 * t + four),
                          of_query = query_mean.get(unit * (kDepth / 4) + 2 * t + four);
          SB_UNROLL
          for (int half = 0; half < 2; ++half) SB_UNROLL
          for (int i = 0; i < 4; ++i) {
            float& centred = x[half][4 * four + i];
            if (row[tile][half]) centred -= same_bits<float>(of_mean.at[i]);
            dot[tile][half] += centred * same_bits<float>(of_query.at[i]);
          }
          FourWords right[kParts];
          SB_UNROLL
          for (int k = 0; k < kParts; ++k)
            right[k] = directions.get(((2 * unit + four) * kParts + k) * kWarp + lane_index());
          uint32_t left[kParts][4];
          SB_UNROLL
          for (int i = 0; i < 4; ++i) {
            const float* pair = x[i % 2] + 4 * four + i / 2 * 2;
            set_parts(pair[0], pair[1], i, left);
          }
          add_products(z[tile], left, right);
        }
      }
    }
  }

  // Of every key the centre with the largest z.centre - |centre|^2 / 2, the lowest of equals.
  SB_DEVICE void choose(const float (&z)[kTiles][2][4], float (&best)[kTiles][2], int32_t (&at)[kTiles][2]) const {
    uint32_t left[kTiles][kParts][4];
    SB_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SB_UNROLL
      for (int i = 0; i < 4; ++i) set_parts(z[tile][i / 2][i % 2 * 2], z[tile][i / 2][i % 2 * 2 + 1], i, left[tile]);
      SB_UNROLL
      for (int half = 0; half < 2; ++half) best[tile][half] = -float(INFINITY), at[tile][half] = 0;
    }
    SB_NO_UNROLL
    for (int pair = 0; pair < pairs; ++pair) {
      FourWords right[kParts];
      SB_UNROLL
      for (int k = 0; k < kParts; ++k) right[k] = centres.get((pair * kParts + k) * kWarp + lane_index());
      float from[2][2];
      SB_UNROLL
      for (int n = 0; n < 2; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) from[n][i] = squares.get(16 * pair + 8 * n + 2 * t + i);
      SB_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        float score[2][4];
        SB_UNROLL
        for (int n = 0; n < 2; ++n) SB_UNROLL
        for (int i = 0; i < 4; ++i) score[n][i] = from[n][i % 2];
        add_products(score, left[tile], right);
        SB_UNROLL
        for (int half = 0; half < 2; ++half) SB_UNROLL
        for (int n = 0; n < 2; ++n) SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float of_centre = score[n][2 * half + i];
          if (of_centre > best[tile][half])
            best[tile][half] = of_centre, at[tile][half] = 16 * pair + 8 * n + 2 * t + i;
        }
      }
    }
    // Over the four lanes that have a key's centres.
    SB_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) SB_UNROLL
    for (int half = 0; half < 2; ++half) SB_UNROLL
    for (int mask = 1; mask <= 2; ++mask) {
      const float other = shuffle_xor(best[tile][half], mask);
      const int32_t other_at = shuffle_xor(at[tile][half], mask);
      if (other > best[tile][half] || (other == best[tile][half] && other_at < at[tile][half]))
        best[tile][half] = other, at[tile][half] = other_at;
    }
  }

  // Word i of the left operand, in parts.
  static SB_DEVICE void set_parts(float low, float high, int i, uint32_t (&left)[kParts][4]) {
    uint32_t parts[kParts];
    split(low, high, parts, Bfloat16{});
    SB_UNROLL
    for (int k = 0; k < kParts; ++k) left[k][i] = parts[k];
  }
  // Products of parts down to 2^-16 of the whole, the smallest first.
  static SB_DEVICE void add_products(float (&sum)[2][4], const uint32_t (&left)[kParts][4],
                                     const FourWords (&right)[kParts]) {
    SB_UNROLL
    for (int order = kParts - 1; order >= 0; --order) SB_UNROLL
    for (int k = 0; k <= order; ++k) SB_UNROLL
    for (int n = 0; n < 2; ++n)
      multiply_add(sum[n], left[k], right[order - k].at[2 * n], right[order - k].at[2 * n + 1], Bfloat16{});
  }

  // Numbers e to e + 7 of a row; zeros beyond its end, and for no row.
  template <class E>
  SB_DEVICE void read_eight(const E* row, int64_t e, float (&x)[8]) const {
    constexpr int kAtOnce = int(kCopyBytes / sizeof(E));
    if (!row || e >= p.head_dim) {
      SB_UNROLL
      for (int i = 0; i < 8; ++i) x[i] = 0;
    } else if (p.has_eights) {
      SB_UNROLL
      for (int i = 0; i < 8; i += kAtOnce) {
        const FourWords words = load(reinterpret_cast<const FourWords*>(row + e + i));
        SB_UNROLL
        for (int w = 0; w < 4; ++w)
          if constexpr (sizeof(E) == 4)
            x[i + w] = same_bits<float>(words.at[w]);
          else
            x[i + 2 * w] = low_of(words.at[w], E{}), x[i + 2 * w + 1] = high_of(words.at[w], E{});
      }
    } else {
      SB_UNROLL
      for (int i = 0; i < 8; ++i) x[i] = e + i < p.head_dim ? widened(load(row + e + i)) : 0.0f;
    }
  }

  const ClusteringParams& p;
  const int units, pairs, g, t;  // of kDepth columns; of two times 8 centres
  const Shared<FourWords> directions, mean, query_mean, centres;
  const Shared<float> squares;  // minus half of a centre's square, and minus infinity behind the last
};

}  // namespace sb::cuda

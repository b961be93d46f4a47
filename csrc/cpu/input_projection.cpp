// Launcher of projections that are fitted to the tokens: heads in parallel, or where there are fewer than threads the
// segments of their tokens. Every sum has its order, so both give the same bits.
#include <cmath>
#include <limits>
#include <mutex>

#include "../checks.h"
#include "../math/input_statistics.h"
#include "../profile.h"
#include "launchers.h"
#include "padding.h"
#include "tensor_rows.h"

namespace sb::cpu {
namespace {

// Valid tokens of every batch row, and those that covariances are taken from.
struct Samples {
  Samples(int64_t batch, int64_t tokens, const uint8_t* mask, const std::vector<RowRange>& rows, bool of_queries)
      : valid(size_t(batch)), tokens_of(size_t(batch)) {
    for (int64_t b = 0; b < batch; ++b) {
      const RowRange& range = rows[size_t(b)];
      const int64_t first = of_queries ? range.q_first : range.k_first, end = of_queries ? range.q_end : range.k_end;
      const uint8_t* ignored = mask ? mask + b * tokens : nullptr;
      const int64_t length = ignored ? std::count(ignored + first, ignored + end, uint8_t(0)) : end - first,
                    n = std::min(kCovarianceSamples, length);
      valid[size_t(b)] = length;
      std::vector<int32_t>& sampled = tokens_of[size_t(b)];
      sampled.reserve(size_t(n));
      int64_t token = first, position = -1;  // the valid ones before `token` are 0 .. position
      for (int64_t t = 0; t < n; ++t) {
        const int64_t wanted = spread_position(t, n, length);
        if (!ignored) {
          sampled.push_back(int32_t(first + wanted));
          continue;
        }
        for (; position < wanted; ++token) position += ignored[token] == 0;
        sampled.push_back(int32_t(token - 1));
      }
    }
  }
  std::vector<int64_t> valid;
  std::vector<std::vector<int32_t>> tokens_of;
};

// What the stages of one head hand on: sums of segments and what becomes of them, rows `width` wide.
template <class T>
struct Head {
  Head(int64_t q_segments, int64_t k_segments, int64_t width)
      : query_sums(size_t(q_segments * width)),
        key_sums(size_t(k_segments * width)),
        top(size_t(k_segments)),
        mass(size_t(k_segments)),
        query_mean(size_t(width)),
        key_mean(size_t(width)),
        query_covariance(size_t(width * width)),
        key_covariance(size_t(width * width)) {}
  std::vector<T> query_sums, key_sums, top, mass, query_mean, key_mean;
  std::vector<double> query_covariance, key_covariance;
};

// Where subspace iteration starts, (rank, width): numbers without a pattern. The last one is kept: a model asks for the
// same again and again, and cosines of large numbers take as long as the iteration.
using Start = std::vector<double>;
std::shared_ptr<const Start> start_of_iteration(int64_t d, int64_t width, int64_t rank) {
  struct Kept {
    std::mutex guard;
    int64_t d = 0, rank = 0;
    std::shared_ptr<const Start> start;
  };
  static Kept* const kept = new Kept;  // never destroyed: threads may outlive static objects
  const std::lock_guard<std::mutex> lock(kept->guard);
  if (kept->d == d && kept->rank == rank) return kept->start;
  auto start = std::make_shared<Start>(size_t(rank * width));
  for (int64_t t = 0; t < rank; ++t)
    for (int64_t e = 0; e < d; ++e) {
      const double i = double(rank * e + t);
      (*start)[size_t(t * width + e)] = std::cos(i * i);
    }
  kept->d = d, kept->rank = rank, kept->start = start;
  return start;
}

template <class T>
class Fit {
 public:
  explicit Fit(const InputProjectionArguments& a)
      : a(a),
        batch(a.query.size(0)),
        kv_heads(a.key.size(1)),
        group(a.query.size(1) / kv_heads),
        q_tokens(a.query.size(2)),
        k_tokens(a.key.size(2)),
        d(a.query.size(3)),
        width(pad_to(d, kPad)),
        q_segments(group * ceil_div(q_tokens, kSegment)),
        k_segments(ceil_div(k_tokens, kSegment)),
        rows(row_ranges(batch, q_tokens, k_tokens, a.query_range, a.key_range, {})),
        query_mask(a.query_mask),
        key_mask(a.key_mask),
        queries(batch, q_tokens, query_mask.data, rows, true),
        keys(batch, k_tokens, key_mask.data, rows, false),
        start(start_of_iteration(d, width, a.rank)),
        kernel(input_projection_kernels<T>()) {
    for (Tensor* weight : {&query_weight, &key_weight}) *weight = empty({batch, kv_heads, a.rank + 1, d}, kScalar<T>);
    for (Tensor* bias : {&query_bias, &key_bias}) *bias = empty({batch, kv_heads, a.rank + 1}, kScalar<T>);
  }

  InputProjection run() {
    const int64_t heads = batch * kv_heads;
    if (heads >= torch::stable::get_num_threads()) {
      parallel_units(1, heads, 1, scratch_bytes(), [&](int64_t, int64_t at, int64_t, void* scratch) {
        Head<T> head(q_segments, k_segments, width);
        for (int64_t s = 0; s < q_segments; ++s) sum_queries(at, head, s, scratch);
        take_query_mean(at, head);
        for (int64_t s = 0; s < k_segments; ++s) sum_keys(at, head, s, scratch);
        find_covariance(at, head, true, scratch), find_covariance(at, head, false, scratch);
        write_projections(at, head, scratch);
      });
    } else {
      std::vector<Head<T>> all(size_t(heads), Head<T>(q_segments, k_segments, width));
      const auto stage = [&](int64_t units, const auto& work) {
        parallel_units(1, heads, units, scratch_bytes(), [&](int64_t, int64_t at, int64_t unit, void* scratch) {
          work(at, all[size_t(at)], unit, scratch);
        });
      };
      stage(q_segments,
            [&](int64_t at, Head<T>& head, int64_t s, void* scratch) { sum_queries(at, head, s, scratch); });
      for (int64_t at = 0; at < heads; ++at) take_query_mean(at, all[size_t(at)]);
      stage(2 + k_segments, [&](int64_t at, Head<T>& head, int64_t unit, void* scratch) {
        if (unit < 2)
          find_covariance(at, head, unit == 0, scratch);
        else
          sum_keys(at, head, unit - 2, scratch);
      });
      stage(1, [&](int64_t at, Head<T>& head, int64_t, void* scratch) { write_projections(at, head, scratch); });
    }
    return {query_weight, query_bias, key_weight, key_bias};
  }

 private:
  int64_t scratch_bytes() const {
    const int64_t samples = group * kCovarianceSamples;
    const int64_t of_samples =
        samples * width * int64_t(sizeof(T)) + kernel.covariance(nullptr, samples, width, 0, nullptr, nullptr, nullptr);
    return std::max(
        {kSegment * width * int64_t(sizeof(T)), of_samples,
         2 * a.rank * width * int64_t(sizeof(float)) + kernel.directions({a.rank, d, width, nullptr}, nullptr, nullptr,
                                                                         nullptr, nullptr, nullptr, nullptr, nullptr)});
  }
  // Calls visit(rows, stride, ignored, n) of a segment, counted from the first valid token.
  template <class Visit>
  void with_segment(const Tensor& tokens, const MaskBytes& mask, int64_t b, int64_t h, int64_t first, int64_t end,
                    int64_t segment, void* scratch, const Visit& visit) const {
    const int64_t from = first + segment * kSegment, n = std::min(kSegment, end - from);
    if (n <= 0) return visit(BlockRows<T>{nullptr, 0}, nullptr, 0);
    visit(rows_of_block<T>(tokens, width, b, h, from, n, static_cast<T*>(scratch)),
          mask.data ? mask.data + b * tokens.size(2) + from : nullptr, n);
  }

  // Segments of the first query head of the group, then of the second and so on.
  void sum_queries(int64_t at, Head<T>& head, int64_t s, void* scratch) const {
    const int64_t b = at / kv_heads, of_head = q_segments / group, h = at % kv_heads * group + s / of_head;
    const RowRange& range = rows[size_t(b)];
    with_segment(a.query, query_mask, b, h, range.q_first, range.q_end, s % of_head, scratch,
                 [&](const BlockRows<T>& in, const uint8_t* ignored, int64_t n) {
                   kernel.sum_tokens(in.data, in.row, ignored, n, width, &head.query_sums[size_t(s * width)]);
                 });
  }

  void take_query_mean(int64_t at, Head<T>& head) const {
    const int64_t n = group * queries.valid[size_t(at / kv_heads)];
    for (int64_t s = 0; s < q_segments; ++s)
      for (int64_t e = 0; e < width; ++e) head.query_mean[size_t(e)] += head.query_sums[size_t(s * width + e)];
    for (T& mean : head.query_mean) mean *= T(a.scale / double(std::max<int64_t>(n, 1)));
  }

  void sum_keys(int64_t at, Head<T>& head, int64_t s, void* scratch) const {
    const RowRange& range = rows[size_t(at / kv_heads)];
    with_segment(a.key, key_mask, at / kv_heads, at % kv_heads, range.k_first, range.k_end, s, scratch,
                 [&](const BlockRows<T>& in, const uint8_t* ignored, int64_t n) {
                   kernel.sum_weighted_tokens(in.data, in.row, ignored, n, width, head.query_mean.data(),
                                              &head.key_sums[size_t(s * width)], &head.top[size_t(s)],
                                              &head.mass[size_t(s)]);
                 });
  }

  void take_key_mean(Head<T>& head) const {
    T top = -std::numeric_limits<T>::infinity(), total = 0;
    for (int64_t s = 0; s < k_segments; ++s) top = std::max(top, head.top[size_t(s)]);
    for (int64_t s = 0; s < k_segments; ++s) {
      if (head.mass[size_t(s)] == T(0)) continue;
      const T share = std::exp(head.top[size_t(s)] - top);
      total += share * head.mass[size_t(s)];
      for (int64_t e = 0; e < width; ++e) head.key_mean[size_t(e)] += share * head.key_sums[size_t(s * width + e)];
    }
    if (total == T(0)) return;  // no key
    for (T& mean : head.key_mean) mean /= total;
  }

  void find_covariance(int64_t at, Head<T>& head, bool of_queries, void* scratch) const {
    const int64_t b = at / kv_heads, kv = at % kv_heads, heads = of_queries ? group : 1;
    const Tensor& tokens = of_queries ? a.query : a.key;
    const std::vector<int32_t>& sampled = (of_queries ? queries : keys).tokens_of[size_t(b)];
    const int64_t n = heads * int64_t(sampled.size());
    if (n == 0) return;
    T* const samples = static_cast<T*>(scratch);
    for (int64_t g = 0; g < heads; ++g)
      gather_rows<T>(tokens, width, b, kv * heads + g, sampled, samples + g * int64_t(sampled.size()) * width);
    const std::vector<double> mean(head.query_mean.begin(), head.query_mean.end());
    kernel.covariance(samples, n, width, of_queries ? a.scale : 1.0, of_queries ? nullptr : mean.data(),
                      (of_queries ? head.query_covariance : head.key_covariance).data(), samples + n * width);
  }

  // x = Pq (scale q - a), rho = scale q.b; y = Pk (k - b), kappa = a.(k - b): formed in float64 from Pq, a, Pk and b
  // that are rounded to float32, as stored ones are. NaN everywhere if anything is not finite.
  void write_projections(int64_t at, Head<T>& head, void* scratch) const {
    take_key_mean(head);
    float *const pq = static_cast<float*>(scratch), *const pk = pq + a.rank * width;
    kernel.directions({a.rank, d, width, start->data()}, head.query_mean.data(), head.key_mean.data(),
                      head.query_covariance.data(), head.key_covariance.data(), pq, pk, pk + a.rank * width);
    const int64_t rows_of_head = a.rank + 1;
    const auto at_head = [&](const Tensor& t, int64_t size) { return static_cast<T*>(t.data_ptr()) + at * size; };
    T *const qw = at_head(query_weight, rows_of_head * d), *const kw = at_head(key_weight, rows_of_head * d),
             *const qb = at_head(query_bias, rows_of_head), *const kb = at_head(key_bias, rows_of_head);
    double of_means = 0;
    for (int64_t e = 0; e < d; ++e) {
      const double mean = double(float(head.query_mean[size_t(e)])), key_mean = double(float(head.key_mean[size_t(e)]));
      qw[a.rank * d + e] = T(key_mean * a.scale), kw[a.rank * d + e] = T(mean);
      of_means += mean * key_mean;
    }
    qb[a.rank] = T(0), kb[a.rank] = T(-of_means);
    bool is_finite = std::isfinite(of_means);
    for (int64_t t = 0; t < a.rank; ++t) {
      double of_query = 0, of_key = 0;
      for (int64_t e = 0; e < d; ++e) {
        const double x = pq[t * width + e], y = pk[t * width + e];
        qw[t * d + e] = T(x * a.scale), kw[t * d + e] = T(y);
        of_query += x * double(float(head.query_mean[size_t(e)])),
            of_key += y * double(float(head.key_mean[size_t(e)]));
      }
      qb[t] = T(-of_query), kb[t] = T(-of_key);
      is_finite = is_finite && std::isfinite(of_query) && std::isfinite(of_key);
    }
    if (is_finite) return;
    std::fill_n(qw, rows_of_head * d, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(kw, rows_of_head * d, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(qb, rows_of_head, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(kb, rows_of_head, std::numeric_limits<T>::quiet_NaN());
  }

  const InputProjectionArguments& a;
  const int64_t batch, kv_heads, group, q_tokens, k_tokens, d, width, q_segments, k_segments;
  const std::vector<RowRange> rows;
  const MaskBytes query_mask, key_mask;
  const Samples queries, keys;
  const std::shared_ptr<const Start> start;
  const InputProjectionKernels<T>& kernel;
  Tensor query_weight, query_bias, key_weight, key_bias;
};

}  // namespace

InputProjection input_projection(SB_INPUT_PROJECTION(SB_PARAMETER, SB_COMMA)) {
  const InputProjectionArguments a{SB_INPUT_PROJECTION(SB_VALUE, SB_COMMA)};
  check_input_projection(a);
  const Stage stage("statistics of the input");
  return a.query.scalar_type() == ScalarType::Double ? Fit<double>(a).run() : Fit<float>(a).run();
}

}  // namespace sb::cpu

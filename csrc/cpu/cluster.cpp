// Launcher of clustering: the queries of a few heads, their directions and centres, then their keys, in parallel.
#include <cstring>

#include "../math/clustering.h"
#include "../profile.h"
#include "launchers.h"
#include "padding.h"
#include "tensor_rows.h"

namespace sb::cpu {
namespace {

// Valid queries of every batch row, and the keys that its directions and centres are taken from.
struct Samples {
  explicit Samples(ClusterParams& p)
      : queries(size_t(p.batch)), keys(size_t(p.batch) * kSamples), counts(size_t(p.batch)) {
    std::vector<int32_t> valid;
    for (int64_t b = 0; b < p.batch; ++b) {
      const RowRange& range = p.rows[b];
      queries[size_t(b)] = count_valid(p.q_mask, b * p.q_tokens, range.q_first, range.q_end);
      const int64_t length = count_valid(p.k_mask, b * p.k_tokens, range.k_first, range.k_end),
                    n = std::min<int64_t>(kSamples, length);
      counts[size_t(b)] = int32_t(n);
      int64_t key = range.k_first, position = 0;  // of a valid key
      for (int64_t t = 0; t < n; ++t) {
        const int64_t wanted = spread_position(t, n, length);
        const auto is_ignored = [&] { return p.k_mask && p.k_mask[b * p.k_tokens + key]; };
        if (!p.k_mask) key += wanted - position, position = wanted;
        while (is_ignored()) ++key;
        for (; position < wanted; ++position) do
            ++key;
          while (is_ignored());
        keys[size_t(b * kSamples + t)] = int32_t(key);
      }
    }
    p.valid_queries = queries.data(), p.samples = keys.data(), p.sampled = counts.data();
  }
  static int64_t count_valid(const uint8_t* mask, int64_t row, int64_t first, int64_t end) {
    return mask ? std::count(mask + row + first, mask + row + end, uint8_t(0)) : end - first;
  }
  std::vector<int64_t> queries;
  std::vector<int32_t> keys, counts;
};

template <class T>
Clusters run(const ClusterArguments& a) {
  ClusterParams p{};
  p.batch = a.query.size(0), p.q_heads = a.query.size(1), p.kv_heads = a.key.size(1), p.q_tokens = a.query.size(2),
  p.k_tokens = a.key.size(2);
  p.head_dim = a.query.size(3), p.head_pad = pad_to(p.head_dim, kPad);
  p.clusters = a.clusters, p.scale = a.scale;
  const Padding padding(a, p);
  const Samples samples(p);
  const TensorRows q = as_rows<T>(a.query, p.head_pad, p.q_mask), k = as_rows<T>(a.key, p.head_pad, p.k_mask);
  p.q = q.rows, p.k = k.rows;

  Tensor index = empty({p.batch, p.kv_heads, p.k_tokens}, ScalarType::Int);
  Tensor representatives = zeros({p.batch, p.kv_heads, p.clusters, p.head_dim}, kScalar<T>);
  Tensor log_mass = zeros({p.batch, p.kv_heads, p.k_tokens}, kScalar<T>);
  Tensor query_mean = zeros({p.batch, p.kv_heads, p.head_dim}, kScalar<T>);
  if (index.numel() > 0) std::memset(index.data_ptr(), 0xff, size_t(index.numel()) * sizeof(int32_t));  // -1 everywhere
  p.index = static_cast<int32_t*>(index.data_ptr());
  p.representatives = representatives.data_ptr(), p.log_mass = log_mass.data_ptr(),
  p.query_mean = query_mean.data_ptr();

  const ClusterKernels& kernel = cluster_kernels<T>();
  const ZeroRow<T> zero_row(p.head_pad);
  const int64_t heads = p.batch * p.kv_heads, q_segments = ceil_div(p.q_tokens, kSegment),
                k_segments = ceil_div(p.k_tokens, kSegment), head_bytes = pad_to(kernel.head_bytes(p), 64);
  const Scratch memory(heads_per_range(heads, p.k_tokens) * head_bytes);
  for_each_head_range(heads, p.k_tokens, [&](const HeadRange& range) {
    const auto stage = [&](int64_t segments, int64_t bytes, const auto& work) {
      parallel_units(1, range.count, segments, bytes, [&](int64_t, int64_t at, int64_t segment, void* scratch) {
        const int64_t head = range.first + at;
        work(head / p.kv_heads, head % p.kv_heads, segment, static_cast<char*>(memory.data()) + at * head_bytes,
             scratch);
      });
    };
    std::optional<Stage> timed(std::in_place, "clustering, centres");
    stage(q_segments, kernel.queries(p, 0, 0, 0, nullptr, nullptr),
          [&](int64_t b, int64_t kv, int64_t segment, void* head, void* scratch) {
            kernel.queries(p, b, kv, segment, head, scratch);
          });
    stage(1, kernel.centres(p, 0, 0, nullptr, nullptr, nullptr),
          [&](int64_t b, int64_t kv, int64_t, void* head, void* scratch) {
            kernel.centres(p, b, kv, head, scratch, zero_row.data());
          });
    timed.emplace("clustering, keys");
    stage(k_segments, 0, [&](int64_t b, int64_t kv, int64_t segment, void* head, void*) {
      kernel.keys(p, b, kv, segment, head, zero_row.data());
    });
    stage(k_segments > 0, 0,
          [&](int64_t b, int64_t kv, int64_t, void* head, void*) { kernel.representatives(p, b, kv, head); });
    stage(k_segments, 0,
          [&](int64_t b, int64_t kv, int64_t segment, void* head, void*) { kernel.logs(p, b, kv, segment, head); });
  });
  return {index, representatives, log_mass, query_mean};
}

}  // namespace

Clusters cluster(const ClusterArguments& a) {
  return (a.key.scalar_type() == ScalarType::Double ? run<double> : run<float>)(a);
}

}  // namespace sb::cpu

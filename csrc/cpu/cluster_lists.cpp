// Lists from clusters: the members of every cluster, then queries of all heads in parallel.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../checks.h"
#include "../profile.h"
#include "../tensor_traits.h"
#include "launchers.h"
#include "padding.h"
#include "parallel.h"

namespace sb::cpu {
namespace {

// Merges two ascending lists, without duplicates, into one. Returns its length.
int64_t merge(const int32_t* a, int64_t a_size, const int32_t* b, int64_t b_size, int32_t* out) {
  const int32_t* const begin = out;
  const int32_t *const a_end = a + a_size, *const b_end = b + b_size;
  while (a < a_end && b < b_end) {
    const int32_t x = *a, y = *b;
    *out++ = std::min(x, y);
    a += x <= y, b += y <= x;
  }
  out = std::copy(b, b_end, std::copy(a, a_end, out));
  return out - begin;
}

// The keys of every cluster of one head and round: those of cluster c are members[first[c]] to members[first[c + 1]],
// ascending, counted from `origin`.
struct Members {
  int32_t *first, *members;
  void fill(const int32_t* cluster_of, int64_t keys, int64_t clusters, int32_t origin) const {
    std::fill(first, first + clusters + 1, 0);
    for (int64_t j = 0; j < keys; ++j)
      if (cluster_of[j] >= 0) ++first[cluster_of[j] + 1];
    for (int64_t c = 0; c < clusters; ++c) first[c + 1] += first[c];
    for (int64_t j = 0; j < keys; ++j)
      if (cluster_of[j] >= 0) members[first[cluster_of[j]]++] = int32_t(j) - origin;
    for (int64_t c = clusters; c > 0; --c) first[c] = first[c - 1];  // every one was moved to its end
    first[0] = 0;
  }
  int64_t size(int32_t c) const { return first[c + 1] - first[c]; }
  const int32_t* begin(int32_t c) const { return members + first[c]; }
};

// Throws unless these are clusters, fewer than `most`. Returns how many there are.
int64_t count_clusters(const char* name, const Tensor& t, int64_t most) {
  SB_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 4, "cluster_lists: ", name,
           " must be int32 (B, H, rounds, tokens)");
  SB_CHECK(t.is_contiguous(), "cluster_lists: ", name, " must be contiguous");
  const int32_t* const begin = static_cast<const int32_t*>(t.data_ptr());
  const int64_t count = t.numel() ? int64_t(*std::max_element(begin, begin + t.numel())) + 1 : 0;
  SB_CHECK(count <= most, "cluster_lists: ", name, " must name clusters 0 to ", most - 1,
           ", no more than there are keys, or -1 for ignored tokens, got ", count - 1);
  return count;
}

}  // namespace

std::tuple<Tensor, Tensor> cluster_lists(const Tensor& query_cluster, const Tensor& key_cluster,
                                         const MaybeTensor& query_range, const MaybeTensor& key_range,
                                         int64_t largest) {
  SB_CHECK(query_cluster.dim() == 4 && key_cluster.dim() == 4,
           "cluster_lists: query_cluster and key_cluster must be int32 (B, H, rounds, tokens)");
  const int64_t batch = query_cluster.size(0), heads = query_cluster.size(1), rounds = query_cluster.size(2),
                queries = query_cluster.size(3), keys = key_cluster.size(3);
  SB_CHECK(has_shape(key_cluster, {batch, heads, rounds, keys}) && rounds > 0,
           "cluster_lists: query_cluster and key_cluster must have the same batch, heads and rounds");
  SB_CHECK(largest > 0 && largest < kInt32Limit, "cluster_lists: largest must be at least 1, got ", largest);
  const int64_t clusters = std::max(count_clusters("query_cluster", query_cluster, keys),
                                    count_clusters("key_cluster", key_cluster, keys)),
                capacity = std::min(rounds * std::min(largest, keys), keys);
  check_range("cluster_lists", "query_range", query_range, batch, queries);
  check_range("cluster_lists", "key_range", key_range, batch, keys);
  const std::vector<RowRange> rows = row_ranges(batch, queries, keys, query_range, key_range, std::nullopt);
  const int32_t *const of_query = static_cast<const int32_t*>(query_cluster.data_ptr()),
                       *const of_key = static_cast<const int32_t*>(key_cluster.data_ptr());

  Tensor index = empty({batch, heads, queries, capacity}, ScalarType::Int);
  Tensor count = zeros({batch, heads, queries}, ScalarType::Int);
  if (index.numel() > 0) std::memset(index.data_ptr(), 0xff, size_t(index.numel()) * sizeof(int32_t));  // -1 everywhere
  int32_t *const lists = static_cast<int32_t*>(index.data_ptr()), *const counts =
                                                                      static_cast<int32_t*>(count.data_ptr());

  std::optional<Stage> stage(std::in_place, "lists of clusters, members");
  const int64_t members_size = clusters + 1 + keys;
  const Scratch memory(batch * heads * rounds * members_size * int64_t(sizeof(int32_t)));
  const auto members_of = [&](int64_t head, int64_t round) {
    int32_t* const at = static_cast<int32_t*>(memory.data()) + (head * rounds + round) * members_size;
    return Members{at, at + clusters + 1};
  };
  parallel_ranges(batch * heads * rounds, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at)
      members_of(at / rounds, at % rounds)
          .fill(of_key + at * keys, keys, clusters, rows[size_t(at / rounds / heads)].k_first);
  });

  stage.emplace("lists of clusters, unions");
  std::atomic<bool> is_too_long = false;
  const int64_t segments = ceil_div(queries, kSegment);
  parallel_units(1, batch * heads, segments, 2 * keys * int64_t(sizeof(int32_t)),
                 [&](int64_t, int64_t head, int64_t segment, void* scratch) {
                   const RowRange& row = rows[size_t(head / heads)];
                   int32_t* const buffers[2] = {static_cast<int32_t*>(scratch), static_cast<int32_t*>(scratch) + keys};
                   const int64_t first = std::max<int64_t>(segment * kSegment, row.q_first),
                                 end = std::min<int64_t>((segment + 1) * kSegment, row.q_end);
                   for (int64_t i = first; i < end; ++i) {
                     const int32_t* found = nullptr;
                     int64_t size = 0;
                     for (int64_t round = 0; round < rounds; ++round) {
                       const int32_t c = of_query[(head * rounds + round) * queries + i];
                       if (c < 0) continue;
                       const Members members = members_of(head, round);
                       if (size == 0) {
                         found = members.begin(c), size = members.size(c);
                       } else {
                         int32_t* const out = buffers[found == buffers[0]];
                         size = merge(found, size, members.begin(c), members.size(c), out), found = out;
                       }
                     }
                     if (size > capacity) is_too_long.store(true, std::memory_order_relaxed), size = capacity;
                     const int64_t slot = head * queries + i - row.q_first;
                     std::copy(found, found + size, lists + slot * capacity);
                     counts[slot] = int32_t(size);
                   }
                 });
  SB_CHECK(!is_too_long, "cluster_lists: a cluster has more than largest = ", largest, " keys");
  return {index, count};
}

}  // namespace sb::cpu

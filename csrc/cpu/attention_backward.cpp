// Launcher of the backward pass: whole key/value heads in parallel, or, where there are fewer heads than threads,
// rounds of units whose records are kept and then scattered by key range (docs/algorithm.md, section 6, order of sums).
#include "../profile.h"
#include "../tensor_traits.h"
#include "second_pass.h"
#include "launchers.h"

#include <numeric>

namespace sb::cpu {
namespace {

template <class E>
class Backward {
  typedef AccType<E> T;

 public:
  Backward(const AttentionArguments& a, const Tensor& out, const Tensor& lse, const Tensor& d_out,
           const MaybeTensor& d_lse)
      : args(a),
        out(out),
        d_out(d_out),
        lse(lse),
        d_lse(d_lse),
        call(a),
        p(call.p),
        second_pass(p),
        dq(gradient_of(a.query)),
        dk(gradient_of(a.key)),
        dv(gradient_of(a.value)),
        d_query_map(gradient_of_map(call.every_query(), p.q_heads, a.query_weight ? 0 : p.q_tokens)),
        d_key_map(gradient_of_map(call.every_key(), p.kv_heads, a.key_weight ? 0 : p.k_tokens)),
        lse_values(values(lse)),
        query_weight(map_weight(a.query_weight, p.query_weight)),
        key_weight(map_weight(a.key_weight, p.key_weight)),
        dq_rows(result_rows<T>(dq, p.head_pad, call.every_query())),
        dk_rows(result_rows<T>(dk, p.head_pad, true)),
        dv_rows(result_rows<T>(dv, p.value_pad, true)),
        out_rows(as_rows<E>(out, p.value_pad, p.q_mask)),
        d_out_rows(as_rows<E>(d_out, p.value_pad, p.q_mask)) {
    p.dq = dq_rows.rows, p.dk = dk_rows.rows, p.dv = dv_rows.rows;
    p.out = out_rows.rows, p.d_out = d_out_rows.rows, p.lse = lse_values.data_ptr();
    if (d_lse) d_lse_values = values(*d_lse), p.d_lse = d_lse_values->data_ptr();
    p.d_query_map = rows_of(d_query_map), p.d_key_map = rows_of(d_key_map);
    if (!p.has_low_rank()) return;
    const int64_t of_head = p.k_tokens * p.dy_width(), states = p.batch * p.q_heads * p.units * p.slot_size;
    dy = std::make_unique<Scratch>(p.batch * p.kv_heads * of_head * int64_t(sizeof(T)));
    d_state = std::make_unique<Scratch>(states * int64_t(sizeof(T)));
    p.dy = {dy->data(), p.kv_heads * of_head, of_head, p.dy_width()}, p.d_kv_state = d_state->data();
    if (!p.has_clusters()) return;
    d_representatives =
        std::make_unique<Scratch>(p.batch * p.q_heads * p.units * p.rank * p.head_pad * int64_t(sizeof(T)));
    p.d_representatives = d_representatives->data();
  }

  Gradients run() {
    compute();
    write_back<T>(dq_rows, dq), write_back<T>(dk_rows, dk), write_back<T>(dv_rows, dv);
    const ScalarType dtype = accumulation_type(dq);
    return {dq, dk, dv, as_dtype(d_query_map, dtype), as_dtype(d_key_map, dtype)};
  }

 private:
  template <class>
  friend class Backward;

  void compute() {
    call.take_states();
    BackwardTask sizes;
    kernel.backward_unit(p, sizes);
    call.for_each_head_range([&](const HeadRange& range) {
      call.build_states(range);
      zero_keys(range);
      {
        const Stage stage("backward of queries");
        if (range.count >= int64_t(torch::stable::get_num_threads()))
          heads_in_parallel(sizes, range);
        else
          for (int64_t head = range.first; head < range.first + range.count; ++head)
            units_in_parallel(sizes, head / p.kv_heads, head % p.kv_heads);
      }
      if (!p.has_low_rank()) return;
      again_by_key(sizes, range);
      keys(range);
    });
    second_pass.in_double([&](int64_t b, int64_t h, const uint8_t* flags) {
      const Stage stage("queries again in double");
      Backward<double> again(one_head(args, b, h, flags), head_of(out, b, h), head_of(lse, b, h), head_of(d_out, b, h),
                             d_lse ? MaybeTensor(head_of(*d_lse, b, h)) : std::nullopt);
      again.compute();
      const int64_t kv = p.kv_head(h);
      const AttentionParams& from = again.p;
      add(from.dq, p.dq, b, h, p.q_tokens, p.head_pad);
      add(from.dk, p.dk, b, kv, p.k_tokens, p.head_pad), add(from.dv, p.dv, b, kv, p.k_tokens, p.value_pad);
      if (!p.has_maps()) return;
      if (!args.query_weight) add(from.d_query_map, p.d_query_map, b, h, p.q_tokens, p.rank + 1);
      if (!args.key_weight) add(from.d_key_map, p.d_key_map, b, kv, p.k_tokens, p.rank + 1);
    });
  }

  // Adds the rows of a float64 call of one head.
  static void add(const StridedTensor& from, const StridedTensor& to, int64_t b, int64_t h, int64_t tokens,
                  int64_t width) {
    for (int64_t i = 0; i < tokens; ++i) {
      const double* source = from.at<const double>(0, 0, i);
      T* target = to.at<T>(b, h, i);
      for (int64_t e = 0; e < width; ++e) target[e] += T(source[e]);
    }
  }

  static Tensor gradient_of(const Tensor& tokens) {
    return empty_like_tokens(tokens, tokens.size(3), tokens.scalar_type());
  }
  // Without rows where there is no map, and where its gradient goes on through the projection.
  Tensor gradient_of_map(bool fully_written, int64_t heads, int64_t rows) const {
    const bool mapped = p.has_maps();
    const std::initializer_list<int64_t> sizes = {p.batch, heads, mapped ? rows : 0, mapped ? p.rank + 1 : 1};
    return fully_written ? empty(sizes, kScalar<T>) : zeros(sizes, kScalar<T>);
  }
  TensorRows map_weight(const MaybeTensor& weight, MapWeight& to) const {
    if (!weight) return {};
    TensorRows rows = as_rows<T>(as_contiguous(*weight), p.head_pad);
    to = {rows.rows.data, weight->size(0) == 1 ? 0 : weight->size(1) * weight->size(2) * p.head_pad, weight->size(1)};
    return rows;
  }
  static Tensor values(const Tensor& t) { return as_dtype(as_contiguous(t), kScalar<T>); }

  // Gradients that are sums over queries start at zero.
  void zero_keys(const HeadRange& range) {
    const Stage stage("zeros");
    call.for_each_unit(range, 1, 0, [&](int64_t b, int64_t kv, int64_t, void*) {
      zero_rows(p.dk, b, kv, p.head_pad), zero_rows(p.dv, b, kv, p.value_pad);
      if (p.has_low_rank()) zero_rows(p.dy, b, kv, p.dy_width());
    });
  }
  void zero_rows(const StridedTensor& rows, int64_t b, int64_t kv, int64_t width) const {
    const bool together = rows.row == width;
    const int64_t pieces = together ? std::min<int64_t>(1, p.k_tokens) : p.k_tokens;
    const size_t bytes = size_t((together ? p.k_tokens : 1) * width) * sizeof(T);
    for (int64_t i = 0; i < pieces; ++i) std::memset(rows.at<T>(b, kv, i), 0, bytes);
  }

  void heads_in_parallel(const BackwardTask& sizes, const HeadRange& range) {
    const int64_t group = p.q_heads / p.kv_heads;
    call.for_each_unit(range, 1, sizes.scratch_bytes + sizes.record_bytes,
                       [&](int64_t b, int64_t kv, int64_t, void* scratch) {
                         BackwardTask task;
                         task.stage = BackwardTask::kCompute, task.b = b;
                         task.scratch = scratch, task.records = static_cast<char*>(scratch) + sizes.scratch_bytes,
                         task.zero_row = call.zero_row.data();
                         for (task.h = kv * group; task.h < (kv + 1) * group; ++task.h)
                           for (task.unit = 0; task.unit < p.units; ++task.unit) kernel.backward_unit(p, task);
                       });
  }

  // Whole heads: what they add to a key has an order that does not depend on the threads.
  void again_by_key(const BackwardTask& sizes, const HeadRange& range) {
    if (!second_pass.any()) return;
    const Stage stage("queries again by key");
    const int64_t group = p.q_heads / p.kv_heads;
    call.for_each_unit(range, 1, sizes.scratch_bytes + sizes.record_bytes,
                       [&](int64_t b, int64_t kv, int64_t, void* scratch) {
                         for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
                           second_pass.by_key(b, h, [&](const AttentionParams& again) {
                             BackwardTask task;
                             task.stage = BackwardTask::kCompute, task.b = b, task.h = h;
                             task.scratch = scratch, task.records = static_cast<char*>(scratch) + sizes.scratch_bytes,
                             task.zero_row = call.zero_row.data();
                             for (; task.unit < p.units; ++task.unit) kernel.backward_unit(again, task);
                           });
                       });
  }

  void units_in_parallel(const BackwardTask& sizes, int64_t b, int64_t kv) {
    const int64_t group = p.q_heads / p.kv_heads, threads = torch::stable::get_num_threads();
    std::vector<BackwardTask> round;
    int64_t groups = 0;
    std::unique_ptr<Scratch> records;  // of the largest round so far: reused memory needs no new pages
    int64_t reserved = 0;
    const auto flush = [&] {
      if (!records || groups > reserved)
        records = std::make_unique<Scratch>(groups * sizes.record_bytes), reserved = groups;
      int64_t at = 0;
      for (BackwardTask& task : round) {
        task.records = static_cast<char*>(records->data()) + at * sizes.record_bytes;
        at += task.tiles;
      }
      in_parallel(int64_t(round.size()), sizes, [&](int64_t i, void* scratch) {
        BackwardTask& task = round[size_t(i)];
        task.stage = BackwardTask::kCompute, task.keep = true, task.scratch = scratch;
        kernel.backward_unit(p, task);
      });
      const std::vector<int64_t> bounds = even_ranges(round, threads);
      in_parallel(threads, sizes, [&](int64_t i, void* scratch) {
        for (BackwardTask task : round) {
          task.stage = BackwardTask::kScatter, task.scratch = scratch;
          task.key_begin = bounds[size_t(i)], task.key_end = bounds[size_t(i) + 1];
          kernel.backward_unit(p, task);
        }
      });
      round.clear(), groups = 0;
    };
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for (int64_t unit = 0; unit < p.units; ++unit) {
        BackwardTask task;
        task.stage = BackwardTask::kCountTiles, task.b = b, task.h = h, task.unit = unit,
        task.zero_row = call.zero_row.data();
        kernel.backward_unit(p, task);
        if (!round.empty() && (groups + task.tiles) * sizes.record_bytes > kMostRoundBytes) flush();
        round.push_back(task), groups += task.tiles;
        const bool full = groups * sizes.record_bytes >= kRoundBytes && int64_t(round.size()) % threads == 0;
        if (full || (h + 1 == (kv + 1) * group && unit + 1 == p.units)) flush();
      }
  }

  // Bounds of `count` ranges of keys with about as many kept pairs of query and key each. There is one range for every
  // thread: the fewer pieces a record falls into, the less often its queries are read.
  std::vector<int64_t> even_ranges(const std::vector<BackwardTask>& round, int64_t count) {
    std::vector<int64_t> pairs(size_t(ceil_div(p.k_tokens, kChunk)), 0);
    for (BackwardTask task : round) {
      task.stage = BackwardTask::kCountKeys, task.keys_of_chunk = pairs.data();
      kernel.backward_unit(p, task);
    }
    const int64_t total = std::accumulate(pairs.begin(), pairs.end(), int64_t(0));
    std::vector<int64_t> bounds = {0};
    int64_t before = 0;
    for (size_t block = 0; block < pairs.size(); ++block) {
      while (before * count > total * int64_t(bounds.size()) && int64_t(bounds.size()) < count)
        bounds.push_back(int64_t(block) * kChunk);
      before += pairs[block];
    }
    bounds.resize(size_t(count) + 1, p.k_tokens);
    return bounds;
  }

  template <class Body>
  static void in_parallel(int64_t n, const BackwardTask& sizes, const Body& body) {
    parallel_units(1, 1, n, sizes.scratch_bytes, [&](int64_t, int64_t, int64_t i, void* scratch) { body(i, scratch); });
  }

  // Adds the states' part of the key-side gradients, and completes those of the key maps or of the representatives.
  void keys(const HeadRange& range) {
    const Stage stage("backward of keys");
    if (p.uses_kv_state || p.has_clusters())
      call.for_each_unit(range, 1, 0, [&](int64_t b, int64_t kv, int64_t, void*) { kernel.backward_scan(p, b, kv); });
    const int64_t chunks = ceil_div(p.k_tokens, kChunk);
    call.for_each_unit(range, chunks, kernel.backward_keys(p, 0, 0, 0, nullptr, nullptr),
                       [&](int64_t b, int64_t kv, int64_t chunk, void* scratch) {
                         kernel.backward_keys(p, b, kv, chunk, scratch, call.zero_row.data());
                       });
    if (!p.has_clusters()) return;
    call.for_each_unit(range, 1, 0,
                       [&](int64_t b, int64_t kv, int64_t, void*) { kernel.share_representatives(p, b, kv); });
    call.for_each_unit(range, chunks, 0, [&](int64_t b, int64_t kv, int64_t chunk, void*) {
      kernel.cluster_key_gradients(p, b, kv, chunk);
    });
  }

  const AttentionArguments args;
  const Tensor out, d_out, lse;
  const MaybeTensor d_lse;
  AttentionCall<E> call;
  AttentionParams& p;
  SecondPass<T> second_pass;
  const AttentionKernels& kernel = attention_kernels<E>();
  const Tensor dq, dk, dv, d_query_map, d_key_map, lse_values;
  MaybeTensor d_lse_values;
  const TensorRows query_weight, key_weight, dq_rows, dk_rows, dv_rows, out_rows, d_out_rows;
  std::unique_ptr<Scratch> dy, d_state, d_representatives;
};

}  // namespace

Gradients attention_backward(const AttentionArguments& a, const Tensor& out, const Tensor& lse, const Tensor& d_out,
                             const MaybeTensor& d_lse) {
  return with_row_element(a, [&](auto* element) {
    return Backward<std::remove_pointer_t<decltype(element)>>(a, out, lse, d_out, d_lse).run();
  });
}

}  // namespace sb::cpu

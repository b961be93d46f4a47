// Launcher of the forward pass: states, then units of queries in parallel, then those that are computed again.
#include "../profile.h"
#include "../tensor_traits.h"
#include "second_pass.h"
#include "launchers.h"

#include <limits>

namespace sb::cpu {
namespace {

template <class E>
class Forward {
  typedef AccType<E> T;

 public:
  // `is_whole`: ignored queries get zeros; otherwise their rows may hold anything.
  explicit Forward(const AttentionArguments& a, bool is_whole = true)
      : args(a),
        call(a),
        p(call.p),
        second_pass(p),
        out(empty_like_tokens(a.query, a.value.size(3), a.query.scalar_type())),
        lse(empty({p.batch, p.q_heads, p.q_tokens}, kScalar<T>)),
        scores(a.is_trained ? call.room_for_scores() : Tensor()),
        out_rows(result_rows<E>(out, p.value_pad, !is_whole || call.every_query())) {
    p.out = out_rows.rows, p.lse = lse.data_ptr();
    if (is_whole && !call.every_query())
      std::fill_n(static_cast<T*>(p.lse), lse.numel(), -std::numeric_limits<T>::infinity());
  }

  Results run() {
    compute();
    write_back<E>(out_rows, out);
    return {out, as_dtype(lse, accumulation_type(out)), call.saved_state(), scores};
  }

 private:
  template <class>
  friend class Forward;

  void compute() {
    call.take_states();
    const AttentionKernels& kernel = attention_kernels<E>();
    const int64_t group = p.q_heads / p.kv_heads, bytes = kernel.forward_unit(p, 0, 0, 0, nullptr, nullptr);
    call.for_each_head_range([&](const HeadRange& range) {
      call.build_states(range);
      const Stage stage("forward of queries");
      call.for_each_unit(range, group * p.units, bytes, [&](int64_t b, int64_t kv, int64_t at, void* scratch) {
        kernel.forward_unit(p, b, kv * group + at / p.units, at % p.units, scratch, call.zero_row.data());
      });
    });
    if (!second_pass.any()) return;
    call.for_each_head_range([&](const HeadRange& range) {
      const Stage stage("queries again by key");
      call.for_each_unit(range, group, bytes, [&](int64_t b, int64_t kv, int64_t of_group, void* scratch) {
        const int64_t h = kv * group + of_group;
        second_pass.by_key(b, h, [&](const AttentionParams& again) {
          for (int64_t unit = 0; unit < p.units; ++unit)
            kernel.forward_unit(again, b, h, unit, scratch, call.zero_row.data());
        });
      });
    });
    second_pass.in_double([&](int64_t b, int64_t h, const uint8_t* flags) {
      const Stage stage("queries again in double");
      Forward<double> again(one_head(args, b, h, flags), false);
      again.compute();
      const auto* again_lse = static_cast<const double*>(again.p.lse);
      for (int64_t i = 0; i < p.q_tokens; ++i) {
        if (!flags[i]) continue;
        const double* from = again.p.out.template at<const double>(0, 0, i);
        E* to = p.out.template at<E>(b, h, i);
        for (int64_t e = 0; e < p.value_pad; ++e) to[e] = narrowed<E>(from[e]);
        static_cast<T*>(p.lse)[(b * p.q_heads + h) * p.q_tokens + i] = T(again_lse[i]);
      }
    });
  }

  const AttentionArguments args;
  AttentionCall<E> call;
  AttentionParams& p;
  SecondPass<T> second_pass;
  const Tensor out, lse, scores;
  const TensorRows out_rows;
};

}  // namespace

Results attention(const AttentionArguments& a) {
  return with_row_element(a, [&](auto* element) { return Forward<std::remove_pointer_t<decltype(element)>>(a).run(); });
}

}  // namespace sb::cpu

// Launcher of the forward pass: states, then units of queries in parallel.
#include "../launchers.h"
#include "../profile.h"
#include "attention_call.h"

namespace sb::cpu {
namespace {

template <class T>
std::tuple<Tensor, Tensor> forward(const AttentionArguments& a) {
  AttentionCall<T> call(a);
  AttentionParams& p = call.p;
  Tensor out = empty_cpu({p.batch, p.q_heads, p.q_tokens, a.value.size(3)}, a.query.scalar_type());
  Tensor lse = empty_cpu({p.batch, p.q_heads, p.q_tokens}, kScalar<T>);
  const Operand out_rows = result_rows<T>(out, p.value_pad);
  p.out = out_rows.rows, p.lse = lse.data_ptr();
  std::fill_n(static_cast<T*>(lse.data_ptr()), lse.numel(), -std::numeric_limits<T>::infinity());
  call.build_states();

  const Stage stage("forward of queries");
  const Kernels<T>& kernel = kernels<T>();
  parallel_units(p.batch, p.q_heads, p.units, kernel.forward_unit(p, 0, 0, 0, nullptr, nullptr),
                 [&](int64_t b, int64_t h, int64_t unit, void* scratch) {
                   kernel.forward_unit(p, b, h, unit, scratch, call.zero_row.data());
                 });
  write_back<T>(out_rows, out);
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const AttentionArguments& a) {
  return a.query.scalar_type() == ScalarType::Double ? forward<double>(a) : forward<float>(a);
}

}  // namespace sb::cpu

// The tables of one instruction set's kernels; with SB_BFLOAT16 that of attention on rows of bfloat16 alone.
#pragma once
#include "attention_backward.h"
#include "attention_forward.h"
#include "cluster.h"
#include "cluster_state.h"
#include "convert.h"
#include "input_projection.h"
#include "kv_state.h"
#include "kv_state_backward.h"
#include "project.h"
#include "route_keys.h"
#include "route_per_query.h"
#include "route_pooled.h"
#include "route_sketch.h"

namespace sb::SB_ISA {

template <class E>
int64_t state_segment(const AttentionParams& p, int64_t b, int64_t kv, int64_t segment, void* scratch,
                      const void* zero_row) {
  return p.has_clusters() ? cluster_state_segment<E>(p, b, kv, segment, scratch)
                          : kv_state_segment<E>(p, b, kv, segment, scratch, zero_row);
}

template <class E>
constexpr AttentionKernels attention_table() {
  return {&chunk_weights<AccType<E>>,
          &key_weights<AccType<E>>,
          &kv_state_references<AccType<E>>,
          &state_segment<E>,
          &kv_state_scan<AccType<E>>,
          &forward_unit<E>,
          &backward_unit<E>,
          &backward_scan<AccType<E>>,
          &backward_keys<E>,
          &share_representatives<AccType<E>>,
          &cluster_key_gradients<AccType<E>>};
}

#if !defined(SB_BFLOAT16)
// Writes the lists of query group `group` of head (b, h), which must be cleared before. Returns the bytes of scratch it
// needs; without scratch it does nothing else.
inline int64_t route_group(const RouteParams& p, int64_t b, int64_t h, int64_t group, const float* panels,
                           void* scratch) {
  if (p.block_k == 1) {
    PooledScratch w(p, scratch);
    if (scratch) route_pooled(p, b, h, group, panels, w);
    return w.bytes;
  }
  if (p.has_sketches()) {
    SketchScratch w(p, scratch);
    if (scratch) route_by_sketch(p, b, h, group, panels, w);
    return w.bytes;
  }
  PerQueryScratch w(p, scratch);
  if (scratch)
    p.pools == 2 ? route_per_query<2>(p, b, h, group, panels, w) : route_per_query<1>(p, b, h, group, panels, w);
  return w.bytes;
}

template <class T>
constexpr ProjectKernels<T> project_table() {
  return {&project<T>, &project_backward<T>};
}
template <class T>
constexpr ClusterKernels cluster_table() {
  return {&cluster_head_bytes<T>, &cluster_queries<T>,         &cluster_centres<T>,
          &cluster_keys<T>,       &cluster_representatives<T>, &cluster_logs<T>};
}
template <class T>
constexpr InputProjectionKernels<T> input_projection_table() {
  return {&sum_tokens<T>, &sum_weighted_tokens<T>, &sampled_covariance<T>, &sampled_directions<T>};
}
constexpr InstructionSet instruction_set_named(const char* name) {
  return {name,
          attention_table<float>(),
          attention_table<double>(),
          project_table<float>(),
          project_table<double>(),
          {&route_keys, &route_group},
          cluster_table<float>(),
          cluster_table<double>(),
          input_projection_table<float>(),
          input_projection_table<double>(),
          convert_bfloat16(),
          convert_float16()};
}
#endif

}  // namespace sb::SB_ISA

// Every kernel, for the instruction set of the file that includes this. With SB_BFLOAT16 those on rows of bfloat16,
// else all others.
#include "vec.h"
#include "convert.h"
#include "element_types.h"
#include "gemm.h"
#include "features.h"
#include "gathered_rows.h"
#include "key_list.h"
#include "query_tile.h"
#include "scores.h"
#include "key_list_bitmask.h"
#include "kv_state.h"
#include "complement_by_key.h"
#include "attention_forward.h"
#include "dkdv_scatter_shared.h"
#include "dkdv_scatter_per_query.h"
#include "key_list_backward.h"
#include "attention_backward.h"
#include "kv_state_backward.h"

template <class E>
constexpr AttentionKernels attention_table() {
  return {&state_references<SumOf<E>>, &state_segment<E>,        &state_scan<SumOf<E>>, &forward_unit<E>,
          &backward_unit<E>,           &backward_scan<SumOf<E>>, &backward_keys<E>};
}

#if !defined(SB_BFLOAT16)
#include "project.h"
#include "route.h"

template <class T>
constexpr ProjectKernels<T> project_table() {
  return {&project<T>, &project_backward<T>};
}
constexpr InstructionSet instruction_set_named(const char* name) {
  return {name,
          attention_table<float>(),
          attention_table<double>(),
          project_table<float>(),
          project_table<double>(),
          {&route_keys, &route_group},
          convert_table()};
}
#endif

// The tables of torch-free kernels. csrc/cpu/kernels/ is compiled once per instruction set (kernels_avx512.cpp,
// kernels_avx2.cpp, ...); the best set that the processor has is chosen at run time, or the one SCATTERBRAIN_ISA names.
#pragma once
#include "tuning.h"  // which the launchers use as well

namespace sb {

// One call of the backward pass on the queries of one unit.
struct BackwardTask {
  enum Stage {
    kMeasure,     // fills scratch_bytes and record_bytes
    kCountTiles,  // fills tiles
    kCompute,     // writes dq, dx and the states' gradient; scatters each tile at once, or keeps it in `records`
    kCountKeys,   // counts some of the records' keys in keys_of_chunk, by chunks of kChunk keys
    kScatter,     // adds kept records to dk, dv and dy for keys in [key_begin, key_end)
  } stage = kMeasure;
  int64_t b = 0, h = 0, unit = 0;
  bool keep = false;  // records: tiles * record_bytes
  int64_t key_begin = 0, key_end = 0;
  int64_t* keys_of_chunk = nullptr;
  void *scratch = nullptr, *records = nullptr;
  const void* zero_row = nullptr;
  int64_t scratch_bytes = 0, record_bytes = 0, tiles = 0;
};

// z = W t + bias for the rows of one head, and its gradients. The first `lanes` outputs, a multiple of 8, are
// vectorised; the remaining `dots`, too few to fill a vector, are dot products.
struct ProjectParams {
  int64_t tokens, head_dim, head_pad, outputs, outputs_pad, lanes, dots;
};
// W of one head: of_lanes (head_dim, lanes), and rows (dots, head_pad), which go to `columns`. offset (outputs_pad) is
// what every column starts with; last_factor multiplies the last output.
template <class T>
struct ProjectWeights {
  const T *of_lanes, *rows;
  const int32_t* columns;
  const T* offset;
  T last_factor;
  MapLimits<T> limits;  // of the outputs, and of the last
};

// What the keys of a chunk weigh in a state at most, |F(y)| 2^kappa: the log2 of the largest, their sum relative to it,
// and how many are not ignored.
struct ChunkWeights {
  double top, mass;
  int64_t count;
};

// Attention on rows of one element type. Kernels that take scratch return the bytes they need, and do nothing else
// where scratch is null.
struct AttentionKernels {
  int64_t (*chunk_weights)(const AttentionParams&, int64_t b, int64_t kv, int64_t first, void* scratch,
                           const void* zero_row, ChunkWeights& weights);
  // log2 of each key's weight, -1e30 for ignored ones. Returns whether any might be held, see held_keys.h.
  bool (*key_weights)(const AttentionParams&, int64_t b, int64_t kv, int64_t first, double in_state, void* scratch,
                      const void* zero_row, double* log);
  void (*kv_state_references)(const AttentionParams&, int64_t b, int64_t kv);
  int64_t (*kv_state_segment)(const AttentionParams&, int64_t b, int64_t kv, int64_t segment, void* scratch,
                              const void* zero_row);
  void (*kv_state_scan)(const AttentionParams&, int64_t b, int64_t kv);
  int64_t (*forward_unit)(const AttentionParams&, int64_t b, int64_t h, int64_t unit, void* scratch,
                          const void* zero_row);
  void (*backward_unit)(const AttentionParams&, BackwardTask&);
  void (*backward_scan)(const AttentionParams&, int64_t b, int64_t kv);
  int64_t (*backward_keys)(const AttentionParams&, int64_t b, int64_t kv, int64_t chunk, void* scratch,
                           const void* zero_row);
  // After backward_keys of all chunks, of the centroid kernel alone.
  void (*share_representatives)(const AttentionParams&, int64_t b, int64_t kv);
  void (*cluster_key_gradients)(const AttentionParams&, int64_t b, int64_t kv, int64_t chunk);
};
template <class T>
struct ProjectKernels {
  void (*project)(const ProjectParams&, const ProjectWeights<T>&, const T* tokens, int64_t row_stride, T* rows);
  void (*project_backward)(const ProjectParams&, const T* grad, const T* tokens, int64_t row_stride, const T* weight,
                           const T* zero_row, T* d_tokens, int64_t d_row_stride, T* d_weight, double* d_bias);
};

// Routing: the panels of kRouteSegment keys of one head, with scratch of key_scratch_floats, and the lists of one group
// of queries (which must be cleared before), whose scratch works as above.
struct RouteKernels {
  void (*keys)(const RouteParams&, int64_t b, int64_t kv, int64_t segment, float* panels, float* scratch,
               const float* zero_row);
  int64_t (*group)(const RouteParams&, int64_t b, int64_t h, int64_t group, const float* panels, void* scratch);
};

// Clustering, in the order of its stages; `head` is what they hand on for one head, head_bytes of it. Scratch works as
// above.
struct ClusterKernels {
  int64_t (*head_bytes)(const ClusterParams&);
  int64_t (*queries)(const ClusterParams&, int64_t b, int64_t kv, int64_t segment, void* head, void* scratch);
  int64_t (*centres)(const ClusterParams&, int64_t b, int64_t kv, void* head, void* scratch, const void* zero_row);
  void (*keys)(const ClusterParams&, int64_t b, int64_t kv, int64_t segment, void* head, const void* zero_row);
  void (*representatives)(const ClusterParams&, int64_t b, int64_t kv, void* head);
  void (*logs)(const ClusterParams&, int64_t b, int64_t kv, int64_t segment, void* head);
};

// Rows of tokens are `width` wide, head_dim padded. start (rank, width): where subspace iteration starts.
struct DirectionsParams {
  int64_t rank, head_dim, width;
  const double* start;
};
// Projections of Quadratic(statistics="input"), of one key/value head: kernels/input_projection.h says what each does.
template <class T>
struct InputProjectionKernels {
  void (*sum_tokens)(const T* rows, int64_t stride, const uint8_t* ignored, int64_t n, int64_t width, T* sum);
  void (*sum_weighted_tokens)(const T* rows, int64_t stride, const uint8_t* ignored, int64_t n, int64_t width,
                              const T* a, T* sum, T* top, T* mass);
  int64_t (*covariance)(const T* rows, int64_t n, int64_t width, double scale, const double* query_mean,
                        double* covariance, void* scratch);
  int64_t (*directions)(const DirectionsParams&, const T* query_mean, const T* key_mean, double* query_covariance,
                        double* key_covariance, float* pq, float* pk, void* scratch);
};

// Rows of bfloat16 and float16, as their bits, to float32 and back; null where the instruction set has no conversion.
struct HalfConversion {
  void (*widen)(const void* from, int64_t n, float* to) = nullptr;
  void (*narrow)(const float* from, int64_t n, void* to) = nullptr;
};

struct InstructionSet {
  const char* name;
  AttentionKernels f32, f64;
  ProjectKernels<float> project_f32;
  ProjectKernels<double> project_f64;
  RouteKernels route;
  ClusterKernels cluster_f32, cluster_f64;
  InputProjectionKernels<float> input_projection_f32;
  InputProjectionKernels<double> input_projection_f64;
  HalfConversion bfloat16, float16;
  const AttentionKernels* bf16 = nullptr;  // where bfloat16 has dot instructions
};

extern const InstructionSet kAvx512, kAvx2, kBaseline;
extern const AttentionKernels kAvx512Bf16;
const InstructionSet& instruction_set();

template <class E>
const AttentionKernels& attention_kernels() {
  if constexpr (sizeof(E) == sizeof(double)) return instruction_set().f64;
  if constexpr (sizeof(E) == sizeof(float)) return instruction_set().f32;
  return *instruction_set().bf16;
}
template <class T>
const ProjectKernels<T>& project_kernels() {
  if constexpr (sizeof(T) == sizeof(double))
    return instruction_set().project_f64;
  else
    return instruction_set().project_f32;
}
template <class T>
const InputProjectionKernels<T>& input_projection_kernels() {
  if constexpr (sizeof(T) == sizeof(double))
    return instruction_set().input_projection_f64;
  else
    return instruction_set().input_projection_f32;
}
template <class T>
const ClusterKernels& cluster_kernels() {
  return sizeof(T) == sizeof(double) ? instruction_set().cluster_f64 : instruction_set().cluster_f32;
}

}  // namespace sb

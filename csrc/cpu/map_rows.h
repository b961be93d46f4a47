// Coordinates and log scales of the low-rank kernel as kernels read them: for the quadratic kernel both are columns of
// packed rows (packed_width); general features are rows, and their log scales an array of their own, in base 2.
#pragma once
#include "tensor_rows.h"

namespace sb::cpu {

struct MapRows {
  MaybeTensor storage, log_storage;  // keep the rows alive
  StridedTensor coordinates, log_scales;
};

enum class MapKind { kMap, kPacked, kFeatures };

// `wide_logs`: multiply log scales by log2(e) in T, which is wider than the map, not in the map's type.
// `lowers_weightless`: a token whose general features are all zero, which weighs nothing, gets the lowest log scale: it
// may not be what the other tokens of a state, or a row's stabiliser, are counted from.
template <class T>
MapRows as_map(const Tensor& map, MapKind kind, int64_t rank, bool wide_logs, bool lowers_weightless);

// r, or the number of general features or of clusters; 0 without a low-rank kernel.
template <class Arguments>
int64_t rank_of(const Arguments& a) {
  if constexpr (requires { a.representatives; })
    if (a.representatives) return a.representatives->size(2);
  return !a.query_map ? 0 : a.packed_rank ? a.packed_rank : a.query_map->size(3) - 1;
}

// The maps of queries and keys. Holds what the parameters of a kernel point at. `pools_queries`: log scales of queries
// are averaged, so that those of queries without features have to stay.
struct Maps {
  template <class T, class Arguments, class Params>
  void set(const Arguments& a, Params& p, bool wide_logs, bool pools_queries) {
    const MapKind kind = a.low_rank == int64_t(LowRank::kFeatures) ? MapKind::kFeatures
                         : a.packed_rank                           ? MapKind::kPacked
                                                                   : MapKind::kMap;
    x = as_map<T>(*a.query_map, kind, p.rank, wide_logs, !pools_queries);
    y = as_map<T>(*a.key_map, kind, p.rank, wide_logs, true);
    p.x = x.coordinates, p.y = y.coordinates, p.rho = x.log_scales, p.kappa = y.log_scales;
  }
  MapRows x, y;
};

}  // namespace sb::cpu

#include "map_rows.h"

#include "../profile.h"

namespace sb::cpu {

template <class T>
MapRows as_map(const Tensor& map, MapKind kind, int64_t rank, bool wide_logs, bool lowers_weightless) {
  const bool packed = kind == MapKind::kPacked, features = kind == MapKind::kFeatures;
  const MapLimits<T> limits = map_limits<T>(features ? LowRank::kFeatures : LowRank::kQuadratic);
  const auto within = [](T x, T limit) { return x > limit ? limit : x < -limit ? -limit : x; };  // NaN stays NaN
  if (packed && is_in_form<T>(map, packed_width(rank))) {
    StridedTensor logs = rows_of(map);
    logs.data = logs.at<T>(0, 0, 0) + rank + 1;
    return {map, map, rows_of(map), logs};
  }
  const Stage stage("conversion of coordinates");
  const int64_t step = map.stride(3), width = features ? pad_to(rank, kPad) : packed_width(rank);
  Tensor rows = empty({map.size(0), map.size(1), map.size(2), width}, kScalar<T>);
  Tensor logs = features ? empty({map.size(0), map.size(1), map.size(2), 1}, kScalar<T>) : rows;
  const StridedTensor from = rows_of(map), to = rows_of(rows);
  StridedTensor log_to = rows_of(logs);
  if (!features) log_to.data = to.at<T>(0, 0, 0) + rank + 1;
  with_element(map.scalar_type(), [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    for_each_row(map, width * int64_t(sizeof(T)), [&](int64_t b, int64_t h, int64_t i) {
      const E* source = from.at<const E>(b, h, i);
      T* target = to.at<T>(b, h, i);
      for (int64_t e = 0; e < rank; ++e) target[e] = within(static_cast<T>(source[e * step]), limits.coordinate);
      bool has_weight = !(features && lowers_weightless);
      for (int64_t e = 0; e < rank; ++e) has_weight |= target[e] != T(0);
      for (int64_t e = rank; e < width; ++e) target[e] = T(0);
      if (!features) target[rank] = T(1);
      const T log = packed      ? static_cast<T>(source[(rank + 1) * step])
                    : wide_logs ? static_cast<T>(source[rank * step]) * T(kLog2e)
                                : static_cast<T>(source[rank * step] * static_cast<E>(kLog2e));
      *log_to.at<T>(b, h, i) = has_weight || log != log ? within(log, limits.log) : -limits.log;
    });
  });
  return {rows, logs, to, log_to};
}

template MapRows as_map<float>(const Tensor&, MapKind, int64_t, bool, bool);
template MapRows as_map<double>(const Tensor&, MapKind, int64_t, bool, bool);

}  // namespace sb::cpu

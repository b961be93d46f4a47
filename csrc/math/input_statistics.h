// What defines the projections of Quadratic(statistics="input") (docs/algorithm.md, section 2); the composition of
// torch's operations in low_rank/input_statistics.py and the reference implementation have the same.
#pragma once
#include "clustering.h"

namespace sb {

inline constexpr int64_t kCovarianceSamples = 256;  // tokens of a head that covariances are taken from
inline constexpr int kIterations = 3;               // steps of subspace iteration
inline constexpr double kCovarianceFloor = 1e-4;    // added to covariances whose eigenvalues have a mean of 1
// Tokens whose variance is no more than this of their mean square are equal up to rounding.
inline constexpr double kNoVariance = 1e-13;

}  // namespace sb

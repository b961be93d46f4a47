// Exponents are kept in base 2 inside the kernels, where exp2 is cheaper than exp.
#pragma once

namespace sb {

inline constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

}  // namespace sb

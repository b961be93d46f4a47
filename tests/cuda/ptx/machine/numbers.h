// The formats of numbers that PTX has: how they are read, rounded and compared.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "program.h"

namespace ptx {

struct F16 {
  uint16_t bits;
};
struct B16 {
  uint16_t bits;
};

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline double wide(F16 v) {
  const int sign = v.bits >> 15, exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  double size;
  if (exponent == 31)
    size = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  else if (exponent == 0)
    size = fraction * 0x1p-24;
  else
    size = same_bits<double>(uint64_t(exponent - 15 + 1023) << 52 | uint64_t(fraction) << 42);
  return sign ? -size : size;
}
inline double wide(B16 v) { return double(same_bits<float>(uint32_t(v.bits) << 16)); }

// `v` rounded to a format of `digits` binary digits, with normal numbers from 2^lowest on and below 2^(top + 1).
inline double rounded(double v, int digits, int lowest, int top, int32_t mode) {
  if (!std::isfinite(v) || v == 0) return v;
  const int exponent = std::max(std::ilogb(v), lowest) - (digits - 1);
  const double scaled = std::ldexp(v, -exponent);
  double whole = std::trunc(scaled);
  const double rest = std::fabs(scaled - whole), away = v > 0 ? 1 : -1;
  const bool is_odd = std::fmod(whole, 2) != 0;
  if (mode == md::rn ? rest > 0.5 || (rest == 0.5 && is_odd)
                     : rest > 0 && ((mode == md::rp && v > 0) || (mode == md::rm && v < 0)))
    whole += away;
  const double result = std::ldexp(whole, exponent);
  if (result == 0) return std::copysign(0.0, v);
  if (std::ilogb(result) <= top) return result;
  const bool is_infinite = mode == md::rn || (mode == md::rp && v > 0) || (mode == md::rm && v < 0);
  const double largest = std::ldexp(2 - std::ldexp(1, 1 - digits), top);
  return std::copysign(is_infinite ? std::numeric_limits<double>::infinity() : largest, v);
}
inline F16 half_of(double v, int32_t mode) {
  if (std::isnan(v)) return {0x7fff};
  v = rounded(v, 11, -14, 15, mode);
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  v = std::fabs(v);
  if (std::isinf(v)) return {uint16_t(sign | 0x7c00)};
  if (v < std::ldexp(1, -14)) return {uint16_t(sign | int(std::ldexp(v, 24)))};
  const int exponent = std::ilogb(v);
  return {uint16_t(sign | (exponent + 15) << 10 | (int(std::ldexp(v, 10 - exponent)) - 1024))};
}
inline B16 bfloat_of(double v, int32_t mode) {
  if (std::isnan(v)) return {0x7fff};
  return {uint16_t(same_bits<uint32_t>(float(rounded(v, 8, -126, 127, mode))) >> 16)};
}
inline float float_of(double v, int32_t mode) {
  return std::isnan(v) ? same_bits<float>(0x7fffffffu) : float(rounded(v, 24, -126, 127, mode));
}
inline double whole_number(double v, int32_t mode) {
  switch (mode) {
    case md::rni: return std::nearbyint(v);
    case md::rzi: return std::trunc(v);
    case md::rmi: return std::floor(v);
    default: return std::ceil(v);
  }
}
inline float flushed(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }

template <class T>
constexpr bool is_float = std::is_floating_point_v<T>;
template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T, bool = is_float<T>>
struct Twice;
template <class T>
struct Twice<T, false> {
  using type = std::conditional_t<
      sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
      std::conditional_t<
          std::is_signed_v<T>,
          std::conditional_t<sizeof(T) == 4, int64_t, std::conditional_t<sizeof(T) == 2, int32_t, int16_t>>,
          std::conditional_t<sizeof(T) == 4, uint64_t, std::conditional_t<sizeof(T) == 2, uint32_t, uint16_t>>>>;
};

// Calls visit with a zero of the type.
template <class Visit>
void with_integer(int32_t type, const Visit& visit) {
  switch (type) {
    case ty::u8: return visit(uint8_t());
    case ty::u16: return visit(uint16_t());
    case ty::u32: return visit(uint32_t());
    case ty::u64: return visit(uint64_t());
    case ty::s8: return visit(int8_t());
    case ty::s16: return visit(int16_t());
    case ty::s32: return visit(int32_t());
    case ty::s64: return visit(int64_t());
    default: throw Fault{"unknown instruction", "the machine has it for integers alone", 0};
  }
}
template <class Visit>
void with_float(int32_t type, const Visit& visit) {
  switch (type) {
    case ty::f32: return visit(float());
    case ty::f64: return visit(double());
    default: throw Fault{"unknown instruction", "the machine has it for f32 and f64 alone", 0};
  }
}
template <class Visit>
void with_number(int32_t type, const Visit& visit) {
  type == ty::f32 || type == ty::f64 ? with_float(type, visit) : with_integer(type, visit);
}
inline int size_of(int32_t type) {
  switch (type) {
    case ty::pred:
    case ty::u8:
    case ty::s8: return 1;
    case ty::u16:
    case ty::s16:
    case ty::f16:
    case ty::bf16: return 2;
    case ty::u32:
    case ty::s32:
    case ty::f32: return 4;
    default: return 8;
  }
}

template <class T>
bool compared(int32_t mode, T a, T b) {
  bool is_nan = false;
  if constexpr (is_float<T>) is_nan = std::isnan(a) || std::isnan(b);
  switch (mode) {
    case md::eq: return !is_nan && a == b;
    case md::ne: return !is_nan && a != b;
    case md::lt: return !is_nan && a < b;
    case md::le: return !is_nan && a <= b;
    case md::gt: return !is_nan && a > b;
    case md::ge: return !is_nan && a >= b;
    case md::equ: return is_nan || a == b;
    case md::neu: return is_nan || a != b;
    case md::ltu: return is_nan || a < b;
    case md::leu: return is_nan || a <= b;
    case md::gtu: return is_nan || a > b;
    case md::geu: return is_nan || a >= b;
    case md::num: return !is_nan;
    default: return is_nan;
  }
}

}  // namespace ptx

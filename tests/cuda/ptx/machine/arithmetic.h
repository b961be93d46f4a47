// Instructions that every lane executes for itself, on its registers.
#pragma once
#include "lanes.h"

namespace ptx {

class Arithmetic : public Lanes {
 public:
  using Lanes::Lanes;

 protected:
  template <class T, class F>
  void unary(uint32_t lanes, const F& f) {
    each(lanes, [&](int lane) { out<T>(lane, T(f(in<T>(0, lane)))); });
  }
  template <class T, class F>
  void binary(uint32_t lanes, const F& f) {
    each(lanes, [&](int lane) { out<T>(lane, T(f(in<T>(0, lane), in<T>(1, lane)))); });
  }
  template <class F>
  void integers(uint32_t lanes, const F& f) {
    with_integer(i->type, [&](auto zero) { binary<decltype(zero)>(lanes, f); });
  }
  template <class F>
  void floats(uint32_t lanes, const F& f) {
    with_float(i->type, [&](auto zero) { unary<decltype(zero)>(lanes, f); });
  }
  // Bits, or truth values.
  template <class F>
  void bits(uint32_t lanes, const F& f) {
    each(lanes, [&](int lane) {
      const uint64_t v = f(get<uint64_t>(0, lane), i->operands > 1 ? get<uint64_t>(1, lane) : 0);
      put(0, lane,
          i->type == ty::pred     ? v & 1
          : size_of(i->type) == 8 ? v
                                  : v & ((uint64_t(1) << 8 * size_of(i->type)) - 1));
    });
  }

  template <class T>
  T quotient(T a, T b, int lane, bool is_rest) {
    if constexpr (is_float<T>) {
      return is_rest ? std::fmod(a, b) : a / b;
    } else {
      if (b == 0) throw Fault{"division by zero", "of whole numbers", lane};
      if constexpr (std::is_signed_v<T>)
        if (b == -1) return is_rest ? T(0) : T(Unsigned<T>(0) - Unsigned<T>(a));
      return is_rest ? T(a % b) : T(a / b);
    }
  }

  template <class T>
  void arithmetic(uint32_t lanes) {
    using U = typename std::conditional_t<is_float<T>, std::type_identity<T>, std::make_unsigned<T>>::type;
    switch (i->operation) {
      case op::add: return binary<T>(lanes, [](T a, T b) { return T(U(a) + U(b)); });
      case op::sub: return binary<T>(lanes, [](T a, T b) { return T(U(a) - U(b)); });
      case op::mul:
        return binary<T>(lanes, [](T a, T b) {
          if constexpr (is_float<T>)
            return a * b;
          else
            return T(uint64_t(a) * uint64_t(b));
        });
      case op::div:
      case op::rem:
        return each(lanes, [&](int lane) {
          out<T>(lane, quotient<T>(in<T>(0, lane), in<T>(1, lane), lane, i->operation == op::rem));
        });
      case op::min:
      case op::max: {
        const bool is_max = i->operation == op::max;
        return binary<T>(lanes, [&](T a, T b) {
          if constexpr (is_float<T>) {
            if (std::isnan(a) || std::isnan(b)) {
              if (flag(kKeepNan) || (std::isnan(a) && std::isnan(b))) return std::numeric_limits<T>::quiet_NaN();
              return std::isnan(a) ? b : a;
            }
            if (a == b) return std::signbit(a) == is_max ? b : a;  // -0 < 0
          }
          return is_max ? std::max(a, b) : std::min(a, b);
        });
      }
      case op::abs:
        return unary<T>(lanes, [](T a) {
          if constexpr (is_float<T>)
            return std::fabs(a);
          else
            return a < 0 ? T(U(0) - U(a)) : a;
        });
      case op::neg:
        return unary<T>(lanes, [](T a) {
          if constexpr (is_float<T>)
            return -a;
          else
            return T(U(0) - U(a));
        });
      default: break;
    }
  }
  template <class T>
  void wide_arithmetic(uint32_t lanes) {
    using W = typename Twice<T>::type;
    each(lanes, [&](int lane) {
      const W product = W(W(get<T>(0, lane)) * W(get<T>(1, lane)));
      switch (i->operation) {
        case op::mul_hi: return put(0, lane, T(product >> (8 * sizeof(T))));
        case op::mad: return put(0, lane, T(uint64_t(product) + uint64_t(get<T>(2, lane))));
        case op::mad_hi: return put(0, lane, T(uint64_t(product >> (8 * sizeof(T))) + uint64_t(get<T>(2, lane))));
        default: break;
      }
      if constexpr (sizeof(T) < 8) {
        if (i->operation == op::mul_wide) return put(0, lane, product);
        return put(0, lane, W(Unsigned<W>(product) + Unsigned<W>(get<W>(2, lane))));
      }
    });
  }
  template <class T>
  void shift(uint32_t lanes) {
    each(lanes, [&](int lane) {
      const T v = get<T>(0, lane);
      const uint32_t by = get<uint32_t>(1, lane), width = 8 * sizeof(T);
      T result;
      if (i->operation == op::shl)
        result = by >= width ? T(0) : T(Unsigned<T>(v) << by);
      else
        result = T(v >> std::min(by, width - 1));
      if (i->operation == op::shr && by >= width && !std::is_signed_v<T>) result = 0;
      put(0, lane, result);
    });
  }
  template <class T>
  void bit_field(uint32_t lanes) {
    constexpr int width = 8 * sizeof(T);
    using U = Unsigned<T>;
    each(lanes, [&](int lane) {
      if (i->operation == op::bfe) {
        const U v = get<U>(0, lane);
        const int first = int(get<uint32_t>(1, lane) & 255), count = int(get<uint32_t>(2, lane) & 255);
        const int sign_at = std::min(first + count - 1, width - 1);
        const U fill = std::is_signed_v<T> && count > 0 && (v >> sign_at & 1) ? ~U(0) : U(0);
        U field = first >= width ? fill : U(v >> first);
        const int held = std::min(count, std::max(0, width - first));
        if (held < width) field = U((field & ((U(1) << held) - 1)) | U(fill << held));
        put(0, lane, field);
      } else {
        const U v = get<U>(0, lane), into = get<U>(1, lane);
        const int first = int(get<uint32_t>(2, lane) & 255), count = int(get<uint32_t>(3, lane) & 255);
        U result = into;
        for (int k = 0; k < count && first + k < width && k < width; ++k)
          result = U((result & ~(U(1) << (first + k))) | U((v >> k & 1) << (first + k)));
        put(0, lane, result);
      }
    });
  }

  template <class T>
  void convert_to(uint32_t lanes) {  // from T
    each(lanes, [&](int lane) {
      if constexpr (std::is_integral_v<T>) {
        convert_integer(lane, get<T>(0, lane));
      } else if constexpr (is_float<T>) {
        convert_float(lane, double(in<T>(0, lane)));
      } else {
        convert_float(lane, wide(get<T>(0, lane)));
      }
    });
  }
  template <class T>
  void convert_integer(int lane, T v) {
    switch (i->type) {
      case ty::f32:
      case ty::f64: {
        const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
        std::fesetround(modes[i->mode - md::rn]);
        volatile T given = v;  // what is known is converted by the compiler, to nearest
        if (i->type == ty::f32) {
          volatile float result = float(given);
          put(0, lane, float(result));
        } else {
          volatile double result = double(given);
          put(0, lane, double(result));
        }
        std::fesetround(FE_TONEAREST);
        return;
      }
      case ty::f16: return put(0, lane, half_of(double(v), i->mode).bits);
      case ty::bf16: return put(0, lane, bfloat_of(double(v), i->mode).bits);
      default: break;
    }
    with_integer(i->type, [&](auto zero) {
      using To = decltype(zero);
      if (flag(kSaturate)) {
        const __int128 value = v, low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
        return put(0, lane, To(value < low ? low : value > high ? high : value));
      }
      put(0, lane, To(v));
    });
  }
  void convert_float(int lane, double v) {
    const bool is_whole = i->mode >= md::rni && i->mode <= md::rpi;
    switch (i->type) {
      case ty::f64: return out<double>(lane, is_whole ? whole_number(v, i->mode) : v);
      case ty::f32: {
        if (is_whole) return out<float>(lane, float(whole_number(v, i->mode)));
        return out<float>(lane, float_of(v, i->mode == md::none ? int32_t(md::rn) : i->mode));
      }
      case ty::f16: return put(0, lane, half_of(flag(kSaturate) ? saturated(v) : v, i->mode).bits);
      case ty::bf16: return put(0, lane, bfloat_of(flag(kSaturate) ? saturated(v) : v, i->mode).bits);
      default: break;
    }
    with_integer(i->type, [&](auto zero) {
      using To = decltype(zero);
      const double whole = whole_number(v, i->mode), low = double(std::numeric_limits<To>::min()),
                   above = std::ldexp(1, 8 * int(sizeof(To)) - int(std::is_signed_v<To>));
      if (std::isnan(v)) return put(0, lane, sizeof(To) == 8 ? To(Unsigned<To>(1) << 63) : To(0));
      put(0, lane,
          whole < low      ? std::numeric_limits<To>::min()
          : whole >= above ? std::numeric_limits<To>::max()
                           : To(whole));
    });
  }
  static double saturated(double v) { return v >= 0 ? std::min(v, 1.0) : 0.0; }
};

}  // namespace ptx

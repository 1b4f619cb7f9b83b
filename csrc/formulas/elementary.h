// SPDX-License-Identifier: Apache-2.0
// Elementary functions as fixed sequences of IEEE-754 operations: the same bits from every compiler and device.
//
// They use + - * fma, integer operations, comparisons, rcp_in_range and sqrt_in_range, and no libm. Every function is
// branch-free, so that a loop over it vectorises, and passes NaN through. The polynomials come from tools/minimax.py.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define AEVB_FORMULA __host__ __device__ __forceinline__
#define AEVB_UNROLL _Pragma("unroll")
#else
#define AEVB_FORMULA inline __attribute__((always_inline))
#define AEVB_UNROLL
#endif

// The formulas are compiled once for every instruction set. The unnamed namespace keeps the linker from folding these
// copies into one.
namespace aevb {
namespace {

AEVB_FORMULA uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
#endif
}

AEVB_FORMULA float float_of(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
#endif
}

// a * b + c, rounded once.
AEVB_FORMULA float fmadd(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// 1 / x, correctly rounded, for 2^-60 <= x <= 2^60. On a GPU, this function and sqrt_in_range are the instructions of
// nvcc's own division and square root. They lack nvcc's branch to a slow path, which other operands need.
AEVB_FORMULA float rcp_in_range(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmadd(y, fmadd(-x, y, 1.0f), y);
#else
  return 1.0f / x;
#endif
}

// sqrt(x), correctly rounded, for 2^-60 <= x <= 2^60.
AEVB_FORMULA float sqrt_in_range(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float root = x * y;
  return fmadd(fmadd(-root, root, x), 0.5f * y, root);
#else
  return __builtin_sqrtf(x);
#endif
}

// The smaller of x and a bound (at_most), and the larger (at_least). NaN where x is NaN.
AEVB_FORMULA float at_most(float x, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
#else
  return x > bound ? bound : x;
#endif
}

AEVB_FORMULA float at_least(float x, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
#else
  return x < bound ? bound : x;
#endif
}

AEVB_FORMULA float abs_of(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

AEVB_FORMULA float infinity() { return float_of(0x7f800000u); }
AEVB_FORMULA float quiet_nan() { return float_of(0x7fc00000u); }

// ---- exponentials ---------------------------------------------------------------------------------------------------

// Reduction of e^x for |x| <= 110: x = n ln 2 + r with |r| <= ln(2) / 2, and e^r = 1 + r + r^2 q(r). For NaN, r is NaN
// and n arbitrary.
struct ExpReduction {
  uint32_t n_bits;  // 0x4b400000 + n: the low 23 bits hold n in two's complement
  float r, q;
};

AEVB_FORMULA ExpReduction reduce_exp(float x) {
  const float shifted = fmadd(x, 1.44269504f, 12582912.0f);  // adding 1.5 * 2^23 rounds x / ln 2 to an integer
  const float n = shifted - 12582912.0f;
  float r = fmadd(n, -0.693145752f, x);  // ln 2 in two pieces; n times the first is exact
  r = fmadd(n, -1.42860677e-6f, r);
  float q = 0x1.6c8654p-10f;
  q = fmadd(q, r, 0x1.1209b8p-7f);
  q = fmadd(q, r, 0x1.55558ap-5f);
  q = fmadd(q, r, 0x1.5554e0p-3f);
  q = fmadd(q, r, 0.5f);
  return {bits_of(shifted), r, q};
}

// 2^n for n in [-150, 128], as two factors, since the ends are not floats. Multiplied one after the other, they round a
// product only once.
struct PowerOf2 {
  float first, second;
};

AEVB_FORMULA float pow2(uint32_t n) { return float_of((n + 127u) << 23); }  // n in [-126, 127], two's complement

// 2^n for n in [-126, 127], from n_bits of ExpReduction.
AEVB_FORMULA float pow2_of(uint32_t n_bits) { return float_of((n_bits << 23) + (127u << 23)); }

AEVB_FORMULA PowerOf2 power_of_2(uint32_t n_bits) {
  const uint32_t n = n_bits - 0x4b400000u;
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(n) >> 1);
  return {pow2(half), pow2(n - half)};
}

// e^x, for every float.
AEVB_FORMULA float exp_of(float x) {
  const ExpReduction e = reduce_exp(at_least(at_most(x, 89.0f), -104.0f));
  const PowerOf2 s = power_of_2(e.n_bits);
  return fmadd(fmadd(e.q, e.r, 1.0f), e.r, 1.0f) * s.first * s.second;
}

// e^-a for a >= 0 (or NaN). It is cheaper than exp_of, since only one end can leave the range of float.
AEVB_FORMULA float exp_minus(float a) {
  const ExpReduction e = reduce_exp(-at_most(a, 104.0f));
  const float scale = float_of((e.n_bits << 23) + (191u << 23));  // 2^(n + 64); the shift drops the constant in n_bits
  return fmadd(fmadd(e.q, e.r, 1.0f), e.r, 1.0f) * scale * 0x1p-64f;
}

// Arguments that a function accepts: every float, or a moderate range for which the function is shorter. The bits are
// the same.
enum class Range { any, moderate };
template <Range kRange>
struct RangeConstant {
  static constexpr Range value = kRange;
};

// e^x, e^x - 1 and e^x - 1 - x. The differences have full relative accuracy, however small they are. Range::moderate is
// for |x| <= 22.
struct ExpDifferences {
  float exp, expm1, expm1_minus_x;
};

template <Range kRange = Range::any>
AEVB_FORMULA ExpDifferences exp_differences(float x) {
  constexpr bool kAny = kRange == Range::any;
  const ExpReduction e = reduce_exp(kAny ? at_least(at_most(x, 89.0f), -104.0f) : x);
  const PowerOf2 power = kAny ? power_of_2(e.n_bits) : PowerOf2{pow2_of(e.n_bits), 1.0f};
  const float s = power.first * power.second, t = s - 1.0f;
  const float w = e.q * (e.r * e.r);
  const float expm1_r = e.r + w;
  const float exp = (1.0f + expm1_r) * power.first * power.second;
  // e^x - 1 = s (e^r - 1) + (s - 1), and e^x - 1 - x = s w + (s r + (s - 1) - x). Where n = 0, r is x, and the bracket
  // is 0.
  const float expm1 = fmadd(expm1_r, s, t), expm1_minus_x = fmadd(w, s, fmadd(e.r, s, t) - x);
  if constexpr (!kAny) return {exp, expm1, expm1_minus_x};
  const bool large = x > 22.0f;  // -1 and -x are lost in rounding, and inf - inf is avoided
  return {exp, large ? exp : expm1, large ? exp : expm1_minus_x};
}

// tanh x = -m / (2 + m) with m = e^(-2 |x|) - 1, for every float.
AEVB_FORMULA float tanh_of(float x) {
  const float a = at_most(abs_of(x), 20.0f);  // beyond 9.02 tanh is 1
  const ExpReduction e = reduce_exp(-2.0f * a);
  const float s = pow2_of(e.n_bits);
  const float m = fmadd(fmadd(e.q, e.r * e.r, e.r), s, s - 1.0f);
  const float t = m * rcp_in_range(2.0f + m);
  return float_of((bits_of(t) & 0x7fffffffu) | (bits_of(x) & 0x80000000u));
}

// ---- logarithms -----------------------------------------------------------------------------------------------------

// log(2^n (1 + f)) for integral n and 1 + f in [sqrt(1/2), sqrt(2)).
AEVB_FORMULA float log_of_parts(float n, float f) {
  float p = -0x1.38c910p-4f;
  p = fmadd(p, f, 0x1.055e62p-3f);
  p = fmadd(p, f, -0x1.0d8232p-3f);
  p = fmadd(p, f, 0x1.22d936p-3f);
  p = fmadd(p, f, -0x1.54728cp-3f);
  p = fmadd(p, f, 0x1.99a01cp-3f);
  p = fmadd(p, f, -0x1.000226p-2f);
  p = fmadd(p, f, 0x1.555554p-2f);
  const float f2 = f * f;
  float tail = fmadd(p * f, f2, n * -2.12194440e-4f);  // ln 2 = 0.693359375 - 2.1219444e-4
  tail = fmadd(f2, -0.5f, tail);
  return fmadd(n, 0.693359375f, f + tail);
}

// The exponent n and the mantissa m of positive normal x = 2^n m, with m in [sqrt(1/2), sqrt(2)).
AEVB_FORMULA int32_t log_exponent(float x) { return static_cast<int32_t>(bits_of(x) - 0x3f3504f3u) >> 23; }
AEVB_FORMULA float log_mantissa(float x, int32_t n) { return float_of(bits_of(x) - (static_cast<uint32_t>(n) << 23)); }

// log x for positive normal x.
AEVB_FORMULA float log_normal(float x) {
  const int32_t n = log_exponent(x);
  return log_of_parts(static_cast<float>(n), log_mantissa(x, n) - 1.0f);
}

// log x, for every float: -inf at 0, NaN below.
AEVB_FORMULA float log_of(float x) {
  const bool subnormal = x < 0x1p-126f;
  const float y = log_normal(subnormal ? x * 0x1p24f : x);
  const float finite = subnormal ? y - 16.6355323f : y;  // 24 ln 2
  const float at_edge = x == 0.0f ? -infinity() : (x < 0.0f ? quiet_nan() : x);
  return x > 0.0f && x < infinity() ? finite : at_edge;
}

// log(1 + s) for 0 <= s <= 2^60 (or NaN), to full relative accuracy.
AEVB_FORMULA float log1p_nonnegative(float s) {
  const float u = 1.0f + s;
  const float lost = s < 1.0f ? s - (u - 1.0f) : 1.0f - (u - s);  // the rounding error of u, exactly
  const float y = fmadd(lost, rcp_in_range(u), log_normal(u));
  return s == s ? y : s;
}

// log(1 - p) for 0 <= p <= 1, to full relative accuracy: -inf at 1, NaN where p is outside [0, 1] or NaN.
AEVB_FORMULA float log_one_minus(float p) {
  const float u = 1.0f - p;
  const float lost = (1.0f - u) - p;
  const float y = fmadd(lost, rcp_in_range(u), log_normal(u));
  const float at_edge = p == 1.0f ? -infinity() : quiet_nan();
  return p >= 0.0f && p < 1.0f ? y : at_edge;
}

}  // namespace
}  // namespace aevb

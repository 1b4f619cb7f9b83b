// SPDX-License-Identifier: Apache-2.0
// Conversion of bfloat16 and float16 to float and back, by integer arithmetic: the same bits from every instruction
// set, whatever conversions it has. Rounding is to nearest even, and a NaN stays a NaN. (A GPU's own conversions give
// the same.)
#pragma once
#include "elementary.h"

namespace aevb {
namespace {

AEVB_FORMULA float from_bfloat16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

AEVB_FORMULA uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

AEVB_FORMULA float from_float16(uint16_t h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);  // exact, subnormal halves included
  const uint32_t u = magnitude >= (0x1fu << 23) ? (magnitude | 0x7f800000u) : finite;
  return float_of(u | (static_cast<uint32_t>(h & 0x8000u) << 16));
#endif
}

AEVB_FORMULA uint16_t to_float16(float x) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds to 2^-24
  uint32_t h = magnitude < (113u << 23) ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // 65520 and above round to inf
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(h | ((u >> 16) & 0x8000u));
}

}  // namespace
}  // namespace aevb

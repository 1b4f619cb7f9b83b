// SPDX-License-Identifier: Apache-2.0
// Noise as a function: eps = normal(seed, element), by Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
//
// Element i of a seed's block is output i % 4 of counter i / 4 under the key `seed`.
#pragma once
#include "elementary.h"

namespace aevb {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr int kPhiloxRounds = 10;

// The third word of a counter, which says what its block is for. So no block serves twice, whatever seeds a caller
// gives.
constexpr uint32_t kForNormals = 0u, kForSeeds = 1u, kForPixels = 2u;

struct Philox {
  uint32_t word[4];
};

// The keys of the rounds, which all counters of a seed share.
struct PhiloxKeys {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
};

AEVB_FORMULA PhiloxKeys philox_keys(uint32_t key0, uint32_t key1) {
  PhiloxKeys keys;
  AEVB_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.key0[round] = key0 + static_cast<uint32_t>(round) * kPhiloxW0;
    keys.key1[round] = key1 + static_cast<uint32_t>(round) * kPhiloxW1;
  }
  return keys;
}
AEVB_FORMULA PhiloxKeys philox_keys(uint64_t seed) {
  return philox_keys(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Returns the low half of the product a * b, and sets `high` to the high half.
AEVB_FORMULA uint32_t wide_product(uint32_t a, uint32_t b, uint32_t& high) {
#ifdef __CUDA_ARCH__
  uint32_t low;  // one instruction, which nvcc does not find by itself
  asm("{ .reg .u64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }" : "=r"(low), "=r"(high) : "r"(a), "r"(b));
  return low;
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  return static_cast<uint32_t>(product);
#endif
}

AEVB_FORMULA Philox philox(Philox counter, const PhiloxKeys& keys) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  AEVB_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint32_t high0, high1;
    const uint32_t low0 = wide_product(kPhiloxM0, c0, high0), low1 = wide_product(kPhiloxM1, c2, high1);
    c0 = high1 ^ c1 ^ keys.key0[round];
    c1 = low1;
    c2 = high0 ^ c3 ^ keys.key1[round];
    c3 = low0;
  }
  return {{c0, c1, c2, c3}};
}

// The four words of elements 4 * index .. 4 * index + 3.
AEVB_FORMULA Philox noise_words(const PhiloxKeys& keys, uint64_t index, uint32_t purpose = kForNormals) {
  return philox({{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), purpose, 0u}}, keys);
}

// An independent seed for each index, from one seed.
AEVB_FORMULA uint64_t mix_seed(uint64_t seed, uint64_t index) {
  const Philox w = noise_words(philox_keys(seed), index, kForSeeds);
  return (static_cast<uint64_t>(w.word[1]) << 32) | w.word[0];
}

// Whether a pixel with a grey value is set. The probability is value / max_value, to 6e-8. It is exact at the ends: 0
// never is set, and max_value and more always are. step is grey_step(max_value).
AEVB_FORMULA uint32_t grey_step(uint32_t max_value) { return static_cast<uint32_t>((uint64_t{1} << 32) / max_value); }
AEVB_FORMULA bool is_set(uint32_t word, uint32_t value, uint32_t max_value, uint32_t step) {
  return (word < value * step) | (static_cast<int32_t>(value) >= static_cast<int32_t>(max_value));
}

// log((u + 1/2) / 2^32), to full relative accuracy at both ends. All 32 bits count, so that the normal's tails
// reach 6.7 sigma, and small radii are not grainy.
AEVB_FORMULA float log_unit_interval(uint32_t u) {
  const float offset = fmadd(static_cast<float>(static_cast<int32_t>(u)), 0x1p-32f, 0x1p-33f);
  const bool upper = offset < 0.0f;  // u >= 2^31 reads as u - 2^32, so that offset is the distance to 1
  const float x = upper ? offset + 1.0f : offset;
  const int32_t n = log_exponent(x);
  const float f = n == 0 ? offset : log_mantissa(x, n) - 1.0f;
  return log_of_parts(static_cast<float>(n), f);
}

struct NormalPair {
  float first, second;
};

// The radius sqrt(-2 log u), where a word gives u in (0, 1).
AEVB_FORMULA float box_muller_radius(uint32_t word) { return sqrt_in_range(-2.0f * log_unit_interval(word)); }

// The pair radius (cos a, sin a) at the angle a = 2 pi v, where a word gives v in [0, 1).
AEVB_FORMULA NormalPair box_muller_at(float radius, uint32_t angle_word) {
  // The angle is quadrant * pi/2 + y * pi/2 with y in [-1/2, 1/2), split exactly in integers: the quadrant is in the
  // top two bits of `turned`, and a shift drops it from the rest.
  const uint32_t turned = angle_word + 0x20000000u;
  const float y = static_cast<float>(static_cast<int32_t>(angle_word << 2)) * 0x1p-32f;
  const float y2 = y * y;
  float sine = fmadd(-0x1.30333cp-8f, y2, 0x1.467030p-4f);
  sine = fmadd(sine, y2, -0x1.4abbfap-1f);
  sine = fmadd(sine, y2, 0x1.921fb6p+0f) * y;
  float cosine = fmadd(0x1.d4f7eep-11f, y2, -0x1.55b2b6p-6f);
  cosine = fmadd(cosine, y2, 0x1.03c1b0p-2f);
  cosine = fmadd(cosine, y2, -0x1.3bd3ccp+0f);
  cosine = fmadd(cosine, y2, 1.0f);
  const uint32_t odd = 0u - (turned >> 30 & 1u);  // all ones, or zero
  const uint32_t cosine_sign = (turned + 0x40000000u) & 0x80000000u, sine_sign = turned & 0x80000000u;
  const uint32_t c = bits_of(cosine), s = bits_of(sine), swap = (c ^ s) & odd;
  return {radius * float_of(c ^ swap ^ cosine_sign), radius * float_of(s ^ swap ^ sine_sign)};
}

// Two independent samples of N(0, 1), from two words.
AEVB_FORMULA NormalPair box_muller(uint32_t radius_word, uint32_t angle_word) {
  return box_muller_at(box_muller_radius(radius_word), angle_word);
}

}  // namespace
}  // namespace aevb

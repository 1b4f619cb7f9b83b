// SPDX-License-Identifier: Apache-2.0
// Standard normals of a range of elements of one seed's block, by formulas/philox.h, many counters at once.
//
// The ten rounds are integer arithmetic, so each instruction set may do them its own way. A word lives in the low half
// of a 64-bit lane. There one widening multiply gives both halves of the product, and junk above a word does no harm.
#pragma once
#include "../formulas/philox.h"

namespace aevb::cpu {
namespace {

constexpr int kCounters = 16;  // counters of one call of philox_words, 4 elements each

// The keys of the rounds, each in the low half of a 64-bit lane.
struct KeySchedule {
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

AEVB_FORMULA KeySchedule key_schedule(uint64_t seed) {
  const PhiloxKeys narrow = philox_keys(seed);
  KeySchedule keys;
  for (int r = 0; r < kPhiloxRounds; ++r) {
    keys.k0[r] = narrow.key0[r];
    keys.k1[r] = narrow.key1[r];
  }
  return keys;
}

// Writes words 0..3 of counters index .. index + kCounters - 1 to word [4, kCounters], rows `stride` apart. kPurpose is
// the counters' third word, which says what they are for.
#if defined(AEVB_AVX512)

template <uint32_t kPurpose>
AEVB_FORMULA void philox_words(uint64_t index, const KeySchedule& keys, uint32_t* word, int stride) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i c0[2], c1[2], c2[2], c3[2];
  for (int v = 0; v < 2; ++v) {
    const __m512i first = _mm512_set1_epi64(static_cast<int64_t>(index + 8 * v));
    c0[v] = _mm512_add_epi64(first, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    c1[v] = _mm512_srli_epi64(c0[v], 32);
    c2[v] = _mm512_set1_epi64(kPurpose);
    c3[v] = _mm512_setzero_si512();
  }
#pragma GCC unroll 10
  for (int r = 0; r < kPhiloxRounds; ++r) {
    const __m512i k0 = _mm512_set1_epi64(static_cast<int64_t>(keys.k0[r]));
    const __m512i k1 = _mm512_set1_epi64(static_cast<int64_t>(keys.k1[r]));
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m512i p0 = _mm512_mul_epu32(c0[v], m0), p1 = _mm512_mul_epu32(c2[v], m1);
      c0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[v], k0, 0x96);  // 0x96: a ^ b ^ c
      c2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[v], k1, 0x96);
      c1[v] = p1;
      c3[v] = p0;
    }
  }
  const __m512i low = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  _mm512_storeu_si512(word, _mm512_permutex2var_epi32(c0[0], low, c0[1]));
  _mm512_storeu_si512(word + 1 * stride, _mm512_permutex2var_epi32(c1[0], low, c1[1]));
  _mm512_storeu_si512(word + 2 * stride, _mm512_permutex2var_epi32(c2[0], low, c2[1]));
  _mm512_storeu_si512(word + 3 * stride, _mm512_permutex2var_epi32(c3[0], low, c3[1]));
}

#elif defined(AEVB_AVX2)

AEVB_FORMULA __m256i low_words(__m256i a, __m256i b) {
  const __m256 mixed = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
  return _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xd8);
}

template <uint32_t kPurpose>
AEVB_FORMULA void philox_words(uint64_t index, const KeySchedule& keys, uint32_t* word, int stride) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  __m256i c0[4], c1[4], c2[4], c3[4];
  for (int v = 0; v < 4; ++v) {
    const __m256i first = _mm256_set1_epi64x(static_cast<int64_t>(index + 4 * v));
    c0[v] = _mm256_add_epi64(first, _mm256_set_epi64x(3, 2, 1, 0));
    c1[v] = _mm256_srli_epi64(c0[v], 32);
    c2[v] = _mm256_set1_epi64x(kPurpose);
    c3[v] = _mm256_setzero_si256();
  }
#pragma GCC unroll 10
  for (int r = 0; r < kPhiloxRounds; ++r) {
    const __m256i k0 = _mm256_set1_epi64x(static_cast<int64_t>(keys.k0[r]));
    const __m256i k1 = _mm256_set1_epi64x(static_cast<int64_t>(keys.k1[r]));
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i p0 = _mm256_mul_epu32(c0[v], m0), p1 = _mm256_mul_epu32(c2[v], m1);
      c0[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[v]), k0);
      c2[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[v]), k1);
      c1[v] = p1;
      c3[v] = p0;
    }
  }
  for (int v = 0; v < 4; v += 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(word + 4 * v), low_words(c0[v], c0[v + 1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(word + stride + 4 * v), low_words(c1[v], c1[v + 1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(word + 2 * stride + 4 * v), low_words(c2[v], c2[v + 1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(word + 3 * stride + 4 * v), low_words(c3[v], c3[v + 1]));
  }
}

#else

template <uint32_t kPurpose>
AEVB_FORMULA void philox_words(uint64_t index, const KeySchedule& keys, uint32_t* word, int stride) {
  const PhiloxKeys narrow = philox_keys((keys.k1[0] << 32) | keys.k0[0]);
  for (int i = 0; i < kCounters; ++i) {
    const Philox w = noise_words(narrow, index + static_cast<uint64_t>(i), kPurpose);
    for (int j = 0; j < 4; ++j) word[j * stride + i] = w.word[j];
  }
}

#endif

// A window on the noise. fill() returns the normals [n] of elements [first, first + n) of the seed's block, n <= kTile.
// Normals computed beyond them are kept for the next call, if it goes on from there.
template <int kTile>
class Noise {
 public:
  Noise() {}

  const float* fill(uint64_t seed, int64_t first, int64_t n) {
    const int64_t base = first & ~int64_t{3};  // first element of the counter that holds `first`
    if (seed != seed_ || base < begin_ || base > end_ || end_ == 0) {
      if (seed != seed_ || end_ == 0) keys_ = key_schedule(seed_ = seed);
      end_ = base;
    } else {
      __builtin_memmove(eps_, eps_ + (base - begin_), (end_ - base) * sizeof(float));
    }
    begin_ = base;
    const int missing = static_cast<int>(first + n - end_);
    if (missing > 0) {
      // Two loops: in one loop, the rounds and Box-Muller would wait for each other.
      const uint64_t index = static_cast<uint64_t>(end_) / 4;
      int counters = 0;
      for (; 4 * counters < missing; counters += kCounters)
        philox_words<kForNormals>(index + static_cast<uint64_t>(counters), keys_, word_[0] + counters, kMost);
      normals(counters, eps_ + (end_ - begin_));
      end_ += 4 * counters;
    }
    return eps_ + (first - base);
  }

 private:
  static constexpr int kMost = kTile / 4 + kCounters;  // most counters of a call

  // eps [4 * counters] = the normals of the words in word_.
  AEVB_FORMULA void normals(int counters, float* eps) {
#pragma omp simd
    for (int i = 0; i < counters; ++i) {
      radius_[0][i] = box_muller_radius(word_[0][i]);
      radius_[1][i] = box_muller_radius(word_[2][i]);
    }
#pragma omp simd
    for (int i = 0; i < counters; ++i) {
      const NormalPair a = box_muller_at(radius_[0][i], word_[1][i]), b = box_muller_at(radius_[1][i], word_[3][i]);
      eps[4 * i] = a.first;
      eps[4 * i + 1] = a.second;
      eps[4 * i + 2] = b.first;
      eps[4 * i + 3] = b.second;
    }
  }

  uint64_t seed_ = 0;
  int64_t begin_ = 0, end_ = 0;  // eps_ holds the normals of elements [begin_, end_) of seed_'s block
  KeySchedule keys_;
  alignas(64) uint32_t word_[4][kMost];
  alignas(64) float radius_[2][kMost];
  alignas(64) float eps_[4 * kMost];
};

}  // namespace
}  // namespace aevb::cpu

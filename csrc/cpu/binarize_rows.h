// SPDX-License-Identifier: Apache-2.0
// Binarization, row by row: images are gathered from a data set, and their grey pixels drawn anew as bits.
#pragma once
#include "noise.h"

namespace aevb::cpu {
namespace {

inline void binarize_rows(const BinarizeArgs& a, int64_t begin, int64_t end) {
  constexpr int kMost = 4 * kCounters, kPixels = 4 * kMost;  // most counters, and pixels, at a time
  alignas(64) uint32_t word[4][kMost] = {}, four[kMost];
  const uint32_t most = a.max_value, step = grey_step(most);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t image = a.index ? a.index[b] : b;
    const KeySchedule keys = key_schedule(mix_seed(static_cast<uint64_t>(*a.seed), static_cast<uint64_t>(image)));
    for (int64_t d = 0; d < a.D; d += kPixels) {
      const int n = static_cast<int>(a.D - d < kPixels ? a.D - d : kPixels);
      const int counters = (n + 4 * kCounters - 1) / (4 * kCounters) * kCounters;
      if (n % 4) four[n / 4] = 0;
      __builtin_memcpy(four, a.images + image * a.D + d, n);  // pixel j of counter i is byte j of four[i]
      for (int i = (n + 3) / 4; i < counters; ++i) four[i] = 0;
      for (int first = 0; first < counters; first += kCounters) {
        uint32_t any = 0;
        for (int i = 0; i < kCounters; ++i) any |= four[first + i];
        if (any) philox_words<kForPixels>(static_cast<uint64_t>(d) / 4 + first, keys, word[0] + first, kMost);
      }
#pragma omp simd
      for (int i = 0; i < counters; ++i) {
        const uint32_t pixels = four[i];
        uint32_t x = is_set(word[0][i], pixels & 0xffu, most, step) ? 1u : 0u;
        x |= is_set(word[1][i], pixels >> 8 & 0xffu, most, step) ? 1u << 8 : 0u;
        x |= is_set(word[2][i], pixels >> 16 & 0xffu, most, step) ? 1u << 16 : 0u;
        x |= is_set(word[3][i], pixels >> 24, most, step) ? 1u << 24 : 0u;
        four[i] = x;
      }
      __builtin_memcpy(a.x + b * a.D + d, four, n);
    }
  }
}

}  // namespace
}  // namespace aevb::cpu

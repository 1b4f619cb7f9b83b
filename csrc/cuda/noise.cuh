// SPDX-License-Identifier: Apache-2.0
// Standard normals of a run of elements, by formulas/philox.h: one counter for every four elements.
#pragma once
#include "../formulas/philox.h"
#include "division.h"

namespace aevb::cuda {

// The seeds of elements: element i is under seeds[i / block], and is numbered from 0 at the beginning of its block.
struct Seeds {
  const int64_t* seeds;  // [number of blocks]
  Divider block;
  bool one;  // one seed for everything
};

// The normal of element i of a seed's block.
AEVB_DEVICE float normal_at(uint64_t seed, int64_t i) {
  const Philox w = noise_words(philox_keys(seed), static_cast<uint64_t>(i) >> 2);
  const bool second_pair = i & 2;
  const NormalPair pair = box_muller(second_pair ? w.word[2] : w.word[0], second_pair ? w.word[3] : w.word[1]);
  return i & 1 ? pair.second : pair.first;
}

// eps [V] = the normals of elements i .. i + V - 1 of a seed's block, for i a multiple of 4.
template <int V>
AEVB_DEVICE void normals_of(const PhiloxKeys& keys, int64_t i, float* eps) {
#pragma unroll
  for (int j = 0; j < V; j += 4) {
    const Philox w = noise_words(keys, static_cast<uint64_t>(i + j) / 4);
    const NormalPair a = box_muller(w.word[0], w.word[1]), b = box_muller(w.word[2], w.word[3]);
    eps[j] = a.first, eps[j + 1] = a.second, eps[j + 2] = b.first, eps[j + 3] = b.second;
  }
}

// eps[j] = the normal of element first + j, for j < n. n < V only where the run ends beyond the last element.
template <int V>
AEVB_DEVICE void normals(const Seeds& s, int64_t first, int n, float* eps) {
  const int64_t block = s.one ? 0 : s.block.divide(first), offset = first - block * s.block.divisor();
  if (offset % 4 == 0 && (s.one || offset + V <= s.block.divisor()))
    return normals_of<V>(philox_keys(static_cast<uint64_t>(s.seeds[block])), offset, eps);
  // One element at a time: a counter straddles the run's ends, or another seed begins within the run.
#pragma unroll
  for (int j = 0; j < V; ++j) eps[j] = 0.0f;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const int64_t b = s.one ? 0 : s.block.divide(first + i);
    const float x = normal_at(static_cast<uint64_t>(s.seeds[b]), first + i - b * s.block.divisor());
#pragma unroll
    for (int j = 0; j < V; ++j) eps[j] = j == i ? x : eps[j];
  }
}

}  // namespace aevb::cuda

// SPDX-License-Identifier: Apache-2.0
// Sums of rows in the order of csrc/README.md: over the threads of a warp, and over groups.
#pragma once
#include "../args.h"
#include "platform.h"

namespace aevb::cuda {

constexpr int kWarp = 32;

template <int kHalf>
AEVB_DEVICE void add_halves(float* lane) {  // [2 kHalf], destroyed
#pragma unroll
  for (int i = 0; i < kHalf; ++i) lane[i] += lane[i + kHalf];
  if constexpr (kHalf > 1) add_halves<kHalf / 2>(lane);
}

// The sum of a group's lanes, by halves. kLanes / V threads of a warp hold them: thread t holds the V neighbouring
// lanes t V .. t V + V - 1. `threads` is their mask, and the first thread has the sum.
template <int V>
AEVB_DEVICE float fold_neighbours(float* lane, unsigned threads) {  // [V], destroyed
#pragma unroll
  for (int width = kLanes / 2; width >= V; width /= 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) lane[i] += __shfl_down_sync(threads, lane[i], width / V, kLanes / V);
  }
  add_halves<V / 2>(lane);
  return lane[0];
}

// The sum of a group's lanes where thread t of T holds lanes t, t + T, t + 2 T, ... below kUsed, a power of two. The
// lanes from kUsed on are +0, which changes no bit. All threads of the warp must call it.
template <int T, int kUsed = kLanes>
AEVB_DEVICE float fold_strided(float* lane) {  // [kUsed / T], destroyed
  add_halves<kUsed / T / 2>(lane);
#pragma unroll
  for (int width = T / 2; width >= 1; width /= 2) lane[0] += __shfl_down_sync(~0u, lane[0], width, T);
  return lane[0];
}

// Joins at most 2^kLevels - 1 sums of groups by a binary tree over adjacent pairs; a sum without a partner moves up
// unchanged. Every index is known to the compiler, so that the partial sums stay in registers.
template <int kLevels>
class TreeSum {
 public:
  AEVB_DEVICE void add(float x) {
    bool carry = true;
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      if (!carry) continue;
      carry = count_ >> level & 1u;
      if (carry)
        x = partial_[level] + x;
      else
        partial_[level] = x;
    }
    ++count_;
  }

  AEVB_DEVICE float total() const {
    float x = 0.0f;
    bool any = false;
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      if (!(count_ >> level & 1u)) continue;
      x = any ? partial_[level] + x : partial_[level];
      any = true;
    }
    return x;
  }

 private:
  uint32_t count_ = 0;
  float partial_[kLevels] = {};
};

// Sums each row of a tile [rows, D] in shared memory: adds its groups and joins them. One thread calls result(row,
// sum). group_sum [rows, groups] is needed where D > kGroup. T threads share a group. All threads of the block must
// call it, after a barrier that completes the tile.
template <int T, int kThreads, class Result>
AEVB_DEVICE void sum_groups(const float* tile, int rows, int D, float* group_sum, const Result& result) {
  constexpr int kOwn = kLanes / T;
  const int groups = (D + kGroup - 1) / kGroup, units = rows * groups;
  const int t = threadIdx.x % T;
  // The threads of a warp loop together, for the shuffles.
  for (int first = threadIdx.x / kWarp * (kWarp / T); first < units; first += kThreads / T) {
    const int unit = first + threadIdx.x % kWarp / T;
    const int row = groups == 1 ? unit : unit / groups, group = groups == 1 ? 0 : unit % groups;
    const int left = D - group * kGroup;
    const int n = unit < units ? (left < kGroup ? left : kGroup) : 0;
    const float* x = tile + row * D + group * kGroup;
    float lane[kOwn] = {};
    for (int step = 0; step < n; step += kLanes) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int k = step + t + T * j;
        if (k < n) lane[j] += x[k];
      }
    }
    const float sum = fold_strided<T>(lane);
    if (t == 0 && unit < units) {
      if (groups == 1)
        result(row, sum);
      else
        group_sum[unit] = sum;
    }
  }
  if (groups == 1) return;  // uniform over the block
  __syncthreads();
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    TreeSum<5> sum;  // a tile has fewer than 32 groups
    for (int group = 0; group < groups; ++group) sum.add(group_sum[row * groups + group]);
    result(row, sum.total());
  }
}

// sum_groups for rows of at most kMost <= kLanes elements.
template <int T, int kMost, int kThreads, class Result>
AEVB_DEVICE void sum_short_rows(const float* tile, int rows, int D, const Result& result) {
  constexpr int kOwn = kMost / T;
  const int t = threadIdx.x % T;
#pragma unroll 1
  for (int first = threadIdx.x / kWarp * (kWarp / T); first < rows; first += kThreads / T) {
    const int row = first + threadIdx.x % kWarp / T;
    const float* x = tile + row * D + t;
    const int n = row < rows ? D - t : 0;
    float lane[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) lane[j] = T * j < n ? 0.0f + x[T * j] : 0.0f;
    const float sum = fold_strided<T, kMost>(lane);
    if (t == 0 && row < rows) result(row, sum);
  }
}

// sum_groups for rows of any length, with as many threads a row as pay off.
template <int kThreads, class Result>
AEVB_DEVICE void sum_rows(const float* tile, int rows, int D, float* group_sum, const Result& result) {
  if (D <= 4)
    sum_short_rows<1, 4, kThreads>(tile, rows, D, result);
  else if (D <= 8)
    sum_short_rows<1, 8, kThreads>(tile, rows, D, result);
  else if (D <= 16)
    sum_short_rows<2, 16, kThreads>(tile, rows, D, result);
  else if (D <= 32)
    sum_short_rows<4, 32, kThreads>(tile, rows, D, result);
  else if (D <= 64)
    sum_groups<4, kThreads>(tile, rows, D, group_sum, result);
  else
    sum_groups<kWarp, kThreads>(tile, rows, D, group_sum, result);
}

}  // namespace aevb::cuda

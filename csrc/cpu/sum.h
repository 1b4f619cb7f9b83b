// SPDX-License-Identifier: Apache-2.0
// Sums of rows in the order of csrc/README.md, which is a function of a row's length alone.
#pragma once
#include "../args.h"
#include "../formulas/elementary.h"

namespace aevb::cpu {
namespace {

// The sum of lanes, by halves.
template <int kWidth = kLanes / 2>
AEVB_FORMULA float fold_lanes(float* lane) {  // [2 * kWidth], destroyed
#pragma omp simd
  for (int k = 0; k < kWidth; ++k) lane[k] += lane[k + kWidth];
  if constexpr (kWidth > 1) return fold_lanes<kWidth / 2>(lane);
  return lane[0];
}

// Joins sums of groups by a binary tree over adjacent pairs; a sum without a partner moves up unchanged.
class PairwiseSum {
 public:
  PairwiseSum() {}  // the implicit constructor would fill partial_ with zeros
  AEVB_FORMULA void add(float x) {
    int level = 0;
    for (uint64_t bits = count_++; bits & 1; bits >>= 1) x = partial_[level++] + x;
    partial_[level] = x;
  }
  AEVB_FORMULA float total() const {
    if (count_ == 0) return 0.0f;
    int level = 0;
    uint64_t bits = count_;
    for (; !(bits & 1); bits >>= 1) ++level;
    float x = partial_[level];
    while (bits >>= 1) {
      ++level;
      if (bits & 1) x = partial_[level] + x;
    }
    return x;
  }

 private:
  uint64_t count_ = 0;
  float partial_[64];
};

// Adds x [n] to the lanes, lane [kLanes]. x must be readable up to the next multiple of kLanes.
AEVB_FORMULA void add_to_lanes(const float* x, int n, float* lane) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) lane[k] += x[i + k];
  }
  if (i < n) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) lane[k] += i + k < n ? x[i + k] : 0.0f;  // +0 changes nothing: no lane is -0
  }
}

// The sum of x [n], n <= kGroup. x must be readable up to the next multiple of kLanes.
AEVB_FORMULA float sum_group(const float* x, int n) {
  alignas(64) float lane[kLanes] = {};
  add_to_lanes(x, n, lane);
  return fold_lanes(lane);
}

// The sum of a row that arrives in pieces. The length of every piece but the row's last is a multiple of kLanes and
// divides kGroup.
class RowSum {
 public:
  AEVB_FORMULA void add(const float* x, int n) {
    add_to_lanes(x, n, lane_);
    in_group_ += n;
    if (in_group_ == kGroup) close_group();
  }
  AEVB_FORMULA float total() {
    if (in_group_ > 0) close_group();
    return groups_.total();
  }

 private:
  AEVB_FORMULA void close_group() {
    groups_.add(fold_lanes(lane_));
    for (int k = 0; k < kLanes; ++k) lane_[k] = 0.0f;
    in_group_ = 0;
  }

  alignas(64) float lane_[kLanes] = {};
  int in_group_ = 0;
  PairwiseSum groups_;
};

}  // namespace
}  // namespace aevb::cpu

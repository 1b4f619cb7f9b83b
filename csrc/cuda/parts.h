// SPDX-License-Identifier: Apache-2.0
// The parts that a likelihood's rows are cut into.
#pragma once
#include "../args.h"

namespace aevb::cuda {

// How many parts a row is cut into, each a node of its tree: one, unless rows are long, and then as many as it takes to
// keep the GPU busy.
struct Parts {
  int64_t parts, elements;
};
inline Parts parts_of(const LikelihoodArgs& a, int multiprocessors) {
  constexpr int64_t kMost = 64, kWhole = 8;  // groups in a part, at most; rows of so many are not cut
  const int64_t groups = (a.D + kGroup - 1) / kGroup;
  int64_t each = kMost;
  while (groups > kWhole && each > 1 &&
         a.R * ((groups + each - 1) / each) < 128 * static_cast<int64_t>(multiprocessors))
    each /= 2;
  return {groups > each ? (groups + each - 1) / each : 1, each * kGroup};
}

}  // namespace aevb::cuda

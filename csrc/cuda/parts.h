// SPDX-License-Identifier: Apache-2.0
// The parts of a likelihood's rows.
#pragma once
#include "../args.h"

namespace aevb::cuda {

// The number of parts of a row, and the elements of a part. Each part is a node of the row's tree of sums. A short row
// is one part; a long row is cut into as many parts as it takes to keep the GPU busy.
struct Parts {
  int64_t parts, elements;
};
inline Parts parts_of(const LikelihoodArgs& a, int multiprocessors) {
  constexpr int64_t kMost = 64, kWhole = 8;  // most groups of a part; most groups of a row that is never cut
  const int64_t groups = (a.D + kGroup - 1) / kGroup;
  int64_t each = kMost;
  while (groups > kWhole && each > 1 &&
         a.R * ((groups + each - 1) / each) < 128 * static_cast<int64_t>(multiprocessors))
    each /= 2;
  return {groups > each ? (groups + each - 1) / each : 1, each * kGroup};
}

}  // namespace aevb::cuda

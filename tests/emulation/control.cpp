// SPDX-License-Identifier: Apache-2.0
// The emulation's controls, for Python's ctypes; build.py compiles this into every library.
#include <algorithm>

#include "cuda_shim.h"

#define AEVB_CONTROL extern "C" __attribute__((visibility("default")))

using aevb::emulation::machine;

AEVB_CONTROL void aevb_emulation_set_order(int order, uint64_t seed) {
  machine.order = static_cast<aevb::emulation::Order>(order);
  machine.seed = seed;
}

AEVB_CONTROL void aevb_emulation_reset_record() { machine.launches.clear(); }

// Gives the number of launches since the reset, and the blocks and the threads a block of the first n.
AEVB_CONTROL int64_t aevb_emulation_launches(int64_t* grids, int64_t* threads, int64_t n) {
  const auto count = static_cast<int64_t>(machine.launches.size());
  for (int64_t i = 0; i < std::min(n, count); ++i) {
    grids[i] = machine.launches[static_cast<size_t>(i)].grid;
    threads[i] = machine.launches[static_cast<size_t>(i)].threads;
  }
  return count;
}

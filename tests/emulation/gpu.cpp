// SPDX-License-Identifier: Apache-2.0
// The size of the GPU that the emulated ops take themselves to be on: it decides how work is cut.
#include "../../csrc/cuda/launchers.h"

namespace {
int count = 132;
}

namespace aevb::cuda {
int multiprocessors(int) { return count; }
}  // namespace aevb::cuda

extern "C" __attribute__((visibility("default"))) void aevb_emulation_set_multiprocessors(int n) { count = n; }

// SPDX-License-Identifier: Apache-2.0
// The gradients of an activation and of its bias, whose columns are summed.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "isa.h"

namespace aevb::cpu {

constexpr int64_t kGrain = 16384;  // elements below which work is not worth a second thread

inline int64_t grain_of(int64_t row_elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_elements));
}

inline void activation_backward(ActivationArgs a) {
  const int64_t blocks = (a.rows + kActivationBlock - 1) / kActivationBlock;
  const std::unique_ptr<float[]> partial(new float[static_cast<size_t>(blocks * a.D)]);
  a.partial_sum = partial.get();
  torch::stable::parallel_for(0, blocks, grain_of(a.D * kActivationBlock),
                              [&](int64_t begin, int64_t end) { kernels().activation_backward(a, begin, end); });
  for (int64_t d = 0; d < a.D; ++d) {
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) total += static_cast<double>(partial[block * a.D + d]);
    a.grad_bias[d] = static_cast<float>(total);
  }
}

}  // namespace aevb::cpu

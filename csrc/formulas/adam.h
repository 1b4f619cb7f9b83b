// SPDX-License-Identifier: Apache-2.0
// Adam (Kingma & Ba 2014, algorithm 1), one weight at a time.
#pragma once
#include "elementary.h"

namespace aevb {
namespace {

// Bias corrections of step t: lr / (1 - beta1^t), and 1 / sqrt(1 - beta2^t).
struct AdamScales {
  float step_size, root_scale;
};
AEVB_FORMULA AdamScales adam_scales(float lr, float log_beta1, float log_beta2, float t) {
  const float first = at_least(-exp_differences(t * log_beta1).expm1, 0x1p-60f);
  const float second = at_least(-exp_differences(t * log_beta2).expm1, 0x1p-60f);
  return {lr * rcp_in_range(first), rcp_in_range(sqrt_in_range(second))};
}

// sqrt(x) for every x >= 0; below 2^-100 it is sqrt(2^-100).
AEVB_FORMULA float adam_root(float x) {
  const bool small = x < 1.0f, large = x > 0x1p60f;
  const float scaled = x * (small ? 0x1p40f : large ? 0x1p-80f : 1.0f);
  const float root = sqrt_in_range(at_least(at_most(scaled, 0x1p60f), 0x1p-60f));
  const float finite = root * (small ? 0x1p-20f : large ? 0x1p40f : 1.0f);
  return x < infinity() ? finite : x;
}

// A weight, and the running means of its gradient and of the gradient's square.
struct AdamState {
  float weight, mean, square;
};
AEVB_FORMULA AdamState adam_update(AdamState s, float grad, AdamScales scales, float beta1, float beta2, float eps) {
  const float mean = fmadd(beta1, s.mean, (1.0f - beta1) * grad);
  const float square = fmadd(beta2, s.square, ((1.0f - beta2) * grad) * grad);
  const float divisor = at_most(fmadd(adam_root(square), scales.root_scale, eps), 0x1p60f);
  const float update = scales.step_size * mean * rcp_in_range(at_least(divisor, 0x1p-60f));
  return {s.weight - update, mean, square};
}

}  // namespace
}  // namespace aevb

// SPDX-License-Identifier: Apache-2.0
// The Laplace likelihood with mean m and log-scale s: -log p = |x_scale x - m| exp(-s) + s + log 2.
#pragma once
#include "likelihood.h"

namespace aevb {
namespace {

struct Laplace {
  static constexpr bool kProduct = false, kHeavy = false;
  static constexpr int kParams = 2;
  float x_scale;

  // A scale below e^-88 counts as e^-88, so that an element that the mean meets exactly costs s alone and not 0 times
  // infinity.
  static AEVB_FORMULA float inverse_scale(float log_scale) { return exp_of(at_most(-log_scale, 88.0f)); }

  AEVB_FORMULA NegLogProb add_neg_log_prob(float sum, float x, float mean, float log_scale) const {
    const float distance = abs_of(fmadd(x_scale, x, -mean));
    return {sum + fmadd(distance, inverse_scale(log_scale), log_scale + 0.693147181f), 0.0f};
  }
  AEVB_FORMULA LikelihoodGradient grad(float x, float mean, float log_scale) const {
    const float residual = fmadd(x_scale, x, -mean), inverse = inverse_scale(log_scale);
    const float sign = residual > 0.0f ? 1.0f : (residual < 0.0f ? -1.0f : residual);  // 0 at the mean, NaN for a NaN
    return {sign * inverse, fmadd(abs_of(residual), inverse, -1.0f)};
  }
};

}  // namespace
}  // namespace aevb

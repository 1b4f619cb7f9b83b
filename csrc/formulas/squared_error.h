// SPDX-License-Identifier: Apache-2.0
// Half the squared error, (x_scale x - m)^2 / 2: -log p of a Gaussian with mean m and variance 1, without its constant.
#pragma once
#include "likelihood.h"

namespace aevb {
namespace {

struct SquaredError {
  static constexpr bool kProduct = false, kHeavy = false;
  static constexpr int kParams = 1;
  float x_scale;

  AEVB_FORMULA NegLogProb add_neg_log_prob(float sum, float x, float mean, float) const {
    const float residual = fmadd(x_scale, x, -mean);
    return {sum + 0.5f * residual * residual, 0.0f};
  }
  AEVB_FORMULA LikelihoodGradient grad(float x, float mean, float) const { return {fmadd(x_scale, x, -mean), 0.0f}; }
};

}  // namespace
}  // namespace aevb

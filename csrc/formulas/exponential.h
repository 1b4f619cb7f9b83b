// SPDX-License-Identifier: Apache-2.0
// The exponential likelihood, one element at a time: -log p = x_scale x exp(r) - r, with log-rate r and x >= 0.
#pragma once
#include "likelihood.h"

namespace aevb {
namespace {

struct Exponential {
  static constexpr bool kProduct = false, kHeavy = false;
  static constexpr int kParams = 1;
  float x_scale;

  // A rate above e^88 counts as e^88, so that x = 0 costs -r alone and not 0 times infinity.
  static AEVB_FORMULA float rate(float log_rate) { return exp_of(at_most(log_rate, 88.0f)); }

  AEVB_FORMULA NegLogProb add_neg_log_prob(float sum, float x, float log_rate, float) const {
    return {sum + fmadd(x_scale * x, rate(log_rate), -log_rate), 0.0f};
  }
  AEVB_FORMULA LikelihoodGradient grad(float x, float log_rate, float) const {
    return {fmadd(-(x_scale * x), rate(log_rate), 1.0f), 0.0f};
  }
};

}  // namespace
}  // namespace aevb

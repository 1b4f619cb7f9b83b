// SPDX-License-Identifier: Apache-2.0
// The Bernoulli likelihood of AEVB appendix C.1, one pixel at a time. The target x_scale x in [0, 1] may be soft.
#pragma once
#include "likelihood.h"

namespace aevb {
namespace {

// x - sigmoid(l) for a logit l: (x - 1) + sigmoid(-l) where l > 0, and x - sigmoid(l) elsewhere, so that hard targets
// lose no digits.
struct SigmoidResidual {
  float residual, tail;  // tail is sigmoid(-|l|)
};
AEVB_FORMULA SigmoidResidual sigmoid_residual(float logit, float x, float x_scale) {
  const float e = exp_minus(abs_of(logit));
  const float tail = e * rcp_in_range(1.0f + e);
  const uint32_t sign = bits_of(logit) & 0x80000000u;
  // -0 where the logit is negative, else -1. The sign is set by bits: ptxas 13.0 takes a choice between -0 and -1 for a
  // choice between the integers 0 and -1, and loses the sign of 0.
  const float nearest = static_cast<int32_t>(bits_of(logit)) < 0 ? 0.0f : 1.0f;
  const float minus_nearest = float_of(bits_of(nearest) | 0x80000000u);
  return {fmadd(x_scale, x, minus_nearest) + float_of(bits_of(tail) | sign), tail};
}

// The Bernoulli likelihood of a logit l: -log p = max(l, 0) - x l + log(1 + exp(-|l|)).
struct BernoulliLogits {
  static constexpr bool kProduct = true, kHeavy = false;
  static constexpr int kParams = 1;
  float x_scale;

  AEVB_FORMULA NegLogProb add_neg_log_prob(float sum, float x, float logit, float) const {
    // max(l, 0) - x l as l (1 - x) where l > 0, and as l (0 - x) elsewhere: no inf - inf where l is infinite.
    const float nearest = logit > 0.0f ? 1.0f : 0.0f;
    return {fmadd(fmadd(-x_scale, x, nearest), logit, sum), exp_minus(abs_of(logit))};
  }

  AEVB_FORMULA LikelihoodGradient grad(float x, float logit, float) const {
    return {sigmoid_residual(logit, x, x_scale).residual, 0.0f};
  }
};

// The Bernoulli likelihood of a probability, as F.binary_cross_entropy: each logarithm is clamped at -100.
struct BernoulliProbs {
  static constexpr bool kProduct = false, kHeavy = true;
  static constexpr int kParams = 1;
  float x_scale;

  AEVB_FORMULA NegLogProb add_neg_log_prob(float sum, float x, float p, float) const {
    const float target = x_scale * x;
    const float log_p = at_least(log_of(p), -100.0f), log_q = at_least(log_one_minus(p), -100.0f);
    return {sum - fmadd(target, log_p, (1.0f - target) * log_q), 0.0f};
  }

  AEVB_FORMULA LikelihoodGradient grad(float x, float p, float) const {
    const float variance = at_least((1.0f - p) * p, 1e-12f);
    return {(x_scale * x - p) * rcp_in_range(variance), 0.0f};
  }
};

}  // namespace
}  // namespace aevb

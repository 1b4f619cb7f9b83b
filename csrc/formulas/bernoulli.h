// SPDX-License-Identifier: Apache-2.0
// The Bernoulli likelihood of AEVB appendix C.1, one pixel at a time; x in [0, 1] may be soft.
//
// A likelihood is a struct with two functions of the decoder's output and the target:
//   neg_log_prob -> {linear, excess}   -log p(x|z) = linear + log(1 + excess), excess >= 0
//   grad         -> d log p(x|z) / d output
// A row is summed as sum(linear) + log(prod(1 + excess)): one logarithm serves many pixels. A likelihood that has no
// such factor returns excess = 0. `padding` is an output for which, with x = 0, linear and excess are both +0.
#pragma once
#include "elementary.h"

namespace aevb {
namespace {

struct NegLogProb {
  float linear, excess;
};

// The decoder's output is the logit: -log p = max(l, 0) - x l + log(1 + exp(-|l|)).
struct BernoulliLogits {
  static constexpr float padding = -200.0f;

  static AEVB_FORMULA NegLogProb neg_log_prob(float logit, float x) {
    // max(l, 0) - x l is |l| times what x lacks of 1 where l > 0, and x elsewhere: no inf - inf where l is infinite.
    const float magnitude = abs_of(logit);
    return {magnitude * (logit > 0.0f ? 1.0f - x : x), exp_minus(magnitude)};
  }

  // x - sigmoid(l): (x - 1) + sigmoid(-l) where l > 0, x - sigmoid(l) elsewhere, so that hard targets lose no digits.
  static AEVB_FORMULA float grad(float logit, float x) {
    const float e = exp_minus(abs_of(logit));
    const float tail = e * rcp_in_range(1.0f + e);  // sigmoid(-|l|)
    const uint32_t sign = bits_of(logit) & 0x80000000u;
    const float nearest = static_cast<int32_t>(bits_of(logit)) < 0 ? 0.0f : 1.0f;
    return (x - nearest) + float_of(bits_of(tail) | sign);
  }
};

// The decoder's output is the probability, as in F.binary_cross_entropy: each logarithm is clamped at -100.
struct BernoulliProbs {
  static constexpr float padding = 0.0f;

  static AEVB_FORMULA NegLogProb neg_log_prob(float p, float x) {
    float log_p = log_of(p), log_q = log_one_minus(p);
    log_p = log_p < -100.0f ? -100.0f : log_p;
    log_q = log_q < -100.0f ? -100.0f : log_q;
    return {-fmadd(x, log_p, (1.0f - x) * log_q), 0.0f};
  }

  static AEVB_FORMULA float grad(float p, float x) {
    float variance = (1.0f - p) * p;
    variance = variance < 1e-12f ? 1e-12f : variance;
    return (x - p) * rcp_in_range(variance);
  }
};

}  // namespace
}  // namespace aevb

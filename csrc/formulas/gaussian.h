// SPDX-License-Identifier: Apache-2.0
// The diagonal Gaussian posterior q(z|x) = N(mu, exp(logvar)) against the prior N(0, I), one dimension at a time.
//
// Several of these called on the same logvar cost one exponential: the compiler merges the common part.
#pragma once
#include "elementary.h"

namespace aevb {
namespace {

// The standard deviation.
AEVB_FORMULA float gaussian_sd(float logvar) { return exp_differences(0.5f * logvar).exp; }

// z = mu + sd eps.  AEVB eq. 4.
AEVB_FORMULA float gaussian_sample(float mu, float sd, float eps) { return fmadd(sd, eps, mu); }

// 2 KL(q || N(0, 1)) = mu^2 + exp(logvar) - 1 - logvar.  AEVB appendix B.
// With h = logvar / 2, exp(2h) - 1 - 2h = expm1(h)^2 + 2 (expm1(h) - h): nothing cancels, however small the KL is.
AEVB_FORMULA float gaussian_two_kl(float mu, float logvar) {
  const ExpDifferences e = exp_differences(0.5f * logvar);
  return fmadd(mu, mu, fmadd(e.expm1, e.expm1, e.expm1_minus_x + e.expm1_minus_x));
}

// d KL / d logvar = (exp(logvar) - 1) / 2.  d KL / d mu is mu.
AEVB_FORMULA float gaussian_kl_grad_logvar(float logvar) {
  const ExpDifferences e = exp_differences(0.5f * logvar);
  return 0.5f * (e.expm1 * (e.expm1 + 2.0f));
}

// The gradient of logvar through the samples, sd / 2 sum_l grad_z[l] eps[l], from that sum. That of mu is
// sum_l grad_z[l].
AEVB_FORMULA float gaussian_sample_grad_logvar(float logvar, float grad_z_eps) {
  return 0.5f * (gaussian_sd(logvar) * grad_z_eps);
}

}  // namespace
}  // namespace aevb

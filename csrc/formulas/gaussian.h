// SPDX-License-Identifier: Apache-2.0
// The diagonal Gaussian posterior q(z|x) = N(mu, exp(logvar)) against the prior N(0, I), one dimension at a time.
//
// Several of these functions called on the same logvar cost one exponential: the compiler merges the common part. Where
// every |logvar| is at most kModerateLogvar, Range::moderate gives the same bits for less.
#pragma once
#include "elementary.h"

namespace aevb {
namespace {

constexpr float kModerateLogvar = 44.0f;

// The standard deviation, exp(logvar / 2).
template <Range kRange = Range::any>
AEVB_FORMULA float gaussian_sd(float logvar) {
  return exp_differences<kRange>(0.5f * logvar).exp;
}

// z = mu + sd eps.  AEVB eq. 4.
AEVB_FORMULA float gaussian_sample(float mu, float sd, float eps) { return fmadd(sd, eps, mu); }

// 2 KL(q || N(0, 1)) = mu^2 + exp(logvar) - 1 - logvar.  AEVB appendix B.
// With h = logvar / 2, exp(2h) - 1 - 2h = expm1(h)^2 + 2 (expm1(h) - h): nothing cancels, however small the KL is.
template <Range kRange = Range::any>
AEVB_FORMULA float gaussian_two_kl(float mu, float logvar) {
  const ExpDifferences e = exp_differences<kRange>(0.5f * logvar);
  return fmadd(mu, mu, fmadd(e.expm1, e.expm1, e.expm1_minus_x + e.expm1_minus_x));
}

// d KL / d logvar = (exp(logvar) - 1) / 2. (d KL / d mu is mu.)
template <Range kRange = Range::any>
AEVB_FORMULA float gaussian_kl_grad_logvar(float logvar) {
  const ExpDifferences e = exp_differences<kRange>(0.5f * logvar);
  return 0.5f * (e.expm1 * (e.expm1 + 2.0f));
}

// The gradient of logvar through the samples, sd / 2 times grad_z_eps = sum_l grad_z[l] eps[l]. (The gradient of mu is
// sum_l grad_z[l].)
template <Range kRange = Range::any>
AEVB_FORMULA float gaussian_sample_grad_logvar(float logvar, float grad_z_eps) {
  return 0.5f * (gaussian_sd<kRange>(logvar) * grad_z_eps);
}

// 2 (log q(z|x) - log p(z)) = z^2 - eps^2 - logvar.  AEVB eq. 6.
// Computed as (z - eps) (z + eps) - logvar with z - eps = mu + (sd - 1) eps: nothing cancels where the posterior is
// close to the prior.
AEVB_FORMULA float gaussian_two_log_ratio(float mu, float logvar, float sd_less_1, float eps) {
  const float difference = fmadd(sd_less_1, eps, mu);
  return fmadd(difference, fmadd(2.0f, eps, difference), -logvar);
}

// The slope in d (log q(z|x) - log p(z)) / dz = mu + slope eps. The path derivative, where q's own mu and logvar count
// as constants, is z - eps / sd (Roeder et al. 2017, eq. 7). With the gradients through q's own mu and logvar it is z.
AEVB_FORMULA float gaussian_ratio_slope(float logvar, bool path_only) {
  const ExpDifferences e = exp_differences(0.5f * logvar);
  return path_only ? e.expm1 - exp_differences(-0.5f * logvar).expm1 : e.exp;  // sd - 1 / sd, or sd
}

// Gradients of one sample, from the upstream gradients g_z of z and g of the log ratio. The sum of `z` over samples is
// the gradient of mu, and the sum of `two_logvar` is twice the gradient of logvar.
struct RatioGradient {
  float z, two_logvar;
};
AEVB_FORMULA RatioGradient gaussian_ratio_gradient(float mu, float sd, float slope, float eps, float g_z, float g,
                                                   bool path_only) {
  const float grad_z = fmadd(g, fmadd(slope, eps, mu), g_z);
  return {grad_z, fmadd(sd * eps, grad_z, path_only ? 0.0f : -g)};
}

}  // namespace
}  // namespace aevb

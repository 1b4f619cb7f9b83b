// SPDX-License-Identifier: Apache-2.0
// The diagonal Gaussian posterior q(z|x) = N(mu, exp(logvar)) against the prior N(0, I), one dimension at a time.
//
// Another prior, N(prior_mu, exp(prior_logvar)), is N(0, 1) where its mean is the origin and its standard deviation the
// unit. There q is N(d, exp(u)), d = (mu - prior_mu) exp(-prior_logvar / 2) and u = logvar - prior_logvar: the KL and
// the log ratio are those of (d, u) to N(0, 1), and nothing cancels where the posterior is close to the prior.
//
// Several of these functions called on the same logvar cost one exponential: the compiler merges the common part. Where
// every |logvar| is at most kModerateLogvar, Range::moderate gives the same bits for less.
#pragma once
#include "elementary.h"

namespace aevb {
namespace {

constexpr float kModerateLogvar = 44.0f;

// u = logvar - prior_logvar: the float next to it, and what that rounds away. An exponential would tell.
struct LogScale {
  float value, low;
};

AEVB_FORMULA float minus(float logvar) { return -logvar; }
AEVB_FORMULA LogScale minus(LogScale u) { return {-u.value, -u.low}; }

// exp(logvar / 2) and its differences.
template <Range kRange = Range::any>
AEVB_FORMULA ExpDifferences half_exp(float logvar) {
  return exp_differences<kRange>(0.5f * logvar);
}
template <Range kRange = Range::any>
AEVB_FORMULA ExpDifferences half_exp(LogScale u) {
  const ExpDifferences e = exp_differences<kRange>(0.5f * u.value);
  const float low = 0.5f * u.low, exp = at_most(e.exp, 3e38f), expm1 = at_most(e.expm1, 3e38f);  // inf * 0 is avoided
  return {fmadd(exp, low, e.exp), fmadd(exp, low, e.expm1), fmadd(expm1, low, e.expm1_minus_x)};
}

// The standard deviation, exp(logvar / 2).
template <Range kRange = Range::any, class Log>
AEVB_FORMULA float gaussian_sd(Log logvar) {
  return half_exp<kRange>(logvar).exp;
}

// z = mu + sd eps.  AEVB eq. 4.
AEVB_FORMULA float gaussian_sample(float mu, float sd, float eps) { return fmadd(sd, eps, mu); }

// 2 KL(q || N(0, 1)) = mu^2 + exp(logvar) - 1 - logvar.  AEVB appendix B.
// With h = logvar / 2, exp(2h) - 1 - 2h = expm1(h)^2 + 2 (expm1(h) - h): nothing cancels, however small the KL is.
template <Range kRange = Range::any, class Log>
AEVB_FORMULA float gaussian_two_kl(float mu, Log logvar) {
  const ExpDifferences e = half_exp<kRange>(logvar);
  return fmadd(mu, mu, fmadd(e.expm1, e.expm1, e.expm1_minus_x + e.expm1_minus_x));
}

// d KL / d logvar = (exp(logvar) - 1) / 2. (d KL / d mu is mu.)
template <Range kRange = Range::any, class Log>
AEVB_FORMULA float gaussian_kl_grad_logvar(Log logvar) {
  const ExpDifferences e = half_exp<kRange>(logvar);
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
template <class Log>
AEVB_FORMULA float gaussian_ratio_slope(Log logvar, bool path_only) {
  const ExpDifferences e = half_exp(logvar);
  return path_only ? e.expm1 - half_exp(minus(logvar)).expm1 : e.exp;  // sd - 1 / sd, or sd
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

// ---- another prior ------------------------------------------------------------------------------------------------

// logvar, or the end of its range that it is beyond, as by torch.clamp: a NaN stays one.
AEVB_FORMULA float clamped_logvar(float logvar, float min, float max) { return at_most(at_least(logvar, min), max); }
// The gradient of logvar before it was clamped, which is 0 beyond the range.
AEVB_FORMULA float clamped_gradient(float logvar, float min, float max, float grad) {
  return logvar >= min && logvar <= max ? grad : 0.0f;
}

// exp(-prior_logvar / 2) as two factors, so that it over- and underflows only where its product with a float does. The
// squares of such products are infinite or 0 where the exponent is cut.
struct InverseSd {
  float first, second;
};
AEVB_FORMULA InverseSd prior_inverse_sd(float prior_logvar) {
  const ExpReduction e = reduce_exp(at_least(at_most(-0.5f * prior_logvar, 150.0f), -150.0f));
  const PowerOf2 s = power_of_2(e.n_bits);
  return {fmadd(fmadd(e.q, e.r, 1.0f), e.r, 1.0f) * s.first, s.second};
}
AEVB_FORMULA float times(float x, InverseSd inverse_sd) { return x * inverse_sd.first * inverse_sd.second; }

AEVB_FORMULA LogScale log_scale(float logvar, float prior_logvar) {
  const float u = logvar - prior_logvar, added = u - logvar;
  const float low = (logvar - (u - added)) - (prior_logvar + added);
  return {u, low == low ? low : 0.0f};  // inf - inf is avoided
}

// d KL / d prior_logvar = -(d^2 + exp(u) - 1) / 2. With w = prior_logvar, d KL / d mu is d exp(-w / 2), and
// d KL / d prior_mu is minus that.
template <Range kRange = Range::any>
AEVB_FORMULA float gaussian_kl_grad_prior_logvar(float d, LogScale u) {
  const ExpDifferences e = half_exp<kRange>(u);
  return -0.5f * fmadd(d, d, e.expm1 * (e.expm1 + 2.0f));
}

// The log ratio's gradients by z and by logvar for a prior, with the factors of eps apart:
//   d (log q(z|x) - log p(z)) / dz = mu + slope eps, and exp(logvar / 2) times that is sd_mu + sd_slope eps.
// They are taken apart from each other, since one may overflow where the other does not.
struct RatioSlopes {
  float mu, slope, sd_mu, sd_slope;
};
AEVB_FORMULA RatioSlopes gaussian_ratio_slopes(float logvar, float d, LogScale u, InverseSd inverse_sd,
                                               bool path_only) {
  const ExpDifferences e = half_exp(u);
  const float slope = times(gaussian_ratio_slope(u, path_only), inverse_sd);
  // Of a posterior far narrower than the prior, the path's slope is -1 / sd. In units of the prior it might overflow.
  return {times(d, inverse_sd), path_only && u.value < -44.0f ? -exp_of(-0.5f * logvar) : slope, e.exp * d,
          path_only ? e.expm1 * (e.expm1 + 2.0f) : e.exp * e.exp};
}

AEVB_FORMULA RatioGradient gaussian_ratio_gradient(RatioSlopes s, float sd, float eps, float g_z, float g,
                                                   bool path_only) {
  const float of_ratio = fmadd(g * eps, fmadd(s.sd_slope, eps, s.sd_mu), path_only ? 0.0f : -g);
  return {fmadd(g, fmadd(s.slope, eps, s.mu), g_z), fmadd(sd * eps, g_z, of_ratio)};
}

// Gradients of one sample's log p(z), from the upstream gradient g of the log ratio: z at its place. z is d + sd eps
// for the prior, and `mu_slope`, `sd_slope` are d and sd times exp(-w / 2). The sum of `mu` over samples is the
// gradient of prior_mu, and the sum of `two_logvar` is twice the gradient of prior_logvar.
struct PriorGradient {
  float mu, two_logvar;
};
AEVB_FORMULA PriorGradient gaussian_prior_gradient(float d, float sd, float mu_slope, float sd_slope, float eps,
                                                   float g) {
  const float z = fmadd(sd, eps, d);
  return {-g * fmadd(sd_slope, eps, mu_slope), g * fmadd(-z, z, 1.0f)};
}

}  // namespace
}  // namespace aevb

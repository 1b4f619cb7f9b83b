// SPDX-License-Identifier: Apache-2.0
// The Gaussian likelihood of AEVB appendix C.2, one element at a time:
//   -log p = ((x_scale x - m)^2 exp(-logvar) + logvar + log(2 pi)) / 2.
// The decoder's output is the mean m, or with kSigmoid the logit of m (section 5). The residual is divided by the
// standard deviation before it is squared, so that a square over- or underflows only where -log p does. A logvar that
// is one number gives the bits of a tensor filled with it.
#pragma once
#include "bernoulli.h"

namespace aevb {
namespace {

// exp(-logvar / 2). A standard deviation below e^-88 counts as e^-88. So an element that the mean meets exactly, such
// as the black border of a picture, costs logvar alone and not 0 times infinity.
AEVB_FORMULA float gaussian_inverse_sd(float logvar) { return exp_of(at_most(-0.5f * logvar, 88.0f)); }

// (logvar + log(2 pi)) / 2.
AEVB_FORMULA float gaussian_log_normaliser(float logvar) { return fmadd(0.5f, logvar, 0.918938533f); }

// x_scale x - m, and dm / d output.
struct GaussianResidual {
  float value, slope;
};
template <bool kSigmoid>
AEVB_FORMULA GaussianResidual gaussian_residual(float output, float x, float x_scale) {
  if constexpr (!kSigmoid) return {fmadd(x_scale, x, -output), 1.0f};
  const SigmoidResidual r = sigmoid_residual(output, x, x_scale);
  return {r.residual, r.tail * (1.0f - r.tail)};
}

template <bool kSigmoid>
AEVB_FORMULA float add_gaussian(float sum, float output, float x, float x_scale, float inverse_sd, float normaliser) {
  const float standard = gaussian_residual<kSigmoid>(output, x, x_scale).value * inverse_sd;
  return sum + fmadd(0.5f * standard, standard, normaliser);
}

template <bool kSigmoid>
AEVB_FORMULA LikelihoodGradient gaussian_gradient(float output, float x, float x_scale, float inverse_sd) {
  const GaussianResidual r = gaussian_residual<kSigmoid>(output, x, x_scale);
  const float standard = r.value * inverse_sd;
  // The small factor multiplies first, to avoid 0 times infinity.
  return {standard * (r.slope * inverse_sd), fmadd(0.5f * standard, standard, -0.5f)};
}

// The Gaussian likelihood with one logvar, its scalar, for all elements.
template <bool kSigmoid>
struct FixedGaussian {
  static constexpr bool kProduct = false, kHeavy = false;
  static constexpr int kParams = 1;
  float x_scale, inverse_sd, normaliser;

  static AEVB_FORMULA FixedGaussian with_scalar(float x_scale, float logvar) {
    return {x_scale, gaussian_inverse_sd(logvar), gaussian_log_normaliser(logvar)};
  }

  AEVB_FORMULA NegLogProb add_neg_log_prob(float sum, float x, float output, float) const {
    return {add_gaussian<kSigmoid>(sum, output, x, x_scale, inverse_sd, normaliser), 0.0f};
  }
  AEVB_FORMULA LikelihoodGradient grad(float x, float output, float) const {
    return gaussian_gradient<kSigmoid>(output, x, x_scale, inverse_sd);
  }
};

// The Gaussian likelihood with a logvar for each element.
template <bool kSigmoid>
struct Gaussian {
  static constexpr bool kProduct = false, kHeavy = false;
  static constexpr int kParams = 2;
  float x_scale;

  AEVB_FORMULA NegLogProb add_neg_log_prob(float sum, float x, float output, float logvar) const {
    const float inverse_sd = gaussian_inverse_sd(logvar), normaliser = gaussian_log_normaliser(logvar);
    return {add_gaussian<kSigmoid>(sum, output, x, x_scale, inverse_sd, normaliser), 0.0f};
  }
  AEVB_FORMULA LikelihoodGradient grad(float x, float output, float logvar) const {
    return gaussian_gradient<kSigmoid>(output, x, x_scale, gaussian_inverse_sd(logvar));
  }
};

}  // namespace
}  // namespace aevb

// SPDX-License-Identifier: Apache-2.0
// The likelihoods: X(name, struct of formulas/). From this list are generated the enum of args.h, the CPU's switch, the
// GPU's kernels and what picks among them.
#pragma once

#define AEVB_LIKELIHOODS(X)               \
  X(bernoulli_logits, BernoulliLogits)    \
  X(bernoulli_probs, BernoulliProbs)      \
  X(gaussian, Gaussian<false>)            \
  X(gaussian_sigmoid, Gaussian<true>)     \
  X(gaussian_fixed, FixedGaussian<false>) \
  X(gaussian_sigmoid_fixed, FixedGaussian<true>)

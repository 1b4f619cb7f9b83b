// SPDX-License-Identifier: Apache-2.0
// The likelihoods: X(name, struct of formulas/, its parameters' names). From this list are generated the enum of
// args.h, the names that ops take, the CPU's switch, the GPU's kernels and what picks among them.
#pragma once

#define AEVB_LIKELIHOODS(X)                              \
  X(bernoulli_logits, BernoulliLogits, "logits")         \
  X(bernoulli_probs, BernoulliProbs, "probs")            \
  X(gaussian, Gaussian<false>, "mean", "logvar")         \
  X(gaussian_sigmoid, Gaussian<true>, "mean", "logvar")  \
  X(gaussian_fixed, FixedGaussian<false>, "mean")        \
  X(gaussian_sigmoid_fixed, FixedGaussian<true>, "mean") \
  X(laplace, Laplace, "mean", "log_scale")               \
  X(exponential, Exponential, "log_rate")                \
  X(mse, SquaredError, "mean")

// SPDX-License-Identifier: Apache-2.0
// The list of likelihoods, each as X(name, struct of formulas/, its parameters' names). It generates the enum of
// args.h, the names that ops take, the CPU's switch, and the GPU's kernels and their dispatch.
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

// SPDX-License-Identifier: Apache-2.0
// What a likelihood is: a struct of its numbers, such as x_scale, with two functions of one element of the decoder's
// output, with kLogvar also of its log-variance, and of the target:
//   add_neg_log_prob -> {sum + linear, excess}   -log p(x|z) = linear + log(1 + excess), excess >= 0
//   grad             -> d log p(x|z) / d output, and d logvar
// kProduct: whether it has an excess. A row is summed as sum(linear) + log(prod(1 + excess)): one logarithm serves many
// elements. kLoss: whether there is a negative ELBO with it, in one op.
#pragma once
#include "elementary.h"

namespace aevb {
namespace {

struct NegLogProb {
  float sum, excess;
};

struct LikelihoodGradient {
  float output, logvar;  // logvar: of likelihoods with kLogvar
};

}  // namespace
}  // namespace aevb

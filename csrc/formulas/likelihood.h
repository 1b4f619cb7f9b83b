// SPDX-License-Identifier: Apache-2.0
// The interface of a likelihood: a struct of its own numbers, x_scale first, with two functions of one element. Their
// arguments are the target x and the parameters, the decoder's outputs for the element. A likelihood has kParams
// parameters, and leaves the rest unnamed:
//   add_neg_log_prob(sum, x, p0, p1) -> {sum + linear, excess}   -log p(x|z) = linear + log(1 + excess), excess >= 0
//   grad(x, p0, p1)                  -> d log p(x|z) / d p0 and d p1
// Its constants, and its constructor if x_scale is not its only number:
//   kProduct: it has an excess. A row's sum is sum(linear) + log(prod(1 + excess)): one logarithm for many elements.
//     Without it the sum is sum + linear, rounded once: what is summed does not depend on the sum.
//   kHeavy: an element takes many registers, as logarithms do. So a GPU's thread takes fewer elements at once.
//   with_scalar(x_scale, scalar): constructs a likelihood that has a number of its own beside x_scale.
// Parameters are plain floats. With an array, or a struct that holds one, loops over elements are not vectorised.
#pragma once
#include "elementary.h"

namespace aevb {
namespace {

struct NegLogProb {
  float sum, excess;
};

struct LikelihoodGradient {
  float p0, p1;
};

}  // namespace
}  // namespace aevb

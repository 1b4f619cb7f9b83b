// SPDX-License-Identifier: Apache-2.0
// What a likelihood is: a struct of its numbers, x_scale first, with two functions of one element: its target x, and
// the numbers that a decoder gives of it, its parameters, of which it has kParams and leaves the rest unnamed:
//   add_neg_log_prob(sum, x, p0, p1) -> {sum + linear, excess}   -log p(x|z) = linear + log(1 + excess), excess >= 0
//   grad(x, p0, p1)                  -> d log p(x|z) / d p0 and d p1
// kProduct: whether it has an excess. A row is summed as sum(linear) + log(prod(1 + excess)): one logarithm serves many
// elements. kHeavy: whether an element takes many registers, as logarithms do: a GPU's thread then takes fewer at once.
// A likelihood with a number of its own, beside x_scale, has with_scalar(x_scale, scalar), which makes it.
// Parameters are plain floats: as an array, or a struct that holds one, loops over elements are not vectorised.
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

// SPDX-License-Identifier: Apache-2.0
// The structs of likelihood_list.h, by the likelihoods' names.
#pragma once
#include "../args.h"
#include "bernoulli.h"
#include "exponential.h"
#include "gaussian_likelihood.h"
#include "laplace.h"
#include "squared_error.h"

namespace aevb {
namespace {

template <Likelihood>
struct LikelihoodNamed;
#define AEVB_NAMED(name, Struct, ...)        \
  template <>                                \
  struct LikelihoodNamed<Likelihood::name> { \
    using Type = Struct;                     \
  };
AEVB_LIKELIHOODS(AEVB_NAMED)
#undef AEVB_NAMED

// Constructs a likelihood from its numbers: by with_scalar, if the likelihood has that.
template <class L>
AEVB_FORMULA auto made(float x_scale, float scalar, int) -> decltype(L::with_scalar(x_scale, scalar)) {
  return L::with_scalar(x_scale, scalar);
}
template <class L>
AEVB_FORMULA L made(float x_scale, float, long) {
  return {x_scale};
}
template <class L, class = void>
constexpr bool kHasScalar = false;
template <class L>
constexpr bool kHasScalar<L, decltype(static_cast<void>(L::with_scalar(0.0f, 0.0f)))> = true;

template <class L>
AEVB_FORMULA L likelihood_of(const LikelihoodArgs& a) {
  return made<L>(a.x_scale, a.scalar, 0);
}

}  // namespace
}  // namespace aevb

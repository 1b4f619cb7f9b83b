// SPDX-License-Identifier: Apache-2.0
// The Gaussian likelihoods' kernels.
#include "../formulas/gaussian_likelihood.h"
#include "likelihood.cuh"

namespace aevb::cuda {
namespace {

template <class L, class Use>
const char* with_elements(const L& likelihood, const LikelihoodArgs& a, bool narrow, const Use& use) {
  return with_dtype(a.output.dtype, [&](auto t) {
    constexpr int V = kWidest<decltype(t)>;
    if (narrow || !in_vectors<V>(a)) return use(likelihood, t, Constant<1>{}, AnyDtype{});
    if (a.x.dtype == Dtype::float32 && (!a.logvar.data || a.logvar.dtype == a.output.dtype))
      return use(likelihood, t, Constant<V>{}, float{});
    return use(likelihood, t, Constant<V>{}, AnyDtype{});
  });
}

template <class Use>
const char* with_gaussian(const LikelihoodArgs& a, bool narrow, const Use& use) {
  const auto with_means = [&](auto sigmoid) {
    constexpr bool kSigmoid = decltype(sigmoid)::value;
    if (a.logvar.data) return with_elements(GaussianMeansAndLogvars<kSigmoid>{a.x_scale}, a, narrow, use);
    return with_elements(GaussianMeans<kSigmoid>::with_logvar(a.fixed_logvar, a.x_scale), a, narrow, use);
  };
  switch (a.likelihood) {
    case Likelihood::gaussian: return with_means(Constant<false>{});
    case Likelihood::gaussian_sigmoid: return with_means(Constant<true>{});
    default: return kUnknownLikelihood;
  }
}

}  // namespace

const char* gaussian_likelihood(const LikelihoodArgs& a, int multiprocessors, float* scratch, void* stream) {
  return launch_likelihood(a, multiprocessors, scratch, stream,
                           [](const auto&... arguments) { return with_gaussian(arguments...); });
}

}  // namespace aevb::cuda

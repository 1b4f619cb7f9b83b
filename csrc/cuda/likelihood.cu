// SPDX-License-Identifier: Apache-2.0
// The Bernoulli likelihoods' kernels.
#include "../formulas/bernoulli.h"
#include "likelihood.cuh"

namespace aevb::cuda {
namespace {

template <class Use>
const char* with_bernoulli(const LikelihoodArgs& a, bool narrow, const Use& use) {
  return with_dtype(a.output.dtype, [&](auto t) {
    // Of float32 not the widest accesses: with 16 threads a row instead of 8 there are more loads under way.
    constexpr int V = sizeof(t) == 4 ? 2 : kWidest<decltype(t)>;
    const bool vectors = !narrow && in_vectors<V>(a);
    if (a.likelihood == Likelihood::bernoulli_probs) {
      const BernoulliProbs probs{a.x_scale};
      return vectors ? use(probs, t, Constant<V>{}, AnyDtype{}) : use(probs, t, Constant<1>{}, AnyDtype{});
    }
    if (a.likelihood != Likelihood::bernoulli_logits) return kUnknownLikelihood;
    const BernoulliLogits logits{a.x_scale};
    if (!vectors) return use(logits, t, Constant<1>{}, AnyDtype{});
    if (a.x.dtype == Dtype::uint8) return use(logits, t, Constant<V>{}, uint8_t{});
    return with_dtype(a.x.dtype, [&](auto x) { return use(logits, t, Constant<V>{}, x); });
  });
}

}  // namespace

int64_t likelihood_scratch(const LikelihoodArgs& a, int multiprocessors) {
  if (!a.log_prob) return 0;
  const int64_t parts = parts_of(a, multiprocessors).parts;
  return parts > 1 ? a.R * parts : 0;
}

const char* likelihood(const LikelihoodArgs& a, int multiprocessors, float* scratch, void* stream) {
  if (a.likelihood == Likelihood::gaussian || a.likelihood == Likelihood::gaussian_sigmoid)
    return gaussian_likelihood(a, multiprocessors, scratch, stream);
  return launch_likelihood(a, multiprocessors, scratch, stream,
                           [](const auto&... arguments) { return with_bernoulli(arguments...); });
}

}  // namespace aevb::cuda

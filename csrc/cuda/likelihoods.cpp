// SPDX-License-Identifier: Apache-2.0
// Dispatch to the kernels of a likelihood, which likelihood.cu has, compiled once for each likelihood.
#include "launchers.h"
#include "parts.h"

namespace aevb::cuda {

#define AEVB_DECLARE(name, ...) \
  const char* likelihood_##name(const LikelihoodArgs& a, int multiprocessors, float* scratch, void* stream);
AEVB_LIKELIHOODS(AEVB_DECLARE)
#undef AEVB_DECLARE

int64_t likelihood_scratch(const LikelihoodArgs& a, int multiprocessors) {
  if (!a.log_prob) return 0;
  const int64_t parts = parts_of(a, multiprocessors).parts;
  return parts > 1 ? a.R * parts : 0;
}

const char* likelihood(const LikelihoodArgs& a, int multiprocessors, float* scratch, void* stream) {
#define AEVB_CASE(name, ...) \
  case Likelihood::name: return likelihood_##name(a, multiprocessors, scratch, stream);
  switch (a.likelihood) { AEVB_LIKELIHOODS(AEVB_CASE) }
#undef AEVB_CASE
  return "aevb has no kernel for this likelihood";
}

}  // namespace aevb::cuda

// SPDX-License-Identifier: Apache-2.0
// The kernels of one likelihood, AEVB_LIKELIHOOD: the build compiles this file once for each of likelihood_list.h.
// Where none is named, those of all.
#include "likelihood.cuh"

namespace aevb::cuda {

#define AEVB_LAUNCHER(name, ...)                                                                              \
  const char* likelihood_##name(const LikelihoodArgs& a, int multiprocessors, float* scratch, void* stream) { \
    return launch_likelihood<LikelihoodNamed<Likelihood::name>::Type>(a, multiprocessors, scratch, stream);   \
  }
#ifdef AEVB_LIKELIHOOD
#define AEVB_ONE(name) AEVB_LAUNCHER(name)
AEVB_ONE(AEVB_LIKELIHOOD)
#else
AEVB_LIKELIHOODS(AEVB_LAUNCHER)
#endif

}  // namespace aevb::cuda

// SPDX-License-Identifier: Apache-2.0
// The kernels of the likelihood that AEVB_LIKELIHOOD names: the build compiles this file once for each likelihood of
// likelihood_list.h. Without that macro, the kernels of all likelihoods.
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

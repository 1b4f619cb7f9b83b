// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 with AVX2 and FMA.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>  // before the region, like every header from outside

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#pragma GCC optimize("schedule-insns", "sched-pressure")  // interleaves neighbouring vectors: 8% of the log-likelihood
#define AEVB_AVX2
#define AEVB_KERNELS avx2_kernels
#define AEVB_ISA_NAME "avx2"
#include "kernels.inl"
#pragma GCC pop_options
#endif

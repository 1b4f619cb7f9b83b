// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 with AVX-512 (F, VL, DQ, BW).
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>  // before the region, like every header from outside

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593, in GCC's own header
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,prefer-vector-width=512")
#define AEVB_AVX512
#define AEVB_KERNELS avx512_kernels
#define AEVB_ISA_NAME "avx512"
#include "kernels.inl"
#pragma GCC pop_options
#endif

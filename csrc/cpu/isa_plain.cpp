// SPDX-License-Identifier: Apache-2.0
// The kernels for any machine, without vector instructions of a particular instruction set.
#include "isa.h"

#if defined(__x86_64__)  // here only the tests run these kernels, and calls halve the time to compile
#define AEVB_CONVERSION __attribute__((noinline))
#endif
#define AEVB_KERNELS plain_kernels
#define AEVB_ISA_NAME "plain"
#include "kernels.inl"

// SPDX-License-Identifier: Apache-2.0
// The kernels for any machine, without vector instructions of its own.
#include "isa.h"

#define AEVB_KERNELS plain_kernels
#define AEVB_ISA_NAME "plain"
#include "kernels.inl"

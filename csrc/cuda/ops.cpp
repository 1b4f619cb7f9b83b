// SPDX-License-Identifier: Apache-2.0
// The ops of ops.h for a GPU.
//
// The tests' emulation compiles this file too, for CPU tensors and a namespace of its own.
#include "../ops.h"

#include "../schemas.h"
#include "gpu.h"

#ifdef AEVB_EMULATE
STABLE_TORCH_LIBRARY(aevb_emulated, m) { aevb::define_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(aevb_emulated, CPU, m) { AEVB_REGISTER(m, aevb::cuda::Gpu); }
#else
STABLE_TORCH_LIBRARY_IMPL(aevb, CUDA, m) { AEVB_REGISTER(m, aevb::cuda::Gpu); }
#endif

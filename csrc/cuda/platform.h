// SPDX-License-Identifier: Apache-2.0
// Differences between nvcc and the tests' emulation, in which g++ compiles the same kernels to run on a CPU.
#pragma once
#include <cstdint>

#ifdef AEVB_EMULATE
#include "cuda_shim.h"
#else
#include <cuda_runtime.h>
#define AEVB_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define AEVB_SHARED(T, name, n) __shared__ T name[n]
#endif

#define AEVB_DEVICE __device__ __forceinline__

// SPDX-License-Identifier: Apache-2.0
// Shared code of the launchers: grids, dtypes as types, and CUDA's errors.
#pragma once
#include "launchers.h"
#include "platform.h"
#include "vectors.cuh"

namespace aevb::cuda {

// The number of blocks that covers `work` where a block does `a_block` of it.
inline unsigned blocks(int64_t work, int64_t a_block) { return static_cast<unsigned>((work + a_block - 1) / a_block); }

// The error of the last launch, or null.
inline const char* status() {
  const cudaError_t error = cudaGetLastError();
  switch (error) {
    case cudaSuccess: return nullptr;
    case cudaErrorInsufficientDriver:
      return "the NVIDIA driver is older than the CUDA toolkit that aevb was built with; update the driver, or "
             "reinstall "
             "aevb with an nvcc of the driver's CUDA version on PATH, or with AEVB_CUDA=0 for plain PyTorch";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "aevb was not built for this GPU; reinstall it on this machine with AEVB_CUDA_ARCHS=native";
    default: return cudaGetErrorString(error);
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls use(T{}) with the element type T of a floating dtype.
template <class Use>
const char* with_dtype(Dtype dtype, const Use& use) {
  switch (dtype) {
    case Dtype::bfloat16: return use(BFloat16{});
    case Dtype::float16: return use(Float16{});
    case Dtype::float32: return use(float{});
    default: return "aevb has no kernel for this dtype";
  }
}

// Calls use(Constant<value>{}).
template <class Use>
void with_bool(bool value, const Use& use) {
  if (value)
    use(Constant<true>{});
  else
    use(Constant<false>{});
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::uint8 ? 1 : 2; }

inline bool is_aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

}  // namespace aevb::cuda

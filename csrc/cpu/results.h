// SPDX-License-Identifier: Apache-2.0
// Tensors for results. Large results come from the cache of buffers.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "../tensors.h"
#include "memory.h"

namespace aevb::cpu {

// An uninitialised contiguous tensor.
inline Tensor empty_result(const Sizes& sizes, ScalarType dtype) {
  int64_t numel = 1;
  for (int64_t size : sizes) numel *= size;
  const Sizes strides = contiguous_strides(sizes);
  const auto dimensions = static_cast<int64_t>(sizes.size());
  const size_t bytes = static_cast<size_t>(numel * item_size(dtype));
  AtenTensorHandle handle;
  if (bytes < kCachedBytes) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes.data(), strides.data(), dtype_code(dtype),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
  void* data = acquire_buffer(bytes);
  const AOTITorchError error = torch_from_blob(
      data, dimensions, sizes.data(), strides.data(), 0, dtype_code(dtype), aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void* buffer, void*) { release_buffer(buffer); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) release_buffer(data);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

}  // namespace aevb::cpu

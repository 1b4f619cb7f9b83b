// SPDX-License-Identifier: Apache-2.0
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include "memory.h"

namespace aevb::cpu {
namespace {

// The distance between rows of D elements where t is such rows, each a contiguous run; -1 where it is not.
int64_t row_stride(const Tensor& t, int64_t D) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t run = 1;  // elements that the dimensions seen so far cover without a gap
  int64_t d = static_cast<int64_t>(sizes.size()) - 1;
  for (; d >= 0 && run < D; --d) {
    if (sizes[d] == 1) continue;
    if (strides[d] != run) return -1;
    run *= sizes[d];
  }
  if (run != D) return -1;
  int64_t stride = D, rows = 1;
  for (; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (rows == 1)
      stride = strides[d];
    else if (strides[d] != stride * rows)
      return -1;
    rows *= sizes[d];
  }
  return stride;
}

}  // namespace

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Byte:
    case ScalarType::Bool: return Dtype::uint8;
    default: return Dtype::float32;
  }
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Matrix matrix(const Tensor& t, int64_t D) {
  if (t.is_contiguous() || t.numel() == 0) return {t, {t.const_data_ptr(), D, dtype_of(t)}};
  const int64_t stride = row_stride(t, D);
  if (stride >= 0) return {t, {t.const_data_ptr(), stride, dtype_of(t)}};
  const Tensor copy = torch::stable::contiguous(t);
  return {copy, {copy.const_data_ptr(), D, dtype_of(t)}};
}

Tensor empty(const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size());
  int64_t numel = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = numel;
    numel *= sizes[d] ? sizes[d] : 1;
  }
  for (int64_t size : sizes) numel *= size != 0;
  const int32_t dtype_code = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                             : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                             : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                             : aoti_torch_dtype_int64();
  const int64_t item = dtype == ScalarType::Float ? 4 : dtype == ScalarType::Long ? 8 : 2;
  const size_t bytes = static_cast<size_t>(numel * item);
  AtenTensorHandle handle;
  if (bytes < kCachedBytes) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                           strides.data(), dtype_code, aoti_torch_device_type_cpu(), 0,
                                                           &handle));
    return Tensor(handle);
  }
  void* data = acquire_buffer(bytes);
  const AOTITorchError error = torch_from_blob(
      data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, dtype_code,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* buffer, void*) { release_buffer(buffer); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) release_buffer(data);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

}  // namespace aevb::cpu

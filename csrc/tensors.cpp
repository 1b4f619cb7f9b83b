// SPDX-License-Identifier: Apache-2.0
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace aevb {
namespace {

// The stride between rows of D elements, if t consists of evenly spaced rows that are contiguous runs; else -1.
int64_t row_stride(const Tensor& t, int64_t D) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t run = 1;  // elements of the dimensions visited so far, which lie without a gap
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
    case ScalarType::Float: return Dtype::float32;
    default: fail("dtype_of", "no kernel takes dtype ", dtype_text(t.scalar_type()));
  }
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

bool is_one_number(const Tensor& t) {
  const auto strides = t.strides();
  return t.numel() > 0 && std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride == 0; });
}

Matrix matrix(const Tensor& t, int64_t D) {
  if (t.is_contiguous() || t.numel() == 0) return {t, {t.const_data_ptr(), D, dtype_of(t)}};
  const int64_t stride = row_stride(t, D);
  if (stride >= 0) return {t, {t.const_data_ptr(), stride, dtype_of(t)}};
  const Tensor copy = torch::stable::contiguous(t);
  return {copy, {copy.const_data_ptr(), D, dtype_of(t)}};
}

int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::Bool: return aoti_torch_dtype_bool();
    case ScalarType::Float: return aoti_torch_dtype_float32();
    default: fail("dtype_code", "no result has dtype ", dtype_text(dtype));
  }
}

int64_t item_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Long: return 8;
    case ScalarType::Bool: return 1;
    case ScalarType::Float: return 4;
    default: fail("item_size", "no result has dtype ", dtype_text(dtype));
  }
}

Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] ? sizes[d] : 1;
  }
  return strides;
}

}  // namespace aevb

// SPDX-License-Identifier: Apache-2.0
// Tensors as the kernels see them: matrices of rows.
#pragma once
#include "args.h"
#include "checks.h"

namespace aevb {

Dtype dtype_of(const Tensor& t);

// A tensor read as [rows, D], D counting its last elements; a copy is made only where rows are not evenly spaced runs.
struct Matrix {
  Tensor owner;
  Rows rows;
};
Matrix matrix(const Tensor& t, int64_t D);

Tensor dense(const Tensor& t);  // itself where it is contiguous

bool is_one_number(const Tensor& t);  // that was expanded: all elements lie in one place

// Torch's code for a dtype of results.
int32_t dtype_code(ScalarType dtype);
int64_t item_size(ScalarType dtype);

// The strides of a contiguous tensor.
Sizes contiguous_strides(const Sizes& sizes);

}  // namespace aevb

// SPDX-License-Identifier: Apache-2.0
// Tensors as the kernels see them: matrices of rows.
#pragma once
#include "args.h"
#include "checks.h"

namespace aevb {

Dtype dtype_of(const Tensor& t);

// A tensor read as [rows, D], where D elements of its last dimensions make a row. It is copied only if its rows are not
// evenly spaced runs.
struct Matrix {
  Tensor owner;  // keeps the memory of `rows` alive
  Rows rows;
};
Matrix matrix(const Tensor& t, int64_t D);

// t itself if it is contiguous, else a contiguous copy.
Tensor dense(const Tensor& t);

// Whether t is one number that was expanded: all its elements lie in one place.
bool is_one_number(const Tensor& t);

// Torch's code for the dtype of a result, and the bytes of an element.
int32_t dtype_code(ScalarType dtype);
int64_t item_size(ScalarType dtype);

// The strides of a contiguous tensor.
Sizes contiguous_strides(const Sizes& sizes);

}  // namespace aevb

// SPDX-License-Identifier: Apache-2.0
// Tensors as the CPU kernels see them: matrices of rows, and fresh results.
#pragma once
#include "../checks.h"
#include "isa.h"

namespace aevb::cpu {

Dtype dtype_of(const Tensor& t);

// A tensor read as [rows, D], D counting its last elements; a copy is made only where rows are not evenly spaced runs.
struct Matrix {
  Tensor owner;
  Rows rows;
};
Matrix matrix(const Tensor& t, int64_t D);

Tensor dense(const Tensor& t);  // itself where it is contiguous

Tensor empty(const Sizes& sizes, ScalarType dtype);

}  // namespace aevb::cpu

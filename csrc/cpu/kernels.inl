// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set, as one table. Each isa_*.cpp includes this file inside its target region.
#include "activation_rows.h"
#include "binarize_rows.h"
#include "gaussian_rows.h"
#include "likelihood_rows.h"
#include "sparse_rows.h"

namespace aevb::cpu {
namespace {

// The sum of n elements, x[0], x[stride], ..., in the order of a row.
float sum_elements(const float* x, int64_t n, int64_t stride) {
  alignas(64) float buffer[kGroup] = {};
  RowSum sum;
  for (int64_t i = 0; i < n; i += kGroup) {
    const int count = static_cast<int>(n - i < kGroup ? n - i : kGroup);
    for (int k = 0; k < count; ++k) buffer[k] = x[(i + k) * stride];
    sum.add(buffer, count);
  }
  return sum.total();
}

float sum_groups(const float* x, int64_t n) {
  PairwiseSum sum;
  for (int64_t i = 0; i < n; ++i) sum.add(x[i]);
  return sum.total();
}

void normals(uint64_t seed, int64_t first, int64_t n, float* out) {
  Noise<kTile> noise;
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = n - i < kTile ? n - i : kTile;
    __builtin_memcpy(out + i, noise.fill(seed, first + i, count), count * sizeof(float));
  }
}

template <class F>
AEVB_FORMULA void map(const float* x, float* y, int64_t n, const F& f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = f(x[i]);
}

void elementary(const ElementaryArgs& a) {
  switch (a.function) {
    case Elementary::exp: return map(a.x, a.y, a.n, [](float v) { return exp_of(v); });
    case Elementary::exp_minus: return map(a.x, a.y, a.n, [](float v) { return exp_minus(v); });
    case Elementary::expm1: return map(a.x, a.y, a.n, [](float v) { return exp_differences(v).expm1; });
    case Elementary::expm1_minus_x: return map(a.x, a.y, a.n, [](float v) { return exp_differences(v).expm1_minus_x; });
    case Elementary::tanh: return map(a.x, a.y, a.n, [](float v) { return tanh_of(v); });
    case Elementary::log: return map(a.x, a.y, a.n, [](float v) { return log_of(v); });
    case Elementary::log1p: return map(a.x, a.y, a.n, [](float v) { return log1p_nonnegative(v); });
    case Elementary::log_one_minus: return map(a.x, a.y, a.n, [](float v) { return log_one_minus(v); });
    case Elementary::rcp: return map(a.x, a.y, a.n, [](float v) { return rcp_in_range(v); });
    case Elementary::sqrt: return map(a.x, a.y, a.n, [](float v) { return sqrt_in_range(v); });
    case Elementary::bfloat16: return map(a.x, a.y, a.n, [](float v) { return from_bfloat16(to_bfloat16(v)); });
    case Elementary::float16: return map(a.x, a.y, a.n, [](float v) { return from_float16(to_float16(v)); });
  }
}

}  // namespace

extern const Kernels AEVB_KERNELS;
const Kernels AEVB_KERNELS = {
    AEVB_ISA_NAME,
    gaussian_rows,
    gaussian_backward_rows,
    gaussian_log_ratio_rows,
    gaussian_log_ratio_backward_rows,
    likelihood_rows,
    binarize_rows,
    activation_rows,
    activation_backward_rows,
    kSparseBlock,
    kSparseColumns,
    sparse_linear_scratch,
    sparse_gradient_scratch,
    sparse_row_lists,
    sparse_linear_tiles,
    sparse_column_lists,
    sparse_gradient_tiles,
    sum_elements,
    sum_groups,
    normals,
    elementary,
};

}  // namespace aevb::cpu

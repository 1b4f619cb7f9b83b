// SPDX-License-Identifier: Apache-2.0
// The loss, from the log-likelihood and the KL of every row; sums of parts of rows; and small elementwise kernels.
#include "../formulas/elementary.h"
#include "division.h"
#include "grids.h"
#include "launchers.h"
#include "sums.cuh"

namespace aevb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 2048;  // datapoints of a block

// ---- parts of rows --------------------------------------------------------------------------------------------------

// out[row] = factor * the sum of row `row` of partial [rows, parts]. A block takes a row.
__global__ void __launch_bounds__(kThreads)
    join_parts(const float* __restrict__ partial, int64_t parts, float factor, float* __restrict__ out) {
  constexpr int kSubtree = 2 * kThreads;
  AEVB_SHARED(float, node, kSubtree);
  const float* x = partial + blockIdx.x * parts;
  const int i = threadIdx.x;
  TreeSum<24> sum;
  for (int64_t first = 0; first < parts; first += kSubtree) {
    int n = static_cast<int>(parts - first < kSubtree ? parts - first : kSubtree);
    for (int k = i; k < n; k += kThreads) node[k] = x[first + k];
    __syncthreads();
    while (n > 1) {
      const float pair = 2 * i + 1 < n ? node[2 * i] + node[2 * i + 1] : (2 * i < n ? node[2 * i] : 0.0f);
      __syncthreads();
      n = (n + 1) / 2;
      if (i < n) node[i] = pair;
      __syncthreads();
    }
    sum.add(node[0]);
    __syncthreads();
  }
  if (i == 0) out[blockIdx.x] = factor * sum.total();
}

// ---- the loss -------------------------------------------------------------------------------------------------------

// The sum of n elements, x[0], x[stride], ..., x[(n - 1) stride], by one thread.
AEVB_DEVICE float sum_elements(const float* x, int64_t n, int64_t stride) {
  TreeSum<24> sum;
  for (int64_t group = 0; group < n; group += kGroup) {
    float lane[kLanes] = {};
    const int64_t end = group + kGroup < n ? group + kGroup : n;
    for (int64_t step = group; step < end; step += kLanes) {
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        if (step + k < end) lane[k] += x[(step + k) * stride];
    }
    sum.add(fold_strided<1>(lane));
  }
  return sum.total();
}

constexpr int kTerms = 3;  // the loss, the log-likelihood, the KL

struct LossKernelArgs {
  LossArgs loss;
  float one_over_L;
  Divider tiles;          // blocks of a term
  float* result[kTerms];  // [B]: of each datapoint; or [tiles]: the sum of each tile
  float factor;           // multiplies the sums
};

template <bool kReduce, bool kOneSample>
__global__ void __launch_bounds__(kThreads) datapoint_losses(const LossKernelArgs a) {
  AEVB_SHARED(float, tile, kTile);
  AEVB_SHARED(float, group_sum, kTile / kGroup);
  const int64_t term = a.tiles.divide(blockIdx.x), own_tile = blockIdx.x - term * a.tiles.divisor();
  const int64_t B = a.loss.B, first = own_tile * kTile;
  float* result = a.result[term];
  const int n = static_cast<int>(B - first < kTile ? B - first : kTile);
  const float beta = a.loss.beta ? a.loss.beta_scale * *a.loss.beta : a.loss.beta_scale;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float* log_prob = a.loss.log_prob + first + i;
    float mean = *log_prob;
    if constexpr (!kOneSample) mean = sum_elements(log_prob, a.loss.L, B) * a.one_over_L;
    const float kl = a.loss.kl[first + i], value = term == 0 ? fmadd(beta, kl, -mean) : (term == 1 ? mean : kl);
    if constexpr (kReduce)
      tile[i] = value;
    else
      result[first + i] = value;
  }
  if constexpr (kReduce) {
    __syncthreads();
    sum_groups<kWarp, kThreads>(tile, 1, n, group_sum, [&](int, float sum) { result[own_tile] = a.factor * sum; });
  }
}

// ---- elementwise ----------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) scale_elements(const ScaleArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.n) return;
  const float scale = a.beta ? a.scale * *a.beta : a.scale;
  a.result[i] = scale * a.x[i * a.x_stride];
}

__global__ void __launch_bounds__(kThreads) elementary_function(const ElementaryArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.n) return;
  const float x = a.x[i];
  float y = 0.0f;
  switch (a.function) {
    case Elementary::exp: y = exp_of(x); break;
    case Elementary::exp_minus: y = exp_minus(x); break;
    case Elementary::expm1: y = exp_differences(x).expm1; break;
    case Elementary::expm1_minus_x: y = exp_differences(x).expm1_minus_x; break;
    case Elementary::tanh: y = tanh_of(x); break;
    case Elementary::log: y = log_of(x); break;
    case Elementary::log1p: y = log1p_nonnegative(x); break;
    case Elementary::log_one_minus: y = log_one_minus(x); break;
    case Elementary::rcp: y = rcp_in_range(x); break;
    case Elementary::sqrt: y = sqrt_in_range(x); break;
    case Elementary::bfloat16: y = round_to<BFloat16>(x); break;
    case Elementary::float16: y = round_to<Float16>(x); break;
  }
  a.y[i] = y;
}

int64_t tiles_of(const LossArgs& a) { return (a.B + kTile - 1) / kTile; }
int terms_of(const LossArgs& a) { return a.log_likelihood ? kTerms : 1; }

}  // namespace

const char* join(const float* partial, int64_t rows, int64_t parts, float factor, float* out, void* stream) {
  AEVB_LAUNCH(join_parts, blocks(rows, 1), kThreads, static_cast<cudaStream_t>(stream), partial, parts, factor, out);
  return status();
}

int64_t loss_scratch(const LossArgs& a) {
  return a.reduction != Reduction::none && tiles_of(a) > 1 ? tiles_of(a) * terms_of(a) : 0;
}

const char* loss(const LossArgs& a, float* scratch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t tiles = tiles_of(a);
  const int terms = terms_of(a);
  float* const results[kTerms] = {a.loss, a.log_likelihood, a.kl_term};
  const bool reduced = a.reduction != Reduction::none, cut = reduced && tiles > 1;
  const float factor = a.reduction == Reduction::mean ? 1.0f / static_cast<float>(a.B) : 1.0f;
  if (tiles > 0) {
    LossKernelArgs args{a, 1.0f / static_cast<float>(a.L), Divider(tiles), {}, cut ? 1.0f : factor};
    for (int term = 0; term < terms; ++term) args.result[term] = cut ? scratch + term * tiles : results[term];
    with_bool(a.L == 1, [&](auto one_sample) {
      with_bool(reduced, [&](auto reduces) {
        AEVB_LAUNCH((datapoint_losses<reduces.value, one_sample.value>), blocks(tiles * terms, 1), kThreads, on, args);
      });
    });
    if (const char* error = status()) return error;
  }
  for (int term = 0; term < terms && reduced && (cut || tiles == 0); ++term)
    if (const char* error = join(scratch + term * tiles, 1, tiles, factor, results[term], stream)) return error;
  return nullptr;
}

const char* scale(const ScaleArgs& a, void* stream) {
  if (a.n == 0) return nullptr;
  AEVB_LAUNCH(scale_elements, blocks(a.n, kThreads), kThreads, static_cast<cudaStream_t>(stream), a);
  return status();
}

const char* elementary(const ElementaryArgs& a, void* stream) {
  if (a.n == 0) return nullptr;
  AEVB_LAUNCH(elementary_function, blocks(a.n, kThreads), kThreads, static_cast<cudaStream_t>(stream), a);
  return status();
}

#ifndef AEVB_EMULATE
int multiprocessors(int device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess) return count;
  cudaGetLastError();  // clears the error: the next launch reports it
  return 0;
}
#endif

}  // namespace aevb::cuda

// SPDX-License-Identifier: Apache-2.0
// A step of Adam over all weights of a model in one launch. PyTorch's fused kernel gives each block 65536 weights and
// computes in float64. Below some ten million weights it leaves most of a GPU idle.
#include "../formulas/adam.h"
#include "grids.h"
#include "launchers.h"

namespace aevb::cuda {
namespace {

constexpr int kThreads = 256, kVectors = 2;          // a thread takes kVectors vectors of 4 weights
constexpr int64_t kBlock = 4 * kVectors * kThreads;  // weights of a block

// The tensor of a block, and the block's first weight in it.
struct Place {
  int tensor;
  int64_t first;
};
AEVB_DEVICE Place place_of_block(const AdamArgs& a, int64_t block) {
  int tensor = 0;
  while (tensor + 1 < a.count && block >= a.first_block[tensor + 1]) ++tensor;
  return {tensor, (block - a.first_block[tensor]) * kBlock};
}

template <int V>
AEVB_DEVICE void update(const AdamArgs& a, const AdamTensor& t, const AdamScales& scales, int64_t i) {
  float weight[V], grad[V], mean[V], square[V];
  load<V>(t.weight + i).unpack_to(weight);
  load<V>(t.grad + i).unpack_to(grad);
  load<V>(t.mean + i).unpack_to(mean);
  load<V>(t.square + i).unpack_to(square);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const AdamState s = adam_update({weight[j], mean[j], square[j]}, grad[j], scales, a.beta1, a.beta2, a.eps);
    weight[j] = s.weight, mean[j] = s.mean, square[j] = s.square;
  }
  store<V>(weight, t.weight + i);
  store<V>(mean, t.mean + i);
  store<V>(square, t.square + i);
}

__global__ void __launch_bounds__(kThreads) adam_step(const AdamArgs a) {
  const Place place = place_of_block(a, blockIdx.x);
  const AdamTensor& t = a.tensor[place.tensor];
  const AdamScales scales = adam_scales(a.lr ? *a.lr : a.fixed_lr, a.log_beta1, a.log_beta2, *t.step);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t i = place.first + 4 * (static_cast<int64_t>(k) * kThreads + threadIdx.x);
    if (t.in_vectors && i + 4 <= t.size) {
      update<4>(a, t, scales, i);
    } else {
#pragma unroll 1
      for (int64_t j = i; j < i + 4 && j < t.size; ++j) update<1>(a, t, scales, j);
    }
  }
}

}  // namespace

const char* adam(AdamArgs& a, void* stream) {
  int64_t total = 0;
  for (int i = 0; i < a.count; ++i) {
    AdamTensor& t = a.tensor[i];
    a.first_block[i] = total;
    total += (t.size + kBlock - 1) / kBlock;
    t.in_vectors =
        is_aligned(t.weight, 16) && is_aligned(t.grad, 16) && is_aligned(t.mean, 16) && is_aligned(t.square, 16);
  }
  if (total == 0) return nullptr;
  AEVB_LAUNCH(adam_step, blocks(total, 1), kThreads, static_cast<cudaStream_t>(stream), a);
  return status();
}

}  // namespace aevb::cuda

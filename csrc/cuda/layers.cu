// SPDX-License-Identifier: Apache-2.0
// A layer's work around its matrix products, which are cuBLAS's: bias and activation, their gradients, operands as
// bfloat16 pieces for tensor cores, and sums of a product's pieces.
#include "../formulas/activation.h"
#include "division.h"
#include "grids.h"
#include "launchers.h"
#include "sums.cuh"
#include "vectors.cuh"

namespace aevb::cuda {
namespace {

constexpr int kThreads = 256;

// Calls use(Constant<activation>{}).
template <class Use>
void with_activation(Activation activation, const Use& use) {
  switch (activation) {
    case Activation::tanh: return use(Constant<static_cast<int>(Activation::tanh)>{});
    case Activation::relu: return use(Constant<static_cast<int>(Activation::relu)>{});
    case Activation::none: return use(Constant<static_cast<int>(Activation::none)>{});
  }
}

// ---- sums of pieces, bias and activation ----------------------------------------------------------------------------

struct PiecesKernelArgs {
  PiecesArgs pieces;
  Divider row_vectors;  // D / V
  int64_t vectors;      // rows * D / V
};

// activation(scale * the sum of pieces + bias). A thread takes V neighbouring elements. The sum begins with the last
// piece, which of a split number is the smallest.
template <Activation kActivation, int V>
__global__ void __launch_bounds__(kThreads) sum_of_pieces(const PiecesKernelArgs k) {
  const PiecesArgs& a = k.pieces;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= k.vectors) return;
  const int64_t row = k.row_vectors.divide(vector), column = (vector - row * k.row_vectors.divisor()) * V;
  const float* piece = a.pieces + row * a.row_stride + column;
  float sum[V], x[V];
  load<V>(piece + (a.count - 1) * a.piece_stride).unpack_to(sum);
#pragma unroll 4
  for (int64_t p = a.count - 2; p >= 0; --p) {
    load<V>(piece + p * a.piece_stride).unpack_to(x);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += x[i];
  }
  if (a.bias) load<V>(a.bias + column).unpack_to(x);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float value = a.scale * sum[i];
    if (a.bias) value += x[i];
    sum[i] = activated<kActivation>(value);
  }
  store<V>(sum, a.out + row * a.D + column);
}

template <int V>
bool in_vectors(const PiecesArgs& a) {
  return a.D % V == 0 && a.row_stride % V == 0 && a.piece_stride % V == 0 && is_aligned(a.pieces, 4 * V) &&
         is_aligned(a.out, 4 * V) && is_aligned(a.bias, 4 * V);
}

// ---- gradients of bias and activation -------------------------------------------------------------------------------

constexpr int kColumns = kWarp, kBlocksOfRows = kThreads / kColumns;  // columns and blocks of rows of a thread block

struct ActivationKernelArgs {
  ActivationArgs activation;
  Divider column_blocks;  // D / kColumns, rounded up
  int64_t row_blocks;     // rows / kActivationBlock, rounded up
};

// Gradients of the activation's input, and of the bias. A thread goes down kActivationBlock rows of a column. Where one
// thread block holds all blocks of rows, it joins their sums too.
template <Activation kActivation>
__global__ void __launch_bounds__(kThreads) activation_gradients(const ActivationKernelArgs k) {
  AEVB_SHARED(float, sums, kThreads);
  constexpr int kAtOnce = 16;  // rows in flight
  const ActivationArgs& a = k.activation;
  const int64_t D = a.D, group = k.column_blocks.divide(blockIdx.x);
  const int64_t column = (blockIdx.x - group * k.column_blocks.divisor()) * kColumns + threadIdx.x % kColumns;
  const int64_t block = group * kBlocksOfRows + threadIdx.x / kColumns;
  const bool there = column < D && block < k.row_blocks;
  float sum = 0.0f;
  if (there) {
    int64_t row = block * kActivationBlock;
    const int64_t last = row + kActivationBlock < a.rows ? row + kActivationBlock : a.rows;
    const auto add = [&](int64_t at, float y, float grad) {
      const float g = activation_gradient<kActivation>(y, grad);
      if (kActivation != Activation::none) a.grad_input[at] = g;
      sum += g;
    };
    const auto value = [&](int64_t at) { return kActivation == Activation::none ? 0.0f : a.out[at]; };
    for (; row + kAtOnce <= last; row += kAtOnce) {
      float y[kAtOnce], grad[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        y[j] = value((row + j) * D + column);
        grad[j] = a.grad[(row + j) * a.grad_stride + column];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) add((row + j) * D + column, y[j], grad[j]);
    }
    for (; row < last; ++row) add(row * D + column, value(row * D + column), a.grad[row * a.grad_stride + column]);
    if (k.row_blocks > kBlocksOfRows) a.partial_sum[block * D + column] = sum;
  }
  if (k.row_blocks > kBlocksOfRows) return;  // uniform over the grid
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kColumns || column >= D) return;
  double total = 0.0;
  for (int b = 0; b < k.row_blocks; ++b) total += static_cast<double>(sums[b * kColumns + threadIdx.x]);
  a.grad_bias[column] = static_cast<float>(total);
}

// grad_bias [D] from the partial sums of the blocks of rows, [row_blocks, D].
__global__ void __launch_bounds__(kThreads) join_row_blocks(const ActivationKernelArgs k) {
  const ActivationArgs& a = k.activation;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= a.D) return;
  double total = 0.0;
#pragma unroll 8
  for (int64_t block = 0; block < k.row_blocks; ++block)
    total += static_cast<double>(a.partial_sum[block * a.D + column]);
  a.grad_bias[column] = static_cast<float>(total);
}

int64_t row_blocks_of(const ActivationArgs& a) { return (a.rows + kActivationBlock - 1) / kActivationBlock; }

// ---- float32 as bfloat16 pieces -------------------------------------------------------------------------------------

struct SplitKernelArgs {
  SplitArgs split;
  Divider row_vectors;  // width / V
  int64_t vectors;      // height * width / V
};

// Reads elements [column, column + V) of a row [D] to x [V], with 0 beyond D.
template <int V, class T>
AEVB_DEVICE void read_padded(const T* row, int64_t column, int64_t D, bool wide, float* x) {
  if (wide && column + V <= D) return load<V>(row + column).unpack_to(x);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = column + i < D ? load_one(row + column + i) : 0.0f;
}

// The bfloat16 pieces of x. A thread takes V neighbouring elements of a row.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) split_rows(const SplitKernelArgs k, bool wide) {
  const SplitArgs& a = k.split;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= k.vectors) return;
  const int64_t row = k.row_vectors.divide(vector), column = (vector - row * k.row_vectors.divisor()) * V;
  float high[V] = {}, middle[V] = {}, low[V] = {};
  if (row < a.rows) read_padded<V>(static_cast<const T*>(a.x.data) + row * a.x.stride, column, a.D, wide, high);
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      // The rest of x after a piece is exact. A rest that is not finite counts as 0.
      const auto rest = [](float x) {
        const float left = x - round_to<BFloat16>(x);
        return abs_of(left) < infinity() ? left : 0.0f;
      };
      middle[i] = rest(high[i]);
      low[i] = rest(middle[i]);
    }
  }
  BFloat16* to = static_cast<BFloat16*>(a.to) + row * a.row_stride + column;
  for (int p = 0; p < a.pieces; ++p, to += a.piece_stride) {
    const uint32_t which = a.order >> (2 * p) & 3u;
    store<V>(which == 0 ? high : which == 1 ? middle : low, to);
  }
}

// ---- terms of a training step ---------------------------------------------------------------------------------------

constexpr int kTermThreads = 1024;

// The sum of x [n], by all threads of the grid's only block. node: [kTermThreads], shared memory.
AEVB_DEVICE float sum_by_block(const float* x, int64_t n, float* node) {
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kTermThreads) sum += x[i];
  node[threadIdx.x] = sum;
  for (int width = kTermThreads / 2; width >= 1; width /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(width)) node[threadIdx.x] += node[threadIdx.x + width];
  }
  __syncthreads();
  return node[0];
}

__global__ void __launch_bounds__(kTermThreads) terms_of_loss(const TermsArgs a, float one_over_R, float one_over_B) {
  AEVB_SHARED(float, log_prob_node, kTermThreads);
  AEVB_SHARED(float, kl_node, kTermThreads);
  const float log_prob = one_over_R * sum_by_block(a.log_prob, a.R, log_prob_node);
  const float kl = one_over_B * sum_by_block(a.kl, a.B, kl_node);
  if (threadIdx.x > 0) return;
  const float weighed = (a.beta ? a.beta_scale * *a.beta : a.beta_scale) * kl;
  a.terms[0] = weighed - log_prob;
  a.terms[1] = kl;
  a.terms[2] = weighed - kl;
}

}  // namespace

const char* add_pieces(const PiecesArgs& a, void* stream) {
  if (a.rows == 0 || a.D == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  const auto launch = [&](auto v) {
    constexpr int V = decltype(v)::value;
    const PiecesKernelArgs args{a, Divider(a.D / V), a.rows * (a.D / V)};
    with_activation(a.activation, [&](auto activation) {
      AEVB_LAUNCH((sum_of_pieces<static_cast<Activation>(activation.value), V>), blocks(args.vectors, kThreads),
                  kThreads, on, args);
    });
  };
  if (in_vectors<4>(a))
    launch(Constant<4>{});
  else
    launch(Constant<1>{});
  return status();
}

int64_t activation_scratch(const ActivationArgs& a) {
  return row_blocks_of(a) > kBlocksOfRows ? row_blocks_of(a) * a.D : 0;
}

const char* activation_backward(const ActivationArgs& a, float* scratch, void* stream) {
  if (a.D == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t column_blocks = (a.D + kColumns - 1) / kColumns, row_blocks = row_blocks_of(a);
  ActivationKernelArgs args{a, Divider(column_blocks), row_blocks};
  args.activation.partial_sum = scratch;
  const int64_t groups = row_blocks ? (row_blocks + kBlocksOfRows - 1) / kBlocksOfRows : 1;
  with_activation(a.activation, [&](auto activation) {
    AEVB_LAUNCH((activation_gradients<static_cast<Activation>(activation.value)>), blocks(groups * column_blocks, 1),
                kThreads, on, args);
  });
  const char* error = status();
  if (error || row_blocks <= kBlocksOfRows) return error;
  AEVB_LAUNCH(join_row_blocks, blocks(a.D, kThreads), kThreads, on, args);
  return status();
}

const char* split_bfloat16(const SplitArgs& a, void* stream) {
  constexpr int V = 4;
  if (a.height == 0 || a.width == 0) return nullptr;
  const SplitKernelArgs args{a, Divider(a.width / V), a.height * (a.width / V)};
  const bool bytes = a.x.dtype == Dtype::uint8;
  const bool wide = a.x.stride % V == 0 && is_aligned(a.x.data, V * size_of(a.x.dtype));
  const auto on = static_cast<cudaStream_t>(stream);
  if (bytes)
    AEVB_LAUNCH((split_rows<uint8_t, V>), blocks(args.vectors, kThreads), kThreads, on, args, wide);
  else
    AEVB_LAUNCH((split_rows<float, V>), blocks(args.vectors, kThreads), kThreads, on, args, wide);
  return status();
}

const char* terms(const TermsArgs& a, void* stream) {
  AEVB_LAUNCH(terms_of_loss, 1u, kTermThreads, static_cast<cudaStream_t>(stream), a, 1.0f / static_cast<float>(a.R),
              1.0f / static_cast<float>(a.B));
  return status();
}

}  // namespace aevb::cuda

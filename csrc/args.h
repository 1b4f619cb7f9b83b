// SPDX-License-Identifier: Apache-2.0
// What the kernels of every device are given: matrices of rows, numbers, and where the results go. No torch here.
#pragma once
#include <cstdint>

#include "formulas/likelihood_list.h"

namespace aevb {

enum class Dtype { float32, bfloat16, float16, uint8 };  // bool is read as uint8

// The order in which a row is summed (csrc/README.md).
constexpr int kLanes = 32;   // lane k of a group adds elements k, k + 32, k + 64, ...
constexpr int kGroup = 512;  // elements of a row summed lane by lane before the lanes are folded

// A matrix [rows, D] as the kernels read it: unit stride within a row.
struct Rows {
  const void* data = nullptr;  // null: the argument is absent
  int64_t stride = 0;          // elements from one row to the next
  Dtype dtype = Dtype::float32;
};

// z = mu + exp(logvar / 2) * normal(seed, element) and KL, and their gradients.
struct GaussianArgs {
  Rows mu, logvar;              // [B, D]
  int64_t B, D, L;              // L samples a row
  const int64_t* seeds;         // [L * B * D / seed_block]
  int64_t seed_block;           // elements of z that one seed numbers from 0
  void* z;                      // [L, B, D], mu's dtype; null: KL only
  float* kl;                    // [B]
  float* log_ratio;             // [L, B], log q(z|x) - log p(z), by kernels of its own; null: not asked for
  Rows grad_z;                  // [L * B, D], mu's dtype, or absent
  const float* grad_log_ratio;  // [L, B], or null: none
  const float* sample_weight;   // [L, B], multiplies grad_z (grad_log_ratio has it already); null: 1
  bool path_only;               // q's own mu and logvar count as constants in log q(z|x)
  const float* grad_kl;         // [B], or [1] with stride 0; null: none
  int64_t grad_kl_stride;       // 1 or 0
  float grad_kl_scale;          // multiplies grad_kl
  const float* beta;            // [], multiplies it too; null: 1
  void *grad_mu, *grad_logvar;  // [B, D], mu's dtype
};

#define AEVB_NAME(name, ...) name,
enum class Likelihood { AEVB_LIKELIHOODS(AEVB_NAME) };
#undef AEVB_NAME

constexpr int kMostParams = 2;  // of a likelihood

// log p(x|z) of each row of a decoder's outputs, its gradient, or both: a null result is not computed. Row l * x_rows +
// b of the parameters goes with row b of x.
struct LikelihoodArgs {
  Likelihood likelihood;
  Rows param[kMostParams];  // [R, D]; those that the likelihood has not are absent
  float scalar;             // of a likelihood that has one, such as the logvar of all elements
  Rows x;                   // [x_rows, D]
  float x_scale;            // multiplies x
  int64_t R, x_rows, D;
  float* log_prob;    // [R]
  const float* grad;  // upstream, at l * grad_sample_stride + b * grad_stride; null: 1 (with log_prob)
  int64_t grad_sample_stride, grad_stride;  // 0 or more
  float grad_scale;                         // multiplies the gradient before `grad` does
  bool done_for_1;                          // the gradient is there already if `grad`, one number, is 1
  void* grad_param[kMostParams];            // [R, D], its parameter's dtype; may be that itself, if it is contiguous
};

inline bool wants_gradient(const LikelihoodArgs& a) {
  for (void* grad : a.grad_param)
    if (grad) return true;
  return false;
}

enum class Reduction { none = 0, mean = 1, sum = 2 };

// The loss of B datapoints: beta KL - the mean over L samples of log p(x|z).
struct LossArgs {
  const float* log_prob;  // [L, B]
  const float* kl;        // [B]
  int64_t L, B;
  float beta_scale;   // the KL's weight, times
  const float* beta;  // [], or null: 1
  Reduction reduction;
  float* loss;  // [B], or [] when reduced
};

// result[i] = scale * beta * x[i * x_stride]: the gradient of a KL that was given.
struct ScaleArgs {
  const float* x;
  int64_t x_stride, n;
  float scale;
  const float* beta;  // [], or null: 1
  float* result;      // [n]
};

// Standard normals: `blocks` runs of n elements, each under its own seed.
struct NormalArgs {
  const int64_t* seeds;  // [blocks]
  int64_t blocks, n;
  float* eps;  // [blocks, n]
};

struct MixSeedArgs {
  const int64_t *seed, *index;  // [n]
  int64_t n;
  int64_t* mixed;  // [n]
};

// x[b, d] = whether pixel d of image index[b] is set, by the noise of the seed mix_seed(seed, index[b]).
struct BinarizeArgs {
  const uint8_t* images;  // [N, D], values 0..max_value
  int64_t N;
  const int64_t* index;  // [B], or null: 0, 1, 2, ...
  int64_t B, D;
  const int64_t* seed;  // []
  uint32_t max_value;
  uint8_t* x;  // [B, D]
};

enum class Activation { none = 0, tanh = 1, relu = 2 };

constexpr int kActivationBlock = 64;  // rows whose gradients are summed one after the other

// out = activation(out + bias), over out; or the gradients of that.
struct ActivationArgs {
  int64_t rows, D;
  Activation activation;
  float* out;         // [rows, D]
  const float* bias;  // [D], or null: 0
  const float* grad;  // [rows, D], of out
  int64_t grad_stride;
  float* grad_input;   // [rows, D]; may be grad
  float* partial_sum;  // [blocks of rows, D], of grad_input
  float* grad_bias;    // [D]
};

// out = activation(scale * the sum of the pieces + bias): what is left of a matrix product that was taken in pieces.
struct PiecesArgs {
  const float* pieces;  // [count, rows, D]
  int64_t count, piece_stride, row_stride;
  int64_t rows, D;
  float scale;
  const float* bias;  // [D], or null: 0
  Activation activation;
  float* out;  // [rows, D]
};

// x as bfloat16 numbers, of which three, high, middle and low, make a float32: copies of them in a given order, the
// pieces of row r at r * row_stride, piece_stride apart. Of bytes each is the number itself.
struct SplitArgs {
  Rows x;  // [rows, D], float32 or uint8
  int64_t rows, D;
  uint32_t order;  // two bits a piece, the first lowest: 0 high, 1 middle, 2 low
  int pieces;
  void* to;
  int64_t piece_stride, row_stride, height, width;  // with zeros beyond rows and D
};

// The loss of a step, beta KL - log p(x|z) on average, the mean KL, and loss + ELBO.
struct TermsArgs {
  const float* log_prob;  // [R]
  const float* kl;        // [B]
  int64_t R, B;
  float beta_scale;
  const float* beta;  // [], multiplies it, or null: 1
  float* terms;       // [3]
};

// out = activation(x_scale x @ weight.T + bias) for x of few elements that are not 0, or the gradient of weight.
struct SparseArgs {
  Rows x;  // [B, D], bytes
  float x_scale;
  bool bits;  // every x_scale x that is not 0 is 1
  int64_t B, D, H;
  const float* weight;  // [H, D]
  const float* bias;    // [H], or null: 0
  Activation activation;
  float* out;          // [B, H]
  const float* grad;   // [B, H], of x_scale x @ weight.T
  float* grad_weight;  // [H, D]
};

constexpr int kAdamTensors = 32;  // of a launch

// A model's weights, and what Adam keeps of their gradients.
struct AdamTensor {
  float* weight;  // [size], as are the next
  const float* grad;
  float *mean, *square;
  const float* step;  // [], how many there were with this one
  int64_t size;
  bool in_vectors;  // they are aligned to 16 bytes
};
struct AdamArgs {
  AdamTensor tensor[kAdamTensors];
  int64_t first_block[kAdamTensors];  // of a tensor
  int count;
  const float* lr;  // [], or null: fixed_lr
  float fixed_lr, beta1, beta2, log_beta1, log_beta2, eps;
};

// Functions that the tests run over all of float; the names are those that Python sees.
enum class Elementary {
  exp,
  exp_minus,
  expm1,
  expm1_minus_x,
  tanh,
  log,
  log1p,
  log_one_minus,
  rcp,
  sqrt,
  bfloat16,
  float16
};
constexpr const char* kElementaryNames[] = {"exp",   "exp_minus",     "expm1", "expm1_minus_x", "tanh",     "log",
                                            "log1p", "log_one_minus", "rcp",   "sqrt",          "bfloat16", "float16"};

struct ElementaryArgs {
  Elementary function;
  const float* x;  // [n]
  int64_t n;
  float* y;  // [n]
};

}  // namespace aevb

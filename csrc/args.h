// SPDX-License-Identifier: Apache-2.0
// Arguments of the kernels, the same on every device: matrices of rows, numbers, and pointers to results. No torch
// here, since nvcc never sees a torch header.
#pragma once
#include <cstdint>

#include "formulas/likelihood_list.h"

namespace aevb {

enum class Dtype { float32, bfloat16, float16, uint8 };  // bool is read as uint8

// The order in which a row is summed (csrc/README.md).
constexpr int kLanes = 32;   // lane k of a group adds elements k, k + 32, k + 64, ...
constexpr int kGroup = 512;  // elements of a group: they are summed lane by lane, and then the lanes are folded

// A matrix [rows, D] as the kernels read it: unit stride within a row.
struct Rows {
  const void* data = nullptr;  // null: the argument is absent
  int64_t stride = 0;          // elements from one row to the next
  Dtype dtype = Dtype::float32;
};

// The Gaussian posterior: samples z = mu + exp(logvar / 2) * normal(seed, element), the KL, the log ratio
// log q(z|x) - log p(z), and their gradients. The log ratio has kernels of its own.
struct GaussianArgs {
  Rows mu, logvar;  // [B, D]
  bool clamps;      // logvar is clamped to [logvar_min, logvar_max]
  float logvar_min, logvar_max;
  Rows prior_mu, prior_logvar;  // [B, D], float32, rows perhaps all in one place; absent: the prior is N(0, I)
  int64_t B, D, L;              // L samples of each row
  const int64_t* seeds;         // [L * B * D / seed_block]
  int64_t seed_block;           // elements of z under one seed, which numbers them from 0
  void* z;                      // [L, B, D], mu's dtype; null: only the KL is computed
  float* kl;                    // [B]
  float* log_ratio;             // [L, B]; null: not computed
  Rows grad_z;                  // [L * B, D], mu's dtype: upstream gradient of z, or absent
  const float* grad_log_ratio;  // [L, B]: upstream gradient of log_ratio; null: none
  const float* sample_weight;   // [L, B]: multiplies grad_z (grad_log_ratio is weighted already); null: 1
  const float* prior_grad;      // [L, B]: upstream gradient of log_ratio, never weighted, for the prior; null: none
  bool path_only;               // path derivative: mu and logvar count as constants in log q(z|x)
  const float* grad_kl;         // [B], or [1] with stride 0: upstream gradient of kl; null: none
  int64_t grad_kl_stride;       // 1 or 0
  float grad_kl_scale;          // multiplies grad_kl
  const float* beta;            // []: multiplies grad_kl too; null: 1
  void *grad_mu, *grad_logvar;  // [B, D], mu's dtype
  float *grad_prior_mu, *grad_prior_logvar;  // [B, D]; null: not wanted
};

inline bool wants_prior_gradient(const GaussianArgs& a) { return a.grad_prior_mu || a.grad_prior_logvar; }

#define AEVB_NAME(name, ...) name,
enum class Likelihood { AEVB_LIKELIHOODS(AEVB_NAME) };
#undef AEVB_NAME

constexpr int kMostParams = 2;  // parameters of a likelihood, at most

// log p(x|z) of each row and its gradient. A null output pointer is not computed. Row l * x_rows + b of the parameters,
// sample l of datapoint b, goes with row b of x.
struct LikelihoodArgs {
  Likelihood likelihood;
  Rows param[kMostParams];  // [R, D]: the decoder's outputs; absent beyond the likelihood's parameters
  float scalar;             // a likelihood's own number, if it has one, such as a logvar for all elements
  Rows x;                   // [x_rows, D]
  float x_scale;            // multiplies x
  Rows weight;              // [x_rows, D], or absent. uint8: a mask, elements of 0 take no part. Floats: they multiply
                            // the elements' log p, and those of 0 take no part
  const float* offset;      // [x_rows]: added to parameter 0 of its row; null: 0
  int64_t R, x_rows, D;
  float* log_prob;    // [R]
  const float* grad;  // upstream gradient, at l * grad_sample_stride + b * grad_stride; null: 1 (with log_prob)
  int64_t grad_sample_stride, grad_stride;  // 0 or more
  float grad_scale;                         // multiplies the gradient before `grad` does
  bool done_for_1;                          // grad is one number, and grad_param already holds the gradient for 1
  void* grad_param[kMostParams];            // [R, D], the parameter's dtype; may be a contiguous parameter itself
};

// How elements are weighed. A mask keeps one logarithm for many elements; weights need one each.
enum class Weighting { none, mask, weights };
inline Weighting weighting_of(const LikelihoodArgs& a) {
  if (!a.weight.data) return Weighting::none;
  return a.weight.dtype == Dtype::uint8 ? Weighting::mask : Weighting::weights;
}

inline bool wants_gradient(const LikelihoodArgs& a) {
  for (void* grad : a.grad_param)
    if (grad) return true;
  return false;
}

enum class Reduction { none = 0, mean = 1, sum = 2 };

// The negative ELBO of B datapoints: beta KL - the mean over L samples of log p(x|z).
struct LossArgs {
  const float* log_prob;  // [L, B]
  const float* kl;        // [B]
  int64_t L, B;
  float beta_scale;   // the KL's weight is beta_scale * beta
  const float* beta;  // []; null: 1
  Reduction reduction;
  float* loss;  // [B], or [] when reduced
  // The terms of the loss, reduced as it is; null: not computed.
  float* log_likelihood;  // the mean over samples of log p(x|z)
  float* kl_term;         // the KL, which beta does not multiply
};

// result[i] = scale * beta * x[i * x_stride]: the gradient of a KL that was given in place of mu and logvar.
struct ScaleArgs {
  const float* x;  // [n], at x_stride
  int64_t x_stride, n;
  float scale;
  const float* beta;  // []; null: 1
  float* result;      // [n]
};

// Standard normals: `blocks` blocks of n elements, each under its own seed.
struct NormalArgs {
  const int64_t* seeds;  // [blocks]
  int64_t blocks, n;
  float* eps;  // [blocks, n]
};

// mixed[i] = mix_seed(seed[i], index[i]), a seed of its own for each index.
struct MixSeedArgs {
  const int64_t *seed, *index;  // [n]
  int64_t n;
  int64_t* mixed;  // [n]
};

// Binarization: x[b, d] is 1 where pixel d of image index[b] is set, by the noise of mix_seed(seed, index[b]).
struct BinarizeArgs {
  const uint8_t* images;  // [N, D], values 0..max_value
  int64_t N;
  const int64_t* index;  // [B]; null: 0, 1, 2, ...
  int64_t B, D;
  const int64_t* seed;  // []
  uint32_t max_value;
  uint8_t* x;  // [B, D]
};

enum class Activation { none = 0, tanh = 1, relu = 2 };

constexpr int kActivationBlock = 64;  // rows of a block: the bias's gradient adds a block's rows in order, then blocks

// out = activation(out + bias), in place, or the gradients of its input and of the bias.
struct ActivationArgs {
  int64_t rows, D;
  Activation activation;
  float* out;         // [rows, D]
  const float* bias;  // [D]; null: 0
  const float* grad;  // [rows, D], rows grad_stride apart: upstream gradient of out
  int64_t grad_stride;
  float* grad_input;   // [rows, D]; may be grad
  float* partial_sum;  // [blocks of rows, D]: sums of grad_input over each block
  float* grad_bias;    // [D]
};

// out = activation(scale * the sum of the pieces + bias), which completes a matrix product taken in pieces.
struct PiecesArgs {
  const float* pieces;  // [count, rows, D], pieces piece_stride and rows row_stride apart
  int64_t count, piece_stride, row_stride;
  int64_t rows, D;
  float scale;
  const float* bias;  // [D]; null: 0
  Activation activation;
  float* out;  // [rows, D]
};

// x as bfloat16 pieces: a float32 number is the sum of three, high, middle and low. Copies of the pieces are written in
// a given order: piece p of row r begins at r * row_stride + p * piece_stride. The high piece of a byte is the byte
// itself, and its other pieces are 0.
struct SplitArgs {
  Rows x;  // [rows, D], float32 or uint8
  int64_t rows, D;
  uint32_t order;  // two bits a piece, the first piece lowest: 0 high, 1 middle, 2 low
  int pieces;
  void* to;  // [height, width] for each piece, zeros beyond [rows, D]
  int64_t piece_stride, row_stride, height, width;
};

// Terms of a training step: the loss, which is the mean of beta KL minus the mean log p(x|z); the mean KL; loss + ELBO.
struct TermsArgs {
  const float* log_prob;  // [R]
  const float* kl;        // [B]
  int64_t R, B;
  float beta_scale;
  const float* beta;  // []: multiplies beta_scale; null: 1
  float* terms;       // [3]
};

// out = activation(x_scale x @ weight.T + bias) for x that mostly holds zeros, or the gradient of weight.
struct SparseArgs {
  Rows x;  // [B, D], bytes
  float x_scale;
  bool bits;  // every nonzero x_scale x is 1
  int64_t B, D, H;
  const float* weight;  // [H, D]
  const float* bias;    // [H]; null: 0
  Activation activation;
  float* out;          // [B, H]
  const float* grad;   // [B, H]: upstream gradient of x_scale x @ weight.T
  float* grad_weight;  // [H, D]
};

constexpr int kAdamTensors = 32;  // tensors of one launch, at most

// One weight tensor, its gradient, and Adam's moments of the gradient.
struct AdamTensor {
  float* weight;         // [size]
  const float* grad;     // [size]
  float *mean, *square;  // [size]: running means of the gradient and of its square
  const float* step;     // []: number of steps, this step included
  int64_t size;
  bool in_vectors;  // weight, grad, mean and square are aligned to 16 bytes
};
struct AdamArgs {
  AdamTensor tensor[kAdamTensors];
  int64_t first_block[kAdamTensors];  // first block of each tensor
  int count;
  const float* lr;  // []; null: fixed_lr
  float fixed_lr, beta1, beta2, log_beta1, log_beta2, eps;
};

// Elementary functions that the tests run over all floats, and their names in Python.
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

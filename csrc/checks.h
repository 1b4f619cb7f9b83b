// SPDX-License-Identifier: Apache-2.0
// Checks of the ops' arguments, on every device, and the sentences that a user reads when a call does not fit.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "args.h"

namespace aevb {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws std::runtime_error "aevb.<op>: <parts>", a RuntimeError in Python.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "aevb." << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape_text(const Tensor& t);
std::string dtype_text(ScalarType dtype);
std::string device_text(const Tensor& t);

using Sizes = std::vector<int64_t>;
Sizes sizes_of(const Tensor& t);

void check_same_device(const char* op, const char* a_name, const Tensor& a, const char* b_name, const Tensor& b);

// Shape of the posterior's parameters: [B, D], where B stands for any leading dimensions, `batch`.
struct LatentShape {
  int64_t B, D;
  Sizes batch;
};
LatentShape check_latents(const char* op, const Tensor& mu, const Tensor& logvar);

// The prior N(mu, exp(logvar)), or N(0, I) without the two, and the range that the posterior's logvar is clamped to.
struct Prior {
  OptionalTensor mu, logvar;
  std::optional<double> logvar_min, logvar_max;
};
// Whether there are mu and logvar of a prior. They are float32, of the posterior's shape or one row (D,) for all.
bool check_prior(const char* op, const Tensor& mu, const Prior& prior);

// Shape of the posterior's samples: z is (L, *batch, D), or (*batch, D) without num_samples. A seed numbers seed_block
// elements of z.
struct SampleShape {
  int64_t L, seed_block;
  Sizes z;
};
SampleShape check_samples(const char* op, const Tensor& mu, const Tensor& seed, std::optional<int64_t> num_samples);

// Shape of a likelihood's parameters and targets: row r of a parameter [R, D] goes with row r % x_rows of x
// [x_rows, D].
struct LikelihoodShape {
  int64_t R, x_rows, D;
  Sizes rows;
};
LikelihoodShape check_likelihood(const char* op, Likelihood likelihood, const Tensor& p0, const Tensor& x,
                                 const OptionalTensor& p1, std::optional<double> x_scale,
                                 const OptionalTensor& weight = std::nullopt,
                                 const OptionalTensor& offset = std::nullopt);

// The likelihood that formulas/likelihood_list.h calls `name`.
Likelihood likelihood_named(const char* op, const std::string& name);

// likelihood_named for a likelihood whose only parameter is recon: it has one parameter, and no number of its own.
Likelihood likelihood_of_recon(const char* op, const std::string& name);

// check_likelihood where the batch dimensions are known: recon is (*samples, *batch, *datapoint), and x is (*batch,
// *datapoint). A datapoint may have different dimensions in the two, but has the same number of elements.
LikelihoodShape check_reconstruction(const char* op, const Tensor& recon, const Tensor& x, const Sizes& batch,
                                     const char* batch_from, std::optional<double> x_scale);

// Checks the upstream gradient `grad` of a result with the given shape and dtype.
void check_grad(const char* op, const char* name, const Tensor& grad, const Sizes& shape, ScalarType dtype,
                const Tensor& like);

Reduction check_reduction(const char* op, int64_t reduction);

// Checks `gradient`, which says what flows back through log q(z|x) - log p(z): see schemas.h.
void check_gradient(const char* op, int64_t gradient);

// Checks beta, a 0-d float32 tensor that may be absent. beta_scale, a number, multiplies it.
void check_beta(const char* op, const OptionalTensor& beta, const Tensor& like);

}  // namespace aevb

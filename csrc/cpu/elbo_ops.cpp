// SPDX-License-Identifier: Apache-2.0
// The negative ELBO on CPU tensors: likelihood, KL and their reduction in one op.
#include <torch/csrc/stable/library.h>

#include "../formulas/elementary.h"
#include "work.h"

namespace aevb::cpu {
namespace {

using std::optional;
using TensorPair = std::tuple<Tensor, Tensor>;

float beta_value(const OptionalTensor& beta, double scale) {
  return static_cast<float>(scale) * (beta ? *beta->const_data_ptr<float>() : 1.0f);
}

// The loss of B datapoints with L samples each, from log p [L, B] and KL [B].
Tensor reduce_loss(const float* log_prob, const float* kl, int64_t L, const Sizes& batch, int64_t B, float beta,
                   Reduction reduction) {
  std::unique_ptr<float[]> buffer;
  Tensor loss = empty(reduction == Reduction::none ? batch : Sizes{}, ScalarType::Float);
  float* out = loss.mutable_data_ptr<float>();
  float* rows = out;
  if (reduction != Reduction::none) {
    buffer.reset(new float[static_cast<size_t>(B)]);
    rows = buffer.get();
  }
  for (int64_t b = 0; b < B; ++b) {
    const float mean = L == 1 ? log_prob[b] : kernels().sum(log_prob + b, L, B) / static_cast<float>(L);
    rows[b] = fmadd(beta, kl[b], -mean);
  }
  if (reduction != Reduction::none) {
    *out = kernels().sum(rows, B, 1);
    if (reduction == Reduction::mean) *out /= static_cast<float>(B);
  }
  return loss;
}

// What one unit of the loss' gradient is worth to one datapoint.
double datapoint_weight(Reduction reduction, int64_t B) {
  return reduction == Reduction::mean ? 1.0 / static_cast<double>(B) : 1.0;
}

// log p of every row of `recon`, [R].
std::unique_ptr<float[]> reconstruction_log_prob(const Tensor& recon, const Tensor& x, const LikelihoodShape& shape,
                                                 bool from_probs, optional<double> x_scale) {
  std::unique_ptr<float[]> log_prob(new float[static_cast<size_t>(shape.R)]);
  const Matrix o = matrix(recon, shape.D), t = matrix(x, shape.D);
  const RowResults results(log_prob.get(), shape.R, shape.D);
  LikelihoodArgs a = likelihood_args(o, t, shape, from_probs, x_scale);
  a.log_prob = results.target();
  run(kernels().likelihood, a, shape.R, shape.D, kLikelihoodGrain);
  results.join();
  return log_prob;
}

// The gradient of `recon`, from that of the loss: of each datapoint [B], or of all together [1].
Tensor reconstruction_backward(const Tensor& recon, const Tensor& x, const LikelihoodShape& shape, bool from_probs,
                               optional<double> x_scale, const Tensor& grad, Reduction reduction) {
  const Matrix o = matrix(recon, shape.D), t = matrix(x, shape.D);
  Tensor grad_recon = empty(sizes_of(recon), recon.scalar_type());
  LikelihoodArgs a = likelihood_args(o, t, shape, from_probs, x_scale);
  a.grad = grad.const_data_ptr<float>();
  a.grad_rows = reduction == Reduction::none ? std::max<int64_t>(shape.x_rows, 1) : 1;
  const int64_t L = shape.x_rows ? shape.R / shape.x_rows : 1;
  a.grad_scale = static_cast<float>(-datapoint_weight(reduction, shape.x_rows) / static_cast<double>(L));
  a.grad_output = grad_recon.mutable_data_ptr();
  run(kernels().likelihood_backward, a, shape.R, shape.D, kLikelihoodGrain);
  return grad_recon;
}

void check_kl(const char* op, const Tensor& kl) {
  if (kl.scalar_type() != ScalarType::Float)
    fail(op, "kl has dtype ", dtype_text(kl.scalar_type()), "; expected float32, as sample_gaussian returns it");
}

Tensor negative_elbo(const Tensor& recon, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                     const OptionalTensor& beta, double beta_scale, int64_t reduction_code, bool from_probs,
                     optional<double> x_scale) {
  const char* op = "FusedELBO";
  const LatentShape latents = check_latents(op, mu, logvar);
  const LikelihoodShape shape = check_reconstruction(op, recon, x, latents.batch, "mu", x_scale);
  check_beta(op, beta, recon);
  const Reduction reduction = check_reduction(op, reduction_code);
  const auto log_prob = reconstruction_log_prob(recon, x, shape, from_probs, x_scale);
  std::unique_ptr<float[]> kl(new float[static_cast<size_t>(latents.B)]);
  const Matrix m = matrix(mu, latents.D), v = matrix(logvar, latents.D);
  const RowResults results(kl.get(), latents.B, latents.D);
  GaussianArgs a = gaussian_args(m, v, latents);
  a.kl = results.target();
  run(kernels().gaussian, a, latents.B, latents.D, kLikelihoodGrain);
  results.join();
  return reduce_loss(log_prob.get(), kl.get(), latents.B ? shape.R / latents.B : 1, latents.batch, latents.B,
                     beta_value(beta, beta_scale), reduction);
}

std::tuple<Tensor, Tensor, Tensor> negative_elbo_backward(const Tensor& recon, const Tensor& x, const Tensor& mu,
                                                          const Tensor& logvar, const OptionalTensor& beta,
                                                          double beta_scale, int64_t reduction_code, bool from_probs,
                                                          optional<double> x_scale, const Tensor& grad) {
  const char* op = "negative_elbo_backward";
  const LatentShape latents = check_latents(op, mu, logvar);
  const LikelihoodShape shape = check_reconstruction(op, recon, x, latents.batch, "mu", x_scale);
  const Reduction reduction = check_reduction(op, reduction_code);
  check_beta(op, beta, recon);
  check_grad(op, "grad", grad, reduction == Reduction::none ? latents.batch : Sizes{}, ScalarType::Float, recon);
  const Tensor g = dense(grad);
  Tensor grad_recon = reconstruction_backward(recon, x, shape, from_probs, x_scale, g, reduction);
  Tensor grad_mu = empty(sizes_of(mu), mu.scalar_type()), grad_logvar = empty(sizes_of(mu), mu.scalar_type());
  const Matrix m = matrix(mu, latents.D), v = matrix(logvar, latents.D);
  GaussianArgs a = gaussian_args(m, v, latents);
  a.grad_kl = g.const_data_ptr<float>();
  a.grad_kl_is_scalar = reduction != Reduction::none;
  a.grad_kl_scale = static_cast<float>(datapoint_weight(reduction, latents.B) * beta_value(beta, beta_scale));
  a.grad_mu = grad_mu.mutable_data_ptr();
  a.grad_logvar = grad_logvar.mutable_data_ptr();
  run(kernels().gaussian_backward, a, latents.B, latents.D, kLikelihoodGrain);
  return {grad_recon, grad_mu, grad_logvar};
}

Tensor negative_elbo_with_kl(const Tensor& recon, const Tensor& x, const Tensor& kl, const OptionalTensor& beta,
                             double beta_scale, int64_t reduction_code, bool from_probs, optional<double> x_scale) {
  const char* op = "FusedELBO";
  check_kl(op, kl);
  const Sizes batch = sizes_of(kl);
  const LikelihoodShape shape = check_reconstruction(op, recon, x, batch, "kl", x_scale);
  check_beta(op, beta, recon);
  const Reduction reduction = check_reduction(op, reduction_code);
  const auto log_prob = reconstruction_log_prob(recon, x, shape, from_probs, x_scale);
  const int64_t B = kl.numel();
  const Tensor dense_kl = dense(kl);
  return reduce_loss(log_prob.get(), dense_kl.const_data_ptr<float>(), B ? shape.R / B : 1, batch, B,
                     beta_value(beta, beta_scale), reduction);
}

TensorPair negative_elbo_with_kl_backward(const Tensor& recon, const Tensor& x, const Tensor& kl,
                                          const OptionalTensor& beta, double beta_scale, int64_t reduction_code,
                                          bool from_probs, optional<double> x_scale, const Tensor& grad) {
  const char* op = "negative_elbo_with_kl_backward";
  check_kl(op, kl);
  const Sizes batch = sizes_of(kl);
  const LikelihoodShape shape = check_reconstruction(op, recon, x, batch, "kl", x_scale);
  check_beta(op, beta, recon);
  const Reduction reduction = check_reduction(op, reduction_code);
  check_grad(op, "grad", grad, reduction == Reduction::none ? batch : Sizes{}, ScalarType::Float, recon);
  const Tensor g = dense(grad);
  Tensor grad_recon = reconstruction_backward(recon, x, shape, from_probs, x_scale, g, reduction);
  Tensor grad_kl = empty(batch, ScalarType::Float);
  const int64_t B = kl.numel();
  const float scale = static_cast<float>(datapoint_weight(reduction, B) * beta_value(beta, beta_scale));
  const float* upstream = g.const_data_ptr<float>();
  float* out = grad_kl.mutable_data_ptr<float>();
  for (int64_t b = 0; b < B; ++b) out[b] = scale * upstream[reduction == Reduction::none ? b : 0];
  return {grad_recon, grad_kl};
}

}  // namespace
}  // namespace aevb::cpu

STABLE_TORCH_LIBRARY_IMPL(aevb, CPU, m) {
  using namespace aevb::cpu;
  AEVB_CPU_OP(m, negative_elbo);
  AEVB_CPU_OP(m, negative_elbo_with_kl);
}

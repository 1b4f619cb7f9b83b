// SPDX-License-Identifier: Apache-2.0
// The ops on CPU tensors: check the arguments, find the pointers, share the rows between threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "../formulas/philox.h"
#include "tensors.h"

namespace aevb::cpu {
namespace {

using std::optional;
using TensorPair = std::tuple<Tensor, Tensor>;

// Work below these many elements is not worth a second thread.
constexpr int64_t kGaussianGrain = 4096, kLikelihoodGrain = 16384;

// Runs kernel(args, begin, end) over all rows and chunks of a matrix [rows, D].
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t D, int64_t grain) {
  const int64_t units = rows * chunks(D), unit_elements = std::clamp<int64_t>(D, 1, kChunk);
  if (units == 0) return;
  const int64_t grain_units = (grain + unit_elements - 1) / unit_elements;
  if (units <= grain_units) return kernel(args, 0, units);
  torch::stable::parallel_for(0, units, grain_units, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// One float a row, computed in chunks: where rows have several, they are joined at the end.
class RowResults {
 public:
  RowResults(float* rows, int64_t count, int64_t D) : rows_(rows), count_(count), chunks_(chunks(D)) {
    if (chunks_ > 1) partial_.reset(new float[static_cast<size_t>(count * chunks_)]);
  }
  float* target() const { return chunks_ > 1 ? partial_.get() : rows_; }
  void join() const {
    for (int64_t r = 0; chunks_ > 1 && r < count_; ++r)
      rows_[r] = kernels().sum_groups(partial_.get() + r * chunks_, chunks_);
  }

 private:
  float* rows_;
  int64_t count_, chunks_;
  std::unique_ptr<float[]> partial_;
};

// ---- the Gaussian posterior -----------------------------------------------------------------------------------------

GaussianArgs gaussian_args(const Matrix& mu, const Matrix& logvar, const LatentShape& shape) {
  GaussianArgs a{};
  a.mu = mu.rows;
  a.logvar = logvar.rows;
  a.B = shape.B;
  a.D = shape.D;
  a.seed_block = 1;
  a.grad_kl_scale = 1.0f;
  return a;
}

TensorPair sample_gaussian(const Tensor& mu, const Tensor& logvar, const Tensor& seed, optional<int64_t> num_samples) {
  const LatentShape shape = check_latents("sample_gaussian", mu, logvar);
  const SampleShape samples = check_samples("sample_gaussian", mu, seed, num_samples);
  const Matrix m = matrix(mu, shape.D), v = matrix(logvar, shape.D);
  const Tensor seeds = dense(seed);
  Tensor z = empty(samples.z, mu.scalar_type()), kl = empty(shape.batch, ScalarType::Float);
  const RowResults results(kl.mutable_data_ptr<float>(), shape.B, shape.D);
  GaussianArgs a = gaussian_args(m, v, shape);
  a.L = samples.L;
  a.seeds = seeds.const_data_ptr<int64_t>();
  a.seed_block = samples.seed_block;
  a.z = z.mutable_data_ptr();
  a.kl = results.target();
  run(kernels().gaussian, a, shape.B, shape.D, kGaussianGrain / std::max<int64_t>(samples.L, 1));
  results.join();
  return {z, kl};
}

TensorPair sample_gaussian_backward(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                    optional<int64_t> num_samples, const OptionalTensor& grad_z,
                                    const OptionalTensor& grad_kl) {
  const char* op = "sample_gaussian_backward";
  const LatentShape shape = check_latents(op, mu, logvar);
  const SampleShape samples = check_samples(op, mu, seed, num_samples);
  const Matrix m = matrix(mu, shape.D), v = matrix(logvar, shape.D);
  const Tensor seeds = dense(seed);
  Tensor grad_mu = empty(sizes_of(mu), mu.scalar_type()), grad_logvar = empty(sizes_of(mu), mu.scalar_type());
  GaussianArgs a = gaussian_args(m, v, shape);
  a.L = samples.L;
  a.seeds = seeds.const_data_ptr<int64_t>();
  a.seed_block = samples.seed_block;
  a.grad_mu = grad_mu.mutable_data_ptr();
  a.grad_logvar = grad_logvar.mutable_data_ptr();
  optional<Matrix> gz;
  if (grad_z) {
    check_grad(op, "grad_z", *grad_z, samples.z, mu.scalar_type(), mu);
    gz = matrix(*grad_z, shape.D);
    a.grad_z = gz->rows;
  }
  OptionalTensor gkl;
  if (grad_kl) {
    check_grad(op, "grad_kl", *grad_kl, shape.batch, ScalarType::Float, mu);
    gkl = dense(*grad_kl);
    a.grad_kl = gkl->const_data_ptr<float>();
  }
  run(kernels().gaussian_backward, a, shape.B, shape.D, kGaussianGrain / std::max<int64_t>(samples.L, 1));
  return {grad_mu, grad_logvar};
}

Tensor gaussian_kl(const Tensor& mu, const Tensor& logvar) {
  const LatentShape shape = check_latents("gaussian_kl", mu, logvar);
  const Matrix m = matrix(mu, shape.D), v = matrix(logvar, shape.D);
  Tensor kl = empty(shape.batch, ScalarType::Float);
  const RowResults results(kl.mutable_data_ptr<float>(), shape.B, shape.D);
  GaussianArgs a = gaussian_args(m, v, shape);
  a.kl = results.target();
  run(kernels().gaussian, a, shape.B, shape.D, kLikelihoodGrain);
  results.join();
  return kl;
}

TensorPair gaussian_kl_backward(const Tensor& mu, const Tensor& logvar, const Tensor& grad) {
  const LatentShape shape = check_latents("gaussian_kl_backward", mu, logvar);
  check_grad("gaussian_kl_backward", "grad", grad, shape.batch, ScalarType::Float, mu);
  const Matrix m = matrix(mu, shape.D), v = matrix(logvar, shape.D);
  const Tensor g = dense(grad);
  Tensor grad_mu = empty(sizes_of(mu), mu.scalar_type()), grad_logvar = empty(sizes_of(mu), mu.scalar_type());
  GaussianArgs a = gaussian_args(m, v, shape);
  a.grad_kl = g.const_data_ptr<float>();
  a.grad_mu = grad_mu.mutable_data_ptr();
  a.grad_logvar = grad_logvar.mutable_data_ptr();
  run(kernels().gaussian_backward, a, shape.B, shape.D, kLikelihoodGrain);
  return {grad_mu, grad_logvar};
}

// ---- the Bernoulli likelihood ---------------------------------------------------------------------------------------

LikelihoodArgs likelihood_args(const Matrix& output, const Matrix& x, const LikelihoodShape& shape, bool from_probs,
                               optional<double> x_scale) {
  LikelihoodArgs a{};
  a.likelihood = from_probs ? Likelihood::bernoulli_probs : Likelihood::bernoulli_logits;
  a.output = output.rows;
  a.x = x.rows;
  a.x_scale = static_cast<float>(x_scale.value_or(1.0));
  a.R = shape.R;
  a.x_rows = std::max<int64_t>(shape.x_rows, 1);
  a.D = shape.D;
  a.grad_rows = 1;
  a.grad_scale = 1.0f;
  return a;
}

Tensor bernoulli_log_prob(const Tensor& output, const Tensor& x, optional<double> x_scale, bool from_probs) {
  const LikelihoodShape shape = check_likelihood("bernoulli_log_prob", output, x, x_scale);
  const Matrix o = matrix(output, shape.D), t = matrix(x, shape.D);
  Tensor log_prob = empty(shape.rows, ScalarType::Float);
  const RowResults results(log_prob.mutable_data_ptr<float>(), shape.R, shape.D);
  LikelihoodArgs a = likelihood_args(o, t, shape, from_probs, x_scale);
  a.log_prob = results.target();
  run(kernels().likelihood, a, shape.R, shape.D, kLikelihoodGrain);
  results.join();
  return log_prob;
}

Tensor bernoulli_log_prob_backward(const Tensor& output, const Tensor& x, optional<double> x_scale, bool from_probs,
                                   const Tensor& grad) {
  const LikelihoodShape shape = check_likelihood("bernoulli_log_prob_backward", output, x, x_scale);
  check_grad("bernoulli_log_prob_backward", "grad", grad, shape.rows, ScalarType::Float, output);
  const Matrix o = matrix(output, shape.D), t = matrix(x, shape.D);
  const Tensor g = dense(grad);
  Tensor grad_output = empty(sizes_of(output), output.scalar_type());
  LikelihoodArgs a = likelihood_args(o, t, shape, from_probs, x_scale);
  a.grad = g.const_data_ptr<float>();
  a.grad_rows = std::max<int64_t>(shape.R, 1);
  a.grad_output = grad_output.mutable_data_ptr();
  run(kernels().likelihood_backward, a, shape.R, shape.D, kLikelihoodGrain);
  return grad_output;
}

// ---- the negative ELBO ----------------------------------------------------------------------------------------------

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

// ---- noise ----------------------------------------------------------------------------------------------------------

Tensor normal(const Tensor& seed, std::vector<int64_t> size) {
  const Sizes prefix = sizes_of(seed);
  if (seed.scalar_type() != ScalarType::Long || prefix.size() > size.size() ||
      !std::equal(prefix.begin(), prefix.end(), size.begin()))
    fail("normal", "seed has shape ", shape_text(seed), " and dtype ", dtype_text(seed.scalar_type()),
         "; expected int64, and the first dimensions of size");
  const Tensor seeds = dense(seed);
  Tensor eps = empty(size, ScalarType::Float);
  const int64_t blocks = seed.numel(), n = blocks ? eps.numel() / blocks : 0;
  const int64_t* s = seeds.const_data_ptr<int64_t>();
  float* out = eps.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(kGaussianGrain / std::max<int64_t>(n, 1), 1),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b)
                                  kernels().normals(static_cast<uint64_t>(s[b]), 0, n, out + b * n);
                              });
  return eps;
}

Tensor mix_seeds(const Tensor& seed, const Tensor& index) {
  if (seed.scalar_type() != ScalarType::Long || index.scalar_type() != ScalarType::Long)
    fail("mix_seed", "seed is ", dtype_text(seed.scalar_type()), " and index ", dtype_text(index.scalar_type()),
         "; expected int64 for both");
  if (sizes_of(seed) != sizes_of(index))
    fail("mix_seed", "seed has shape ", shape_text(seed), " but index has shape ", shape_text(index));
  const Tensor s = dense(seed), i = dense(index);
  Tensor mixed = empty(sizes_of(seed), ScalarType::Long);
  const int64_t *from = s.const_data_ptr<int64_t>(), *at = i.const_data_ptr<int64_t>();
  int64_t* out = mixed.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, mixed.numel(), kGaussianGrain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      out[k] = static_cast<int64_t>(mix_seed(static_cast<uint64_t>(from[k]), static_cast<uint64_t>(at[k])));
  });
  return mixed;
}

}  // namespace
}  // namespace aevb::cpu

STABLE_TORCH_LIBRARY_IMPL(aevb, CPU, m) {
  using namespace aevb::cpu;
#define AEVB_IMPL(name)                       \
  m.impl(#name, TORCH_BOX(&name));            \
  m.impl(#name "_forward", TORCH_BOX(&name)); \
  m.impl(#name "_backward", TORCH_BOX(&name##_backward))
  AEVB_IMPL(sample_gaussian);
  AEVB_IMPL(gaussian_kl);
  AEVB_IMPL(bernoulli_log_prob);
  AEVB_IMPL(negative_elbo);
  AEVB_IMPL(negative_elbo_with_kl);
#undef AEVB_IMPL
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("mix_seed", TORCH_BOX(&mix_seeds));
}

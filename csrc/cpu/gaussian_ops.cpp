// SPDX-License-Identifier: Apache-2.0
// The Gaussian posterior on CPU tensors: samples, KL, and the noise itself.
#include <torch/csrc/stable/library.h>

#include "../formulas/philox.h"
#include "work.h"

namespace aevb::cpu {
namespace {

using std::optional;
using TensorPair = std::tuple<Tensor, Tensor>;

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
  constexpr int64_t kPiece = 16384;  // elements of a block that one thread fills at a time
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  const int64_t grain = std::max<int64_t>(1, kGaussianGrain / std::clamp<int64_t>(n, 1, kPiece));
  torch::stable::parallel_for(0, blocks * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / pieces, first = unit % pieces * kPiece;
      kernels().normals(static_cast<uint64_t>(s[block]), first, std::min(kPiece, n - first), out + block * n + first);
    }
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
  AEVB_CPU_OP(m, sample_gaussian);
  AEVB_CPU_OP(m, gaussian_kl);
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("mix_seed", TORCH_BOX(&mix_seeds));
}

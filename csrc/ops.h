// SPDX-License-Identifier: Apache-2.0
// The ops that every device has, written once: they check tensors and turn them into the arguments of kernels.
//
// A Device is constructed from a tensor on that device. It allocates results and runs kernels:
//   Tensor empty(const Sizes&, ScalarType)
//   void gaussian(const GaussianArgs&), gaussian_backward(..), gaussian_log_ratio(..),
//        gaussian_log_ratio_backward(..), likelihood(const LikelihoodArgs&), loss(const LossArgs&),
//        scale(const ScaleArgs&), normal(const NormalArgs&), mix_seed(const MixSeedArgs&),
//        binarize(const BinarizeArgs&), elementary(const ElementaryArgs&), activation_backward(ActivationArgs)
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace aevb {

template <class Device>
struct Ops {
  using Pair = std::tuple<Tensor, Tensor>;
  using Triple = std::tuple<Tensor, Tensor, Tensor>;
  using Quadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  // ---- the Gaussian posterior ---------------------------------------------------------------------------------------

  static Pair sample_gaussian(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                              std::optional<int64_t> num_samples) {
    return sample(Latents("sample_gaussian", mu, logvar), seed, num_samples);
  }
  static Pair sample_gaussian_with_prior(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                         const OptionalTensor& prior_logvar, const Tensor& seed,
                                         std::optional<int64_t> num_samples, std::optional<double> logvar_min,
                                         std::optional<double> logvar_max) {
    const Prior prior{prior_mu, prior_logvar, logvar_min, logvar_max};
    return sample(Latents("sample_gaussian", mu, logvar, prior), seed, num_samples);
  }

  static Pair sample_gaussian_backward(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                       std::optional<int64_t> num_samples, const OptionalTensor& grad_z,
                                       const OptionalTensor& grad_kl) {
    const Latents latents("sample_gaussian_backward", mu, logvar);
    return without_prior(sample_backward(latents, seed, num_samples, grad_z, grad_kl, 3));
  }
  static Quadruple sample_gaussian_with_prior_backward(
      const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
      const Tensor& seed, std::optional<int64_t> num_samples, std::optional<double> logvar_min,
      std::optional<double> logvar_max, const OptionalTensor& grad_z, const OptionalTensor& grad_kl, int64_t needs) {
    const Prior prior{prior_mu, prior_logvar, logvar_min, logvar_max};
    const Latents latents("sample_gaussian_backward", mu, logvar, prior);
    return with_prior(sample_backward(latents, seed, num_samples, grad_z, grad_kl, needs));
  }

  static Pair sample_gaussian_log_ratio(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                        std::optional<int64_t> num_samples, int64_t gradient) {
    return log_ratio(Latents("sample_gaussian_log_ratio", mu, logvar), seed, num_samples, gradient);
  }
  static Pair sample_gaussian_log_ratio_with_prior(const Tensor& mu, const Tensor& logvar,
                                                   const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                                   const Tensor& seed, std::optional<int64_t> num_samples,
                                                   int64_t gradient, std::optional<double> logvar_min,
                                                   std::optional<double> logvar_max) {
    const Prior prior{prior_mu, prior_logvar, logvar_min, logvar_max};
    return log_ratio(Latents("sample_gaussian_log_ratio", mu, logvar, prior), seed, num_samples, gradient);
  }

  static Pair sample_gaussian_log_ratio_backward(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                                 std::optional<int64_t> num_samples, int64_t gradient,
                                                 const OptionalTensor& grad_z, const OptionalTensor& grad_log_ratio,
                                                 const OptionalTensor& sample_weight) {
    const Latents latents("sample_gaussian_log_ratio_backward", mu, logvar);
    return without_prior(log_ratio_backward(latents, seed, num_samples, gradient, grad_z, grad_log_ratio, sample_weight,
                                            std::nullopt, 3));
  }
  static Quadruple sample_gaussian_log_ratio_with_prior_backward(
      const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
      const Tensor& seed, std::optional<int64_t> num_samples, int64_t gradient, std::optional<double> logvar_min,
      std::optional<double> logvar_max, const OptionalTensor& grad_z, const OptionalTensor& grad_log_ratio,
      const OptionalTensor& sample_weight, const OptionalTensor& prior_grad, int64_t needs) {
    const Prior prior{prior_mu, prior_logvar, logvar_min, logvar_max};
    const Latents latents("sample_gaussian_log_ratio_backward", mu, logvar, prior);
    return with_prior(log_ratio_backward(latents, seed, num_samples, gradient, grad_z, grad_log_ratio, sample_weight,
                                         prior_grad, needs));
  }

  static Tensor gaussian_kl(const Tensor& mu, const Tensor& logvar) {
    const Latents latents("gaussian_kl", mu, logvar);
    Device device(mu);
    return kl_of(device, latents);
  }
  static Tensor gaussian_kl_with_prior(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                       const OptionalTensor& prior_logvar, std::optional<double> logvar_min,
                                       std::optional<double> logvar_max) {
    const Prior prior{prior_mu, prior_logvar, logvar_min, logvar_max};
    const Latents latents("gaussian_kl", mu, logvar, prior);
    Device device(mu);
    return kl_of(device, latents);
  }

  static Pair gaussian_kl_backward(const Tensor& mu, const Tensor& logvar, const Tensor& grad) {
    return without_prior(kl_backward(Latents("gaussian_kl_backward", mu, logvar), grad, 3));
  }
  static Quadruple gaussian_kl_with_prior_backward(const Tensor& mu, const Tensor& logvar,
                                                   const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                                   std::optional<double> logvar_min, std::optional<double> logvar_max,
                                                   const Tensor& grad, int64_t needs) {
    const Prior prior{prior_mu, prior_logvar, logvar_min, logvar_max};
    return with_prior(kl_backward(Latents("gaussian_kl_backward", mu, logvar, prior), grad, needs));
  }

  // ---- noise --------------------------------------------------------------------------------------------------------

  static Tensor normal(const Tensor& seed, std::vector<int64_t> size) {
    const Sizes prefix = sizes_of(seed);
    if (seed.scalar_type() != ScalarType::Long || prefix.size() > size.size() ||
        !std::equal(prefix.begin(), prefix.end(), size.begin()))
      fail("normal", "seed has shape ", shape_text(seed), " and dtype ", dtype_text(seed.scalar_type()),
           "; expected int64, and the first dimensions of size");
    Device device(seed);
    const Tensor seeds = dense(seed);
    Tensor eps = device.empty(size, ScalarType::Float);
    const int64_t blocks = seed.numel();
    if (eps.numel()) device.normal({seeds.const_data_ptr<int64_t>(), blocks, eps.numel() / blocks, floats(eps)});
    return eps;
  }

  static Tensor mix_seed(const Tensor& seed, const Tensor& index) {
    if (seed.scalar_type() != ScalarType::Long || index.scalar_type() != ScalarType::Long)
      fail("mix_seed", "seed is ", dtype_text(seed.scalar_type()), " and index ", dtype_text(index.scalar_type()),
           "; expected int64 for both");
    if (sizes_of(seed) != sizes_of(index))
      fail("mix_seed", "seed has shape ", shape_text(seed), " but index has shape ", shape_text(index));
    check_same_device("mix_seed", "seed", seed, "index", index);
    Device device(seed);
    const Tensor s = dense(seed), i = dense(index);
    Tensor mixed = device.empty(sizes_of(seed), ScalarType::Long);
    device.mix_seed(
        {s.const_data_ptr<int64_t>(), i.const_data_ptr<int64_t>(), mixed.numel(), mixed.mutable_data_ptr<int64_t>()});
    return mixed;
  }

  static Tensor binarize(const Tensor& images, const OptionalTensor& index, const Tensor& seed, int64_t max_value) {
    const char* op = "binarize";
    const Sizes sizes = sizes_of(images);
    if (images.scalar_type() != ScalarType::Byte || sizes.size() != 2)
      fail(op, "images has shape ", shape_text(images), " and dtype ", dtype_text(images.scalar_type()),
           "; expected uint8 (N, D)");
    if (max_value < 1 || max_value > 255) fail(op, "max_value is ", max_value, "; expected 1 to 255");
    if (seed.scalar_type() != ScalarType::Long || !sizes_of(seed).empty())
      fail(op, "seed has shape ", shape_text(seed), " and dtype ", dtype_text(seed.scalar_type()),
           "; expected an int or a 0-d int64 tensor");
    check_same_device(op, "images", images, "seed", seed);
    int64_t B = sizes[0];
    if (index) {
      if (index->scalar_type() != ScalarType::Long || sizes_of(*index).size() != 1)
        fail(op, "index has shape ", shape_text(*index), " and dtype ", dtype_text(index->scalar_type()),
             "; expected int64 (B,)");
      check_same_device(op, "images", images, "index", *index);
      B = index->numel();
    }
    Device device(images);
    const Tensor from = dense(images);
    const OptionalTensor rows = index ? OptionalTensor(dense(*index)) : std::nullopt;
    Tensor x = device.empty({B, sizes[1]}, ScalarType::Bool);
    if (x.numel())
      device.binarize({from.const_data_ptr<uint8_t>(), sizes[0], rows ? rows->const_data_ptr<int64_t>() : nullptr, B,
                       sizes[1], seed.const_data_ptr<int64_t>(), static_cast<uint32_t>(max_value),
                       static_cast<uint8_t*>(x.mutable_data_ptr())});
    return x;
  }

  static Tensor empty(const Tensor& like, std::vector<int64_t> size) {
    return Device(like).empty(size, like.scalar_type());
  }

  static Tensor elementary(std::string name, const Tensor& x) {
    const auto found = std::find(std::begin(kElementaryNames), std::end(kElementaryNames), name);
    if (found == std::end(kElementaryNames)) fail("elementary", "no elementary function is called ", name);
    if (x.scalar_type() != ScalarType::Float)
      fail("elementary", "x is ", dtype_text(x.scalar_type()), "; expected float32");
    Device device(x);
    const Tensor from = dense(x);
    Tensor y = device.empty(sizes_of(x), ScalarType::Float);
    device.elementary(
        {static_cast<Elementary>(found - std::begin(kElementaryNames)), floats(from), x.numel(), floats(y)});
    return y;
  }

  // ---- the likelihood -----------------------------------------------------------------------------------------------

  static Tensor log_prob(const Tensor& p0, const Tensor& x, const OptionalTensor& p1, const OptionalTensor& weight,
                         const OptionalTensor& offset, std::string likelihood, double scalar,
                         std::optional<double> x_scale) {
    const Likelihood which = likelihood_named("log_prob", likelihood);
    const LikelihoodShape shape = check_likelihood("log_prob", which, p0, x, p1, x_scale, weight, offset);
    Device device(p0);
    const Decoded decoded(p0, x, shape, which, x_scale, p1, scalar, weight, offset);
    Tensor log_prob = device.empty(shape.rows, ScalarType::Float);
    LikelihoodArgs a = decoded.args();
    a.log_prob = floats(log_prob);
    device.likelihood(a);
    return log_prob;
  }

  static Pair log_prob_backward(const Tensor& p0, const Tensor& x, const OptionalTensor& p1,
                                const OptionalTensor& weight, const OptionalTensor& offset, std::string likelihood,
                                double scalar, std::optional<double> x_scale, const Tensor& grad, int64_t needs) {
    const char* op = "log_prob_backward";
    const Likelihood which = likelihood_named(op, likelihood);
    const LikelihoodShape shape = check_likelihood(op, which, p0, x, p1, x_scale, weight, offset);
    check_grad(op, "grad", grad, shape.rows, ScalarType::Float, p0);
    Device device(p0);
    const Decoded decoded(p0, x, shape, which, x_scale, p1, scalar, weight, offset);
    const Tensor g = dense(grad);
    LikelihoodArgs a = decoded.args();
    a.grad = floats(g);
    a.grad_sample_stride = a.x_rows;
    a.grad_stride = 1;
    return parameter_gradients(device, a, p0, p1, needs);
  }

  static Triple log_prob_and_grad(const Tensor& p0, const Tensor& x, const OptionalTensor& p1,
                                  const OptionalTensor& weight, const OptionalTensor& offset, std::string likelihood,
                                  double scalar, std::optional<double> x_scale, double grad_scale, int64_t needs) {
    const char* op = "log_prob_and_grad";
    const Likelihood which = likelihood_named(op, likelihood);
    const LikelihoodShape shape = check_likelihood(op, which, p0, x, p1, x_scale, weight, offset);
    Device device(p0);
    const Decoded decoded(p0, x, shape, which, x_scale, p1, scalar, weight, offset);
    Tensor log_prob = device.empty(shape.rows, ScalarType::Float);
    LikelihoodArgs a = decoded.args();
    a.log_prob = floats(log_prob);
    a.grad_scale = static_cast<float>(grad_scale);
    auto [grad0, grad1] = parameter_gradients(device, a, p0, p1, needs);
    return {log_prob, grad0, grad1};
  }

  static Tensor log_prob_and_grad_(Tensor p0, const Tensor& x, const OptionalTensor& weight,
                                   const OptionalTensor& offset, std::string likelihood, double scalar,
                                   std::optional<double> x_scale, double grad_scale) {
    const char* op = "log_prob_and_grad_";
    const Likelihood which = likelihood_named(op, likelihood);
    const LikelihoodShape shape = check_likelihood(op, which, p0, x, std::nullopt, x_scale, weight, offset);
    if (!p0.is_contiguous()) fail(op, "p0 is not contiguous, and would be written over");
    Device device(p0);
    const Decoded decoded(p0, x, shape, which, x_scale, std::nullopt, scalar, weight, offset);
    Tensor log_prob = device.empty(shape.rows, ScalarType::Float);
    LikelihoodArgs a = decoded.args();
    a.log_prob = floats(log_prob);
    a.grad_scale = static_cast<float>(grad_scale);
    a.grad_param[0] = p0.mutable_data_ptr();
    device.likelihood(a);
    return log_prob;
  }

  // ---- the negative ELBO --------------------------------------------------------------------------------------------

  // The posterior is given by mu and logvar, or by its KL alone, in mu's place.
  static Tensor negative_elbo(const Tensor& recon, const Tensor& x, const Tensor& mu_or_kl,
                              const OptionalTensor& logvar, const OptionalTensor& beta, double beta_scale,
                              int64_t reduction, std::string likelihood, std::optional<double> x_scale) {
    const LossInputs in = check_loss("FusedELBO", recon, x, mu_or_kl, logvar, beta, reduction, likelihood, x_scale);
    return loss_of(in, recon, x, mu_or_kl, logvar, beta, beta_scale, x_scale, nullptr);
  }

  static Triple negative_elbo_terms(const Tensor& recon, const Tensor& x, const Tensor& mu_or_kl,
                                    const OptionalTensor& logvar, const OptionalTensor& beta, double beta_scale,
                                    int64_t reduction, std::string likelihood, std::optional<double> x_scale) {
    const LossInputs in = check_loss("FusedELBO", recon, x, mu_or_kl, logvar, beta, reduction, likelihood, x_scale);
    ElboTerms terms(in, recon);
    Tensor loss = loss_of(in, recon, x, mu_or_kl, logvar, beta, beta_scale, x_scale, nullptr, &terms);
    return {loss, terms.log_likelihood, terms.kl};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> negative_elbo_terms_and_grad(
      const Tensor& recon, const Tensor& x, const Tensor& mu_or_kl, const OptionalTensor& logvar,
      const OptionalTensor& beta, double beta_scale, int64_t reduction, std::string likelihood,
      std::optional<double> x_scale) {
    const LossInputs in = check_loss("FusedELBO", recon, x, mu_or_kl, logvar, beta, reduction, likelihood, x_scale);
    ElboTerms terms(in, recon);
    Tensor grad_recon = Device(recon).empty(sizes_of(recon), recon.scalar_type());
    Tensor loss = loss_of(in, recon, x, mu_or_kl, logvar, beta, beta_scale, x_scale, &grad_recon, &terms);
    return {loss, terms.log_likelihood, terms.kl, grad_recon};
  }

  static Pair negative_elbo_and_grad(const Tensor& recon, const Tensor& x, const Tensor& mu_or_kl,
                                     const OptionalTensor& logvar, const OptionalTensor& beta, double beta_scale,
                                     int64_t reduction, std::string likelihood, std::optional<double> x_scale) {
    const LossInputs in = check_loss("FusedELBO", recon, x, mu_or_kl, logvar, beta, reduction, likelihood, x_scale);
    Tensor grad_recon = Device(recon).empty(sizes_of(recon), recon.scalar_type());
    Tensor loss = loss_of(in, recon, x, mu_or_kl, logvar, beta, beta_scale, x_scale, &grad_recon);
    return {loss, grad_recon};
  }

  static Triple negative_elbo_backward(const Tensor& recon, const Tensor& x, const Tensor& mu_or_kl,
                                       const OptionalTensor& logvar, const OptionalTensor& beta, double beta_scale,
                                       int64_t reduction, std::string likelihood, std::optional<double> x_scale,
                                       const Tensor& grad, int64_t needs) {
    const char* op = "negative_elbo_backward";
    const LossInputs in = check_loss(op, recon, x, mu_or_kl, logvar, beta, reduction, likelihood, x_scale, &grad);
    Device device(recon);
    const Tensor g = dense(grad);
    Tensor grad_recon = device.empty(needs & 1 ? sizes_of(recon) : Sizes{0}, recon.scalar_type());
    if (needs & 1) {
      const Decoded decoded(recon, x, in.decoded, in.likelihood, x_scale);
      LikelihoodArgs a = reconstruction_gradient(decoded, g, in.reduction, grad_recon);
      device.likelihood(a);
    }
    auto [grad_mu_or_kl, grad_logvar] =
        kl_gradients(device, in, recon, mu_or_kl, logvar, g, beta, beta_scale, needs & 6);
    return {grad_recon, grad_mu_or_kl, grad_logvar};
  }

  static Pair negative_elbo_backward_(const Tensor& recon, const Tensor& x, const Tensor& mu_or_kl,
                                      const OptionalTensor& logvar, const OptionalTensor& beta, double beta_scale,
                                      int64_t reduction, std::string likelihood, std::optional<double> x_scale,
                                      const Tensor& grad, Tensor recon_for_1) {
    const char* op = "negative_elbo_backward_";
    const LossInputs in = check_loss(op, recon, x, mu_or_kl, logvar, beta, reduction, likelihood, x_scale, &grad);
    if (in.reduction == Reduction::none || !recon_for_1.is_contiguous() || sizes_of(recon_for_1) != sizes_of(recon) ||
        recon_for_1.scalar_type() != recon.scalar_type())
      fail(op, "recon_for_1 has shape ", shape_text(recon_for_1), " and dtype ", dtype_text(recon_for_1.scalar_type()),
           "; expected what negative_elbo_and_grad gave, of a reduced loss");
    Device device(recon);
    const Tensor g = dense(grad);
    const Decoded decoded(recon, x, in.decoded, in.likelihood, x_scale);
    LikelihoodArgs a = reconstruction_gradient(decoded, g, in.reduction, recon_for_1);
    a.done_for_1 = true;
    device.likelihood(a);
    return kl_gradients(device, in, recon, mu_or_kl, logvar, g, beta, beta_scale, true);
  }

 private:
  static const float* floats(const Tensor& t) { return t.const_data_ptr<float>(); }
  static float* floats(Tensor& t) { return t.mutable_data_ptr<float>(); }

  // mu and logvar [B, D] as the kernels read them, and the prior.
  struct Latents {
    const char* op;
    Tensor like;  // mu, as it was given
    LatentShape shape;
    Matrix mu, logvar;
    Prior prior;
    std::optional<Matrix> prior_mu, prior_logvar;

    Latents(const char* o, const Tensor& mu_tensor, const Tensor& logvar_tensor, const Prior& p = {})
        : Latents(mu_tensor, logvar_tensor, check_latents(o, mu_tensor, logvar_tensor)) {
      op = o;
      prior = p;
      if (!check_prior(op, mu_tensor, prior)) return;
      prior_mu = prior_rows(*prior.mu);
      prior_logvar = prior_rows(*prior.logvar);
    }
    Latents(const Tensor& mu_tensor, const Tensor& logvar_tensor, const LatentShape& s)
        : op(""), like(mu_tensor), shape(s), mu(matrix(mu_tensor, s.D)), logvar(matrix(logvar_tensor, s.D)) {}

    // Whether all rows of the batch share the row `t` of a prior.
    bool shares(const Tensor& t) const { return t.dim() == 1 && like.dim() > 1; }

    Matrix prior_rows(const Tensor& t) const {
      Matrix rows = matrix(t, shape.D);
      if (shares(t)) rows.rows.stride = 0;
      return rows;
    }

    GaussianArgs args(const SampleShape* samples = nullptr, const Tensor* seeds = nullptr) const {
      GaussianArgs a{};
      a.mu = mu.rows;
      a.logvar = logvar.rows;
      a.clamps = prior.logvar_min.has_value();
      a.logvar_min = static_cast<float>(prior.logvar_min.value_or(0.0));
      a.logvar_max = static_cast<float>(prior.logvar_max.value_or(0.0));
      if (prior_mu) a.prior_mu = prior_mu->rows;
      if (prior_logvar) a.prior_logvar = prior_logvar->rows;
      a.B = shape.B;
      a.D = shape.D;
      a.L = samples ? samples->L : 0;
      a.seeds = seeds ? seeds->const_data_ptr<int64_t>() : nullptr;
      a.seed_block = samples ? samples->seed_block : 1;
      a.grad_kl_stride = 1;
      a.grad_kl_scale = 1.0f;
      return a;
    }
  };

  // A likelihood's parameters [R, D], the decoder's outputs, its targets x [x_rows, D], their weights, and offsets.
  struct Decoded {
    LikelihoodShape shape;
    Matrix p0, x;
    std::optional<Matrix> p1, weight;
    OptionalTensor offset;
    Likelihood likelihood;
    float scalar, x_scale;

    Decoded(const Tensor& p0_tensor, const Tensor& x_tensor, const LikelihoodShape& s, Likelihood l,
            std::optional<double> scale, const OptionalTensor& p1_tensor = std::nullopt, double own_scalar = 0.0,
            const OptionalTensor& weights = std::nullopt, const OptionalTensor& offsets = std::nullopt)
        : shape(s),
          p0(matrix(p0_tensor, s.D)),
          x(matrix(x_tensor, s.D)),
          likelihood(l),
          scalar(static_cast<float>(own_scalar)),
          x_scale(static_cast<float>(scale.value_or(1.0))) {
      if (p1_tensor) p1 = matrix(*p1_tensor, s.D);
      if (weights) weight = matrix(*weights, s.D);
      if (offsets) offset = dense(*offsets);
    }

    LikelihoodArgs args() const {
      LikelihoodArgs a{};
      a.likelihood = likelihood;
      a.param[0] = p0.rows;
      if (p1) a.param[1] = p1->rows;
      if (weight) a.weight = weight->rows;
      if (offset) a.offset = floats(*offset);
      a.scalar = scalar;
      a.x = x.rows;
      a.x_scale = x_scale;
      a.R = shape.R;
      a.x_rows = std::max<int64_t>(shape.x_rows, 1);
      a.D = shape.D;
      a.grad_scale = 1.0f;
      return a;
    }
  };

  // The gradients of mu and logvar, and those of the prior that `needs` has the bits of.
  struct GaussianGradients {
    Tensor mu, logvar;
    OptionalTensor prior_mu, prior_logvar;
    ScalarType of_prior;  // dtype of the prior's, or of mu where there is none
    int64_t needs;
  };

  static Pair sample(const Latents& latents, const Tensor& seed, std::optional<int64_t> num_samples) {
    const Tensor& mu = latents.like;
    const SampleShape samples = check_samples(latents.op, mu, seed, num_samples);
    Device device(mu);
    const Tensor seeds = dense(seed);
    Tensor z = device.empty(samples.z, mu.scalar_type()), kl = device.empty(latents.shape.batch, ScalarType::Float);
    GaussianArgs a = latents.args(&samples, &seeds);
    a.z = z.mutable_data_ptr();
    a.kl = floats(kl);
    device.gaussian(a);
    return {z, kl};
  }

  static GaussianGradients sample_backward(const Latents& latents, const Tensor& seed,
                                           std::optional<int64_t> num_samples, const OptionalTensor& grad_z,
                                           const OptionalTensor& grad_kl, int64_t needs) {
    const Tensor& mu = latents.like;
    const SampleShape samples = check_samples(latents.op, mu, seed, num_samples);
    if (grad_z) check_grad(latents.op, "grad_z", *grad_z, samples.z, mu.scalar_type(), mu);
    if (grad_kl) check_grad(latents.op, "grad_kl", *grad_kl, latents.shape.batch, ScalarType::Float, mu);
    Device device(mu);
    const Tensor seeds = dense(seed);
    GaussianArgs a = latents.args(&samples, &seeds);
    std::optional<Matrix> gz;
    if (grad_z) {
      gz = matrix(*grad_z, latents.shape.D);
      a.grad_z = gz->rows;
    }
    const bool one = grad_kl && is_one_number(*grad_kl);
    const OptionalTensor gkl = grad_kl ? OptionalTensor(one ? *grad_kl : dense(*grad_kl)) : std::nullopt;
    if (gkl) a.grad_kl = floats(*gkl);
    if (one) a.grad_kl_stride = 0;
    return gaussian_gradients(device, a, latents, needs);
  }

  static Pair log_ratio(const Latents& latents, const Tensor& seed, std::optional<int64_t> num_samples,
                        int64_t gradient) {
    const Tensor& mu = latents.like;
    check_gradient(latents.op, gradient);
    const SampleShape samples = check_samples(latents.op, mu, seed, num_samples);
    Device device(mu);
    const Tensor seeds = dense(seed);
    Tensor z = device.empty(samples.z, mu.scalar_type());
    Tensor log_ratio = device.empty(Sizes(samples.z.begin(), samples.z.end() - 1), ScalarType::Float);
    GaussianArgs a = latents.args(&samples, &seeds);
    a.z = z.mutable_data_ptr();
    a.log_ratio = floats(log_ratio);
    device.gaussian_log_ratio(a);
    return {z, log_ratio};
  }

  static GaussianGradients log_ratio_backward(const Latents& latents, const Tensor& seed,
                                              std::optional<int64_t> num_samples, int64_t gradient,
                                              const OptionalTensor& grad_z, const OptionalTensor& grad_log_ratio,
                                              const OptionalTensor& sample_weight, const OptionalTensor& prior_grad,
                                              int64_t needs) {
    const Tensor& mu = latents.like;
    check_gradient(latents.op, gradient);
    const SampleShape samples = check_samples(latents.op, mu, seed, num_samples);
    const Sizes rows(samples.z.begin(), samples.z.end() - 1);
    if (grad_z) check_grad(latents.op, "grad_z", *grad_z, samples.z, mu.scalar_type(), mu);
    const auto of_rows = [&](const char* name, const OptionalTensor& t) {
      if (t) check_grad(latents.op, name, *t, rows, ScalarType::Float, mu);
      return t ? OptionalTensor(dense(*t)) : std::nullopt;
    };
    const OptionalTensor ratio = of_rows("grad_log_ratio", grad_log_ratio);
    const OptionalTensor weight = of_rows("sample_weight", sample_weight), of_prior = of_rows("prior_grad", prior_grad);
    Device device(mu);
    const Tensor seeds = dense(seed);
    GaussianArgs a = latents.args(&samples, &seeds);
    std::optional<Matrix> gz;
    if (grad_z) {
      gz = matrix(*grad_z, latents.shape.D);
      a.grad_z = gz->rows;
    }
    if (ratio) a.grad_log_ratio = floats(*ratio);
    if (weight) a.sample_weight = floats(*weight);
    if (of_prior) a.prior_grad = floats(*of_prior);
    a.path_only = gradient != 0;
    return gaussian_gradients(device, a, latents, needs, &Device::gaussian_log_ratio_backward);
  }

  static Tensor kl_of(Device& device, const Latents& latents) {
    Tensor kl = device.empty(latents.shape.batch, ScalarType::Float);
    GaussianArgs a = latents.args();
    a.kl = floats(kl);
    device.gaussian(a);
    return kl;
  }

  static GaussianGradients kl_backward(const Latents& latents, const Tensor& grad, int64_t needs) {
    check_grad(latents.op, "grad", grad, latents.shape.batch, ScalarType::Float, latents.like);
    Device device(latents.like);
    const Tensor g = dense(grad);
    GaussianArgs a = latents.args();
    a.grad_kl = floats(g);
    return gaussian_gradients(device, a, latents, needs);
  }

  static GaussianGradients gaussian_gradients(
      Device& device, GaussianArgs& a, const Latents& latents, int64_t needs,
      void (Device::*backward)(const GaussianArgs&) = &Device::gaussian_backward) {
    const Tensor& mu = latents.like;
    const Sizes sizes = sizes_of(mu);
    const ScalarType dtype = mu.scalar_type();
    GaussianGradients g{device.empty(sizes, dtype),
                        device.empty(sizes, dtype),
                        std::nullopt,
                        std::nullopt,
                        latents.prior_mu ? ScalarType::Float : dtype,
                        needs};
    a.grad_mu = g.mu.mutable_data_ptr();
    a.grad_logvar = g.logvar.mutable_data_ptr();
    if (latents.prior_mu && needs & 4) g.prior_mu = device.empty(sizes, ScalarType::Float);
    if (latents.prior_mu && needs & 8) g.prior_logvar = device.empty(sizes, ScalarType::Float);
    if (g.prior_mu) a.grad_prior_mu = floats(*g.prior_mu);
    if (g.prior_logvar) a.grad_prior_logvar = floats(*g.prior_logvar);
    (device.*backward)(a);
    if (g.prior_mu) g.prior_mu = of_given(device, latents, *latents.prior.mu, *g.prior_mu);
    if (g.prior_logvar) g.prior_logvar = of_given(device, latents, *latents.prior.logvar, *g.prior_logvar);
    return g;
  }

  static Pair without_prior(const GaussianGradients& g) { return {g.mu, g.logvar}; }
  // All of them; empty, (0,), where `needs` lacks the bit.
  static Quadruple with_prior(const GaussianGradients& g) {
    Device device(g.mu);
    const auto nothing = [&](ScalarType dtype) { return device.empty({0}, dtype); };
    const ScalarType dtype = g.mu.scalar_type();
    return {g.needs & 1 ? g.mu : nothing(dtype), g.needs & 2 ? g.logvar : nothing(dtype),
            g.prior_mu ? *g.prior_mu : nothing(g.of_prior), g.prior_logvar ? *g.prior_logvar : nothing(g.of_prior)};
  }

  // The gradient of the prior's tensor `t` from that of each row: a row that all share has their sum, in the order in
  // which a bias's gradient is summed.
  static Tensor of_given(Device& device, const Latents& latents, const Tensor& t, Tensor& rows) {
    if (!latents.shares(t)) return rows;
    Tensor sum = device.empty({latents.shape.D}, ScalarType::Float);
    ActivationArgs a{};
    a.rows = latents.shape.B;
    a.D = a.grad_stride = latents.shape.D;
    a.activation = Activation::none;
    a.out = a.grad_input = floats(rows);  // which it does not touch
    a.grad = a.out;
    a.grad_bias = floats(sum);
    device.activation_backward(a);
    return sum;
  }

  // The gradient of each parameter of a likelihood; empty, (0,), where `needs` lacks its bit.
  static Pair parameter_gradients(Device& device, LikelihoodArgs& a, const Tensor& p0, const OptionalTensor& p1,
                                  int64_t needs) {
    const bool needs0 = needs & 1, needs1 = (needs & 2) && p1;
    Tensor grad0 = device.empty(needs0 ? sizes_of(p0) : Sizes{0}, p0.scalar_type());
    Tensor grad1 = device.empty(needs1 ? sizes_of(*p1) : Sizes{0}, (p1 ? *p1 : p0).scalar_type());
    if (needs0) a.grad_param[0] = grad0.mutable_data_ptr();
    if (needs1) a.grad_param[1] = grad1.mutable_data_ptr();
    if (a.log_prob || wants_gradient(a)) device.likelihood(a);
    return {grad0, grad1};
  }

  // The checked arguments of the loss.
  struct LossInputs {
    LatentShape latents;  // shape of mu and logvar, if they are given
    LikelihoodShape decoded;
    Sizes batch;
    Likelihood likelihood;
    Reduction reduction;
  };

  static LossInputs check_loss(const char* op, const Tensor& recon, const Tensor& x, const Tensor& mu_or_kl,
                               const OptionalTensor& logvar, const OptionalTensor& beta, int64_t reduction,
                               const std::string& likelihood, std::optional<double> x_scale,
                               const Tensor* grad = nullptr) {
    LossInputs in;
    in.likelihood = likelihood_of_recon(op, likelihood);
    const char* source = logvar ? "mu" : "kl";
    if (logvar) {
      in.latents = check_latents(op, mu_or_kl, *logvar);
      in.batch = in.latents.batch;
    } else {
      if (mu_or_kl.scalar_type() != ScalarType::Float)
        fail(op, "kl has dtype ", dtype_text(mu_or_kl.scalar_type()),
             "; expected float32, as sample_gaussian returns it");
      in.batch = sizes_of(mu_or_kl);
    }
    check_same_device(op, "recon", recon, source, mu_or_kl);
    in.decoded = check_reconstruction(op, recon, x, in.batch, source, x_scale);
    check_beta(op, beta, recon);
    in.reduction = check_reduction(op, reduction);
    if (grad)
      check_grad(op, "grad", *grad, in.reduction == Reduction::none ? in.batch : Sizes{}, ScalarType::Float, recon);
    return in;
  }

  // The terms of the loss, of its shape.
  struct ElboTerms {
    Tensor log_likelihood, kl;
    ElboTerms(const LossInputs& in, const Tensor& recon) : log_likelihood(empty(in, recon)), kl(empty(in, recon)) {}
    static Tensor empty(const LossInputs& in, const Tensor& recon) {
      return Device(recon).empty(in.reduction == Reduction::none ? in.batch : Sizes{}, ScalarType::Float);
    }
  };

  // The loss. `grad_recon`, if not null, receives the gradient of `recon` for an upstream gradient of 1, and `terms`
  // the terms.
  static Tensor loss_of(const LossInputs& in, const Tensor& recon, const Tensor& x, const Tensor& mu_or_kl,
                        const OptionalTensor& logvar, const OptionalTensor& beta, double beta_scale,
                        std::optional<double> x_scale, Tensor* grad_recon, ElboTerms* terms = nullptr) {
    Device device(recon);
    const Tensor kl = logvar ? kl_of(device, Latents(mu_or_kl, *logvar, in.latents)) : dense(mu_or_kl);
    const Decoded decoded(recon, x, in.decoded, in.likelihood, x_scale);
    const int64_t B = kl.numel(), R = in.decoded.R;
    Tensor log_prob = device.empty({R}, ScalarType::Float);
    LikelihoodArgs a = decoded.args();
    a.log_prob = floats(log_prob);
    if (grad_recon) {
      a.grad_param[0] = grad_recon->mutable_data_ptr();
      a.grad_scale = reconstruction_scale(decoded, in.reduction);
    }
    device.likelihood(a);
    Tensor loss = device.empty(in.reduction == Reduction::none ? in.batch : Sizes{}, ScalarType::Float);
    device.loss({floats(log_prob), floats(kl), B ? R / B : 1, B, static_cast<float>(beta_scale),
                 beta ? floats(*beta) : nullptr, in.reduction, floats(loss),
                 terms ? floats(terms->log_likelihood) : nullptr, terms ? floats(terms->kl) : nullptr});
    return loss;
  }

  // The derivative of the loss by the loss of one datapoint.
  static double datapoint_weight(Reduction how, int64_t B) {
    return how == Reduction::mean ? 1.0 / static_cast<double>(B) : 1.0;
  }

  // The gradients of mu and logvar, or of the KL and an empty tensor. grad: upstream gradient of the loss, [B], or []
  // where the loss is reduced.
  static Pair kl_gradients(Device& device, const LossInputs& in, const Tensor& recon, const Tensor& mu_or_kl,
                           const OptionalTensor& logvar, const Tensor& grad, const OptionalTensor& beta,
                           double beta_scale, bool needed) {
    const Tensor nothing = device.empty({0}, logvar ? logvar->scalar_type() : recon.scalar_type());
    if (!needed) return {device.empty({0}, mu_or_kl.scalar_type()), nothing};
    const bool each = in.reduction == Reduction::none;
    const float* beta_data = beta ? floats(*beta) : nullptr;
    const int64_t B = logvar ? in.latents.B : mu_or_kl.numel();
    const float weight = static_cast<float>(datapoint_weight(in.reduction, B) * beta_scale);
    if (!logvar) {
      Tensor grad_kl = device.empty(in.batch, ScalarType::Float);
      device.scale({floats(grad), each, B, weight, beta_data, floats(grad_kl)});
      return {grad_kl, nothing};
    }
    const Latents latents(mu_or_kl, *logvar, in.latents);
    GaussianArgs a = latents.args();
    a.grad_kl = floats(grad);
    a.grad_kl_stride = each;
    a.grad_kl_scale = weight;
    a.beta = beta_data;
    return without_prior(gaussian_gradients(device, a, latents, 3));
  }

  // The kernel's arguments for the gradient of `recon`, to be written to `over`. grad: upstream gradient of the loss,
  // [B], or [] where the loss is reduced.
  static LikelihoodArgs reconstruction_gradient(const Decoded& decoded, const Tensor& grad, Reduction how,
                                                Tensor& over) {
    LikelihoodArgs a = decoded.args();
    a.grad = floats(grad);
    a.grad_stride = how == Reduction::none;
    a.grad_scale = reconstruction_scale(decoded, how);
    a.grad_param[0] = over.mutable_data_ptr();
    return a;
  }

  // The derivative of the loss by the log-likelihood of one sample.
  static float reconstruction_scale(const Decoded& decoded, Reduction how) {
    const int64_t L = decoded.shape.x_rows ? decoded.shape.R / decoded.shape.x_rows : 1;
    return static_cast<float>(-datapoint_weight(how, decoded.shape.x_rows) / static_cast<double>(L));
  }
};

}  // namespace aevb

// Registers every op for one device: `library` is the argument of a STABLE_TORCH_LIBRARY_IMPL block.
#define AEVB_REGISTER(library, Device)                                                 \
  AEVB_REGISTER_DIFFERENTIABLE(library, Device, sample_gaussian);                      \
  AEVB_REGISTER_DIFFERENTIABLE(library, Device, sample_gaussian_log_ratio);            \
  AEVB_REGISTER_DIFFERENTIABLE(library, Device, gaussian_kl);                          \
  AEVB_REGISTER_DIFFERENTIABLE(library, Device, sample_gaussian_with_prior);           \
  AEVB_REGISTER_DIFFERENTIABLE(library, Device, sample_gaussian_log_ratio_with_prior); \
  AEVB_REGISTER_DIFFERENTIABLE(library, Device, gaussian_kl_with_prior);               \
  AEVB_REGISTER_DIFFERENTIABLE(library, Device, log_prob);                             \
  AEVB_REGISTER_DIFFERENTIABLE(library, Device, negative_elbo);                        \
  AEVB_REGISTER_PLAIN(library, Device, log_prob_and_grad);                             \
  AEVB_REGISTER_PLAIN(library, Device, log_prob_and_grad_);                            \
  AEVB_REGISTER_FORWARD(library, Device, negative_elbo_terms);                         \
  AEVB_REGISTER_PLAIN(library, Device, negative_elbo_terms_and_grad);                  \
  AEVB_REGISTER_PLAIN(library, Device, negative_elbo_and_grad);                        \
  AEVB_REGISTER_PLAIN(library, Device, negative_elbo_backward_);                       \
  AEVB_REGISTER_PLAIN(library, Device, normal);                                        \
  AEVB_REGISTER_PLAIN(library, Device, mix_seed);                                      \
  AEVB_REGISTER_PLAIN(library, Device, binarize);                                      \
  AEVB_REGISTER_PLAIN(library, Device, empty);                                         \
  AEVB_REGISTER_PLAIN(library, Device, elementary)

#define AEVB_REGISTER_PLAIN(library, Device, name) library.impl(#name, TORCH_BOX(&aevb::Ops<Device>::name))

// An op and its bare twin for eager mode.
#define AEVB_REGISTER_FORWARD(library, Device, name)        \
  library.impl(#name, TORCH_BOX(&aevb::Ops<Device>::name)); \
  library.impl(#name "_forward", TORCH_BOX(&aevb::Ops<Device>::name))

// The same, and the op of its gradient.
#define AEVB_REGISTER_DIFFERENTIABLE(library, Device, name) \
  AEVB_REGISTER_FORWARD(library, Device, name);             \
  library.impl(#name "_backward", TORCH_BOX(&aevb::Ops<Device>::name##_backward))

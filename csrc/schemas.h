// SPDX-License-Identifier: Apache-2.0
// Every op's schema: the table of contents of torch.ops.aevb.
#pragma once
#include <torch/csrc/stable/library.h>

// Op `name` is differentiable, for graphs (torch.compile, torch.export). `name_forward` is the same kernel bare, for
// the autograd.Function of eager mode, and `name_backward` gives the gradients. aevb/ops/autograd.py puts them
// together.
#define AEVB_DEF(name, arguments_and_results) \
  m.def(name arguments_and_results);          \
  m.def(name "_forward" arguments_and_results)

namespace aevb {

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  // z = mu + exp(logvar / 2) eps, eps = normal(seed, element), and KL(N(mu, exp(logvar)) || N(0, I)).
  AEVB_DEF("sample_gaussian", "(Tensor mu, Tensor logvar, Tensor seed, int? num_samples) -> (Tensor z, Tensor kl)");
  m.def(
      "sample_gaussian_backward(Tensor mu, Tensor logvar, Tensor seed, int? num_samples, Tensor? grad_z,"
      " Tensor? grad_kl) -> (Tensor grad_mu, Tensor grad_logvar)");

  // The same z, and the log ratio log q(z|x) - log p(z) of each sample. gradient: 0 the total gradient, 1 the gradient
  // of the path through z, 2 the doubly reparameterized gradient. Gradient 2 is gradient 1 of weighted samples:
  // aevb/ops/gaussian.py gives the backward op the weights.
  AEVB_DEF("sample_gaussian_log_ratio",
           "(Tensor mu, Tensor logvar, Tensor seed, int? num_samples, int gradient) -> (Tensor z, Tensor log_ratio)");
  m.def(
      "sample_gaussian_log_ratio_backward(Tensor mu, Tensor logvar, Tensor seed, int? num_samples, int gradient,"
      " Tensor? grad_z, Tensor? grad_log_ratio, Tensor? sample_weight) -> (Tensor grad_mu, Tensor grad_logvar)");

  AEVB_DEF("gaussian_kl", "(Tensor mu, Tensor logvar) -> Tensor");
  m.def("gaussian_kl_backward(Tensor mu, Tensor logvar, Tensor grad) -> (Tensor grad_mu, Tensor grad_logvar)");

  // The same three for a prior N(prior_mu, exp(prior_logvar)), float32, mu's shape or (D,) for all rows, and for logvar
  // clamped to [logvar_min, logvar_max]. Each may be absent. prior_grad is the upstream gradient of the log ratio as
  // the prior sees it, without the samples' weights. needs: bit i asks for the i-th gradient, which is else empty,
  // (0,).
  AEVB_DEF("sample_gaussian_with_prior",
           "(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor seed, int? num_samples,"
           " float? logvar_min, float? logvar_max) -> (Tensor z, Tensor kl)");
  m.def(
      "sample_gaussian_with_prior_backward(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar,"
      " Tensor seed, int? num_samples, float? logvar_min, float? logvar_max, Tensor? grad_z, Tensor? grad_kl,"
      " int needs) -> (Tensor grad_mu, Tensor grad_logvar, Tensor grad_prior_mu, Tensor grad_prior_logvar)");
  AEVB_DEF("sample_gaussian_log_ratio_with_prior",
           "(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor seed, int? num_samples,"
           " int gradient, float? logvar_min, float? logvar_max) -> (Tensor z, Tensor log_ratio)");
  m.def(
      "sample_gaussian_log_ratio_with_prior_backward(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar,"
      " Tensor seed, int? num_samples, int gradient, float? logvar_min, float? logvar_max, Tensor? grad_z,"
      " Tensor? grad_log_ratio, Tensor? sample_weight, Tensor? prior_grad, int needs)"
      " -> (Tensor grad_mu, Tensor grad_logvar, Tensor grad_prior_mu, Tensor grad_prior_logvar)");
  AEVB_DEF("gaussian_kl_with_prior",
           "(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, float? logvar_min, float? logvar_max)"
           " -> Tensor");
  m.def(
      "gaussian_kl_with_prior_backward(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar,"
      " float? logvar_min, float? logvar_max, Tensor grad, int needs)"
      " -> (Tensor grad_mu, Tensor grad_logvar, Tensor grad_prior_mu, Tensor grad_prior_logvar)");

  // log p(x|z) of each row, by a likelihood that formulas/likelihood_list.h names. p0 and p1 are its parameters, of one
  // shape (all rows of one may lie in one place), and scalar is its own number. x_scale multiplies x. weight has x's
  // shape: bool or uint8 selects elements, floats weigh them. offset, one number for each row of x, is added to p0.
  // needs: bit i asks for the gradient of parameter i, which is else empty, (0,).
  AEVB_DEF("log_prob",
           "(Tensor p0, Tensor x, Tensor? p1, Tensor? weight, Tensor? offset, str likelihood, float scalar,"
           " float? x_scale) -> Tensor");
  m.def(
      "log_prob_backward(Tensor p0, Tensor x, Tensor? p1, Tensor? weight, Tensor? offset, str likelihood, float scalar,"
      " float? x_scale, Tensor grad, int needs) -> (Tensor grad_p0, Tensor grad_p1)");
  // log p(x|z), and grad_scale times its gradients, in one pass.
  m.def(
      "log_prob_and_grad(Tensor p0, Tensor x, Tensor? p1, Tensor? weight, Tensor? offset, str likelihood, float scalar,"
      " float? x_scale, float grad_scale, int needs) -> (Tensor log_prob, Tensor grad_p0, Tensor grad_p1)");
  // log_prob_and_grad of a likelihood with one parameter, p0, which must be contiguous: the gradient is written over
  // p0.
  m.def(
      "log_prob_and_grad_(Tensor(a!) p0, Tensor x, Tensor? weight, Tensor? offset, str likelihood, float scalar,"
      " float? x_scale, float grad_scale) -> Tensor log_prob");

  // The negative ELBO, beta * KL - the mean over samples of log p(x|z). The KL is of (mu, logvar), or is given in mu's
  // place, without logvar. beta is a number times an optional 0-d tensor. reduction: 0 none, 1 mean, 2 sum. needs: bit
  // i asks for the i-th gradient, as in log_prob_backward. Without logvar, grad_logvar is empty.
  AEVB_DEF("negative_elbo",
           "(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta, float beta_scale, int reduction,"
           " str likelihood, float? x_scale) -> Tensor");
  m.def(
      "negative_elbo_backward(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta, float beta_scale,"
      " int reduction, str likelihood, float? x_scale, Tensor grad, int needs)"
      " -> (Tensor grad_recon, Tensor grad_mu_or_kl, Tensor grad_logvar)");
  // The loss, and its terms, reduced as it is: the log-likelihood and the KL. They have no gradient.
  AEVB_DEF("negative_elbo_terms",
           "(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta, float beta_scale, int reduction,"
           " str likelihood, float? x_scale) -> (Tensor loss, Tensor log_likelihood, Tensor kl)");
  m.def(
      "negative_elbo_terms_and_grad(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta,"
      " float beta_scale, int reduction, str likelihood, float? x_scale)"
      " -> (Tensor loss, Tensor log_likelihood, Tensor kl, Tensor grad_recon)");
  // The loss, and in the same pass the gradient of recon for an upstream gradient of 1.
  m.def(
      "negative_elbo_and_grad(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta, float beta_scale,"
      " int reduction, str likelihood, float? x_scale) -> (Tensor loss, Tensor grad_recon)");
  // The gradients of mu and logvar, or of the KL. recon_for_1 is grad_recon of negative_elbo_and_grad: where grad is
  // not 1, the gradient of recon is written over it. So nobody has to read grad, which would wait for a GPU.
  m.def(
      "negative_elbo_backward_(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta, float beta_scale,"
      " int reduction, str likelihood, float? x_scale, Tensor grad, Tensor(a!) recon_for_1)"
      " -> (Tensor grad_mu_or_kl, Tensor grad_logvar)");

  // The noise itself: element i of a seed's block is output i % 4 of Philox counter i / 4. The shape of seed is a
  // prefix of size.
  m.def("normal(Tensor seed, int[] size) -> Tensor");
  m.def("mix_seed(Tensor seed, Tensor index) -> Tensor");

  // Binarization: x[b, d] says whether pixel d of images[index[b]] is set, by the noise of mix_seed(seed, index[b]).
  // Pixels have values 0..max_value.
  m.def("binarize(Tensor images, Tensor? index, Tensor seed, int max_value) -> Tensor x");

  // A layer without its dense matrix product. activation: 0 none, 1 tanh, 2 relu.
  m.def("bias_activation_(Tensor(a!) out, Tensor? bias, int activation) -> ()");
  // For activation 0 the gradient of the input is grad itself, and grad_input is empty, (0,). The second op writes
  // grad_input over grad.
  m.def("activation_backward(Tensor out, Tensor grad, int activation) -> (Tensor grad_input, Tensor grad_bias)");
  m.def("activation_backward_(Tensor out, Tensor(a!) grad, int activation) -> Tensor grad_bias");
  // On a CPU, for x, bool or uint8, that mostly holds zeros: activation(x_scale x @ weight.T + bias), and the gradient
  // of weight. density is the fraction of nonzero elements in some rows of x.
  m.def("sparse_linear(Tensor x, float? x_scale, Tensor weight, Tensor? bias, int activation) -> Tensor out");
  m.def("sparse_linear_weight_grad(Tensor x, float? x_scale, Tensor grad) -> Tensor grad_weight");
  m.def("density(Tensor x) -> float");
  // On a GPU, for products on tensor cores: the bfloat16 pieces of x (rows, D), float32 or bytes. x is the sum of three
  // pieces, high, middle and low. Their copies are in the order that `pieces` spells with h, m and l: (rows, pieces,
  // D), or by rows (pieces, rows, D). D, and by rows also the rows, are rounded up to 8.
  m.def("split_bfloat16(Tensor x, str pieces, bool by_rows) -> Tensor");
  // On a GPU, for products taken in pieces (count, rows, D): activation(scale * the sum of the pieces over the first
  // dimension + bias).
  m.def("add_pieces(Tensor pieces, float scale, Tensor? bias, int activation) -> Tensor");
  // On a GPU, (3,): the loss, which is the mean of beta KL minus the mean log p(x|z); the mean KL; loss + ELBO.
  m.def("elbo_terms(Tensor log_prob, Tensor kl, Tensor? beta, float beta_scale) -> Tensor");

  // On a GPU, a step of Adam over all weights, in place: it writes weights, means and squares. The learning rate is lr,
  // or fixed_lr without it.
  m.def(
      "adam_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor[] steps, Tensor? "
      "lr,"
      " float fixed_lr, float beta1, float beta2, float eps) -> ()");

  // Uninitialised memory for a large result that Python computes, allocated as the kernels' results are.
  m.def("empty(Tensor like, int[] size) -> Tensor");

  // For the tests: one function of formulas/elementary.h, by its name in args.h, of every element.
  m.def("elementary(str name, Tensor x) -> Tensor");
}

}  // namespace aevb

#undef AEVB_DEF

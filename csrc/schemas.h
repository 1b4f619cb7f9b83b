// SPDX-License-Identifier: Apache-2.0
// Every op's schema: the table of contents of torch.ops.aevb.
#pragma once
#include <torch/csrc/stable/library.h>

// `x` is differentiable, for graphs (torch.compile, torch.export); `x_forward` is the same kernel bare, for the
// autograd.Function of eager mode; `x_backward` gives the gradients. aevb/ops.py puts them together.
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

  // The same z, and log q(z|x) - log p(z) of each sample. gradient: 0 all of it, 1 of the path through z only, 2 that
  // with the samples weighed once more (aevb/ops.py gives the backward op the weights).
  AEVB_DEF("sample_gaussian_log_ratio",
           "(Tensor mu, Tensor logvar, Tensor seed, int? num_samples, int gradient) -> (Tensor z, Tensor log_ratio)");
  m.def(
      "sample_gaussian_log_ratio_backward(Tensor mu, Tensor logvar, Tensor seed, int? num_samples, int gradient,"
      " Tensor? grad_z, Tensor? grad_log_ratio, Tensor? sample_weight) -> (Tensor grad_mu, Tensor grad_logvar)");

  AEVB_DEF("gaussian_kl", "(Tensor mu, Tensor logvar) -> Tensor");
  m.def("gaussian_kl_backward(Tensor mu, Tensor logvar, Tensor grad) -> (Tensor grad_mu, Tensor grad_logvar)");

  // log p(x | z), one value a row, of a likelihood of formulas/likelihood_list.h by name. p0 and p1 are its parameters,
  // of one shape (rows may all lie in one place), scalar its own number. x_scale multiplies x. needs: bit i is set
  // where the gradient of parameter i is wanted; the others are empty, (0,).
  AEVB_DEF("log_prob", "(Tensor p0, Tensor x, Tensor? p1, str likelihood, float scalar, float? x_scale) -> Tensor");
  m.def(
      "log_prob_backward(Tensor p0, Tensor x, Tensor? p1, str likelihood, float scalar, float? x_scale, Tensor grad,"
      " int needs) -> (Tensor grad_p0, Tensor grad_p1)");
  // log p(x | z), and grad_scale times its gradients, in one pass.
  m.def(
      "log_prob_and_grad(Tensor p0, Tensor x, Tensor? p1, str likelihood, float scalar, float? x_scale,"
      " float grad_scale, int needs) -> (Tensor log_prob, Tensor grad_p0, Tensor grad_p1)");
  // The same of a likelihood with one parameter, whose gradient goes over it; it must be contiguous.
  m.def(
      "log_prob_and_grad_(Tensor(a!) p0, Tensor x, str likelihood, float scalar, float? x_scale, float grad_scale)"
      " -> Tensor log_prob");

  // beta * KL - mean over samples of log p(x | z), for the KL of (mu, logvar), or for a KL that is there already, in
  // mu's place. reduction: 0 none, 1 mean, 2 sum. beta is a number times an optional 0-d tensor. needs: bit i for the
  // i-th gradient, as log_prob_backward; without a logvar its gradient is empty.
  AEVB_DEF("negative_elbo",
           "(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta, float beta_scale, int reduction,"
           " str likelihood, float? x_scale) -> Tensor");
  m.def(
      "negative_elbo_backward(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta, float beta_scale,"
      " int reduction, str likelihood, float? x_scale, Tensor grad, int needs)"
      " -> (Tensor grad_recon, Tensor grad_mu_or_kl, Tensor grad_logvar)");
  // The loss, and in the same pass recon's gradient for an upstream gradient of 1.
  m.def(
      "negative_elbo_and_grad(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta, float beta_scale,"
      " int reduction, str likelihood, float? x_scale) -> (Tensor loss, Tensor grad_recon)");
  // The other gradients; and over recon_for_1, which is the grad_recon of this, recon's where grad is not 1: so that
  // nobody has to read grad, which would wait for a GPU.
  m.def(
      "negative_elbo_backward_(Tensor recon, Tensor x, Tensor mu_or_kl, Tensor? logvar, Tensor? beta, float beta_scale,"
      " int reduction, str likelihood, float? x_scale, Tensor grad, Tensor(a!) recon_for_1)"
      " -> (Tensor grad_mu_or_kl, Tensor grad_logvar)");

  // The noise itself: element i of a seed's block is output i % 4 of Philox counter i / 4. seed is a prefix of size.
  m.def("normal(Tensor seed, int[] size) -> Tensor");
  m.def("mix_seed(Tensor seed, Tensor index) -> Tensor");

  // x[b, d] = whether pixel d of images[index[b]], with values 0..max_value, is set: by the noise of mix_seed(seed,
  // index[b]).
  m.def("binarize(Tensor images, Tensor? index, Tensor seed, int max_value) -> Tensor x");

  // A layer, but for its dense matrix product. activation: 0 none, 1 tanh, 2 relu.
  m.def("bias_activation_(Tensor(a!) out, Tensor? bias, int activation) -> ()");
  // For activation 0 grad_input is grad, and what is returned for it is empty, (0,).
  m.def("activation_backward(Tensor out, Tensor grad, int activation) -> (Tensor grad_input, Tensor grad_bias)");
  m.def(
      "activation_backward_(Tensor out, Tensor(a!) grad, int activation) -> Tensor grad_bias");  // grad_input over grad
  // On a CPU, the same for x, bool or uint8, that mostly holds zeros: activation(x_scale x @ weight.T + bias), and the
  // gradient of weight; the part of x that is not 0, from some of its rows.
  m.def("sparse_linear(Tensor x, float? x_scale, Tensor weight, Tensor? bias, int activation) -> Tensor out");
  m.def("sparse_linear_weight_grad(Tensor x, float? x_scale, Tensor grad) -> Tensor grad_weight");
  m.def("density(Tensor x) -> float");
  // On a GPU, for products that tensor cores take, or which are taken in pieces: x (rows, D), float32 or bytes, as the
  // bfloat16 numbers whose sum it is, high, middle and low, in the order that `pieces` spells with h, m and l: (rows,
  // pieces, D), or by rows (pieces, rows, D), rounded up to 8; and activation(scale * the sum of pieces (count, rows,
  // D) over the first dimension + bias).
  m.def("split_bfloat16(Tensor x, str pieces, bool by_rows) -> Tensor");
  m.def("add_pieces(Tensor pieces, float scale, Tensor? bias, int activation) -> Tensor");
  // On a GPU: beta KL - log p(x|z) on average, the mean KL, and loss + ELBO, (3,).
  m.def("elbo_terms(Tensor log_prob, Tensor kl, Tensor? beta, float beta_scale) -> Tensor");

  // On a GPU, a step of Adam over all weights: weights, means and squares are written over; lr is a tensor or a number.
  m.def(
      "adam_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor[] steps, Tensor? "
      "lr,"
      " float fixed_lr, float beta1, float beta2, float eps) -> ()");

  // Uninitialised memory for a large result of Python's own making, from where kernels' results come.
  m.def("empty(Tensor like, int[] size) -> Tensor");

  // One function of formulas/elementary.h, by its name in args.h, over every element: for the tests.
  m.def("elementary(str name, Tensor x) -> Tensor");
}

}  // namespace aevb

#undef AEVB_DEF

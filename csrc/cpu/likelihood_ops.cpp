// SPDX-License-Identifier: Apache-2.0
// log p(x|z) on CPU tensors.
#include <torch/csrc/stable/library.h>

#include "work.h"

namespace aevb::cpu {
namespace {

using std::optional;

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

}  // namespace
}  // namespace aevb::cpu

STABLE_TORCH_LIBRARY_IMPL(aevb, CPU, m) {
  using namespace aevb::cpu;
  AEVB_CPU_OP(m, bernoulli_log_prob);
}

// SPDX-License-Identifier: Apache-2.0
// What the ops share: work divided between threads, row results joined from chunks, and the kernels' arguments.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "tensors.h"

namespace aevb::cpu {

// Work below these many elements is not worth a second thread.
inline constexpr int64_t kGaussianGrain = 4096, kLikelihoodGrain = 16384;

// Runs kernel(args, begin, end) over all rows and chunks of a matrix [rows, D].
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t D, int64_t grain) {
  const int64_t units = rows * chunks(D), unit_elements = std::clamp<int64_t>(D, 1, kChunk);
  if (units == 0) return;
  const int64_t grain_units = std::max<int64_t>(1, (grain + unit_elements - 1) / unit_elements);
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

inline GaussianArgs gaussian_args(const Matrix& mu, const Matrix& logvar, const LatentShape& shape) {
  GaussianArgs a{};
  a.mu = mu.rows;
  a.logvar = logvar.rows;
  a.B = shape.B;
  a.D = shape.D;
  a.seed_block = 1;
  a.grad_kl_scale = 1.0f;
  return a;
}

inline LikelihoodArgs likelihood_args(const Matrix& output, const Matrix& x, const LikelihoodShape& shape,
                                      bool from_probs, std::optional<double> x_scale) {
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

}  // namespace aevb::cpu

// Registers an op, its bare twin and its gradient (see bindings.cpp).
#define AEVB_CPU_OP(m, name)                  \
  m.impl(#name, TORCH_BOX(&name));            \
  m.impl(#name "_forward", TORCH_BOX(&name)); \
  m.impl(#name "_backward", TORCH_BOX(&name##_backward))

// SPDX-License-Identifier: Apache-2.0
// The CPU as a device of ops.h. Large results come from the cache of buffers, and threads share rows.
#include "../ops.h"

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "../formulas/philox.h"
#include "columns.h"
#include "isa.h"
#include "results.h"

namespace aevb::cpu {
namespace {

// Elements below which work is not worth a second thread.
constexpr int64_t kGaussianGrain = 4096, kLikelihoodGrain = 16384;

// Runs kernel(args, begin, end) over all units, chunks of rows, of a matrix [rows, D].
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t D, int64_t grain) {
  const int64_t units = rows * chunks(D), unit_elements = std::clamp<int64_t>(D, 1, kChunk);
  if (units == 0) return;
  const int64_t grain_units = std::max<int64_t>(1, (grain + unit_elements - 1) / unit_elements);
  if (units <= grain_units) return kernel(args, 0, units);
  torch::stable::parallel_for(0, units, grain_units, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// One float for each row. Where a row has several chunks, each chunk has a float, and join() joins them.
class RowResults {
 public:
  RowResults(float* rows, int64_t count, int64_t D) : rows_(rows), count_(count), chunks_(chunks(D)) {
    if (rows && chunks_ > 1) partial_.reset(new float[static_cast<size_t>(count * chunks_)]);
  }
  float* target() const { return partial_ ? partial_.get() : rows_; }
  void join(float factor) const {
    for (int64_t r = 0; partial_ && r < count_; ++r)
      rows_[r] = factor * kernels().sum_groups(partial_.get() + r * chunks_, chunks_);
  }

 private:
  float* rows_;  // [count]
  int64_t count_, chunks_;
  std::unique_ptr<float[]> partial_;  // [count, chunks]
};

class Cpu {
 public:
  explicit Cpu(const Tensor&) {}

  Tensor empty(const Sizes& sizes, ScalarType dtype) { return empty_result(sizes, dtype); }

  void gaussian(GaussianArgs a) {
    const RowResults results(a.kl, a.B, a.D);
    a.kl = results.target();
    run(kernels().gaussian, a, a.B, a.D, a.z ? kGaussianGrain / std::max<int64_t>(a.L, 1) : kLikelihoodGrain);
    results.join(0.5f);
  }

  void gaussian_backward(const GaussianArgs& a) {
    const int64_t grain = a.grad_z.data ? kGaussianGrain / std::max<int64_t>(a.L, 1) : kLikelihoodGrain;
    run(kernels().gaussian_backward, a, a.B, a.D, grain);
  }

  void gaussian_log_ratio(GaussianArgs a) {
    const RowResults results(a.log_ratio, a.L * a.B, a.D);
    a.log_ratio = results.target();
    run(kernels().gaussian_log_ratio, a, a.B, a.D, kGaussianGrain / std::max<int64_t>(a.L, 1));
    results.join(0.5f);
  }

  void gaussian_log_ratio_backward(const GaussianArgs& a) {
    run(kernels().gaussian_log_ratio_backward, a, a.B, a.D, kGaussianGrain / std::max<int64_t>(a.L, 1));
  }

  void likelihood(LikelihoodArgs a) {
    if (a.done_for_1 && *a.grad == 1.0f) return;
    const RowResults results(a.log_prob, a.R, a.D);
    a.log_prob = results.target();
    run(kernels().likelihood, a, a.R, a.D, kLikelihoodGrain);
    results.join(1.0f);
  }

  void loss(const LossArgs& a) {
    const float beta = a.beta ? a.beta_scale * *a.beta : a.beta_scale, one_over_L = 1.0f / static_cast<float>(a.L);
    const auto log_likelihood = [&](int64_t b) {
      return a.L == 1 ? a.log_prob[b] : kernels().sum(a.log_prob + b, a.L, a.B) * one_over_L;
    };
    reduce(a, a.loss, [&](int64_t b) { return fmadd(beta, a.kl[b], -log_likelihood(b)); });
    if (a.log_likelihood) reduce(a, a.log_likelihood, log_likelihood);
    if (a.kl_term) reduce(a, a.kl_term, [&](int64_t b) { return a.kl[b]; });
  }

  void scale(const ScaleArgs& a) {
    const float scale = a.beta ? a.scale * *a.beta : a.scale;
    for (int64_t i = 0; i < a.n; ++i) a.result[i] = scale * a.x[i * a.x_stride];
  }

  void normal(const NormalArgs& a) {
    constexpr int64_t kPiece = 16384;  // elements of a piece, which one thread fills
    const int64_t pieces = (a.n + kPiece - 1) / kPiece;
    const int64_t grain = std::max<int64_t>(1, kGaussianGrain / std::min(a.n, kPiece));
    torch::stable::parallel_for(0, a.blocks * pieces, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t block = unit / pieces, first = unit % pieces * kPiece;
        kernels().normals(static_cast<uint64_t>(a.seeds[block]), first, std::min(kPiece, a.n - first),
                          a.eps + block * a.n + first);
      }
    });
  }

  void mix_seed(const MixSeedArgs& a) {
    torch::stable::parallel_for(0, a.n, kGaussianGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        a.mixed[i] =
            static_cast<int64_t>(aevb::mix_seed(static_cast<uint64_t>(a.seed[i]), static_cast<uint64_t>(a.index[i])));
    });
  }

  void binarize(const BinarizeArgs& a) {
    for (int64_t b = 0; a.index && b < a.B; ++b)
      if (a.index[b] < 0 || a.index[b] >= a.N)
        fail("binarize", "index[", b, "] is ", a.index[b], "; expected 0 to ", a.N - 1, ", an image of ", a.N);
    const int64_t grain = std::max<int64_t>(1, kGaussianGrain / a.D);
    torch::stable::parallel_for(0, a.B, grain, [&](int64_t begin, int64_t end) { kernels().binarize(a, begin, end); });
  }

  void elementary(const ElementaryArgs& a) { kernels().elementary(a); }

  void activation_backward(const ActivationArgs& a) { cpu::activation_backward(a); }

 private:
  // Reduces of_datapoint(b) over the datapoints, as the loss is reduced.
  template <class F>
  static void reduce(const LossArgs& a, float* result, const F& of_datapoint) {
    std::unique_ptr<float[]> buffer;
    float* rows = result;
    if (a.reduction != Reduction::none) {
      buffer.reset(new float[static_cast<size_t>(a.B)]);
      rows = buffer.get();
    }
    for (int64_t b = 0; b < a.B; ++b) rows[b] = of_datapoint(b);
    if (a.reduction == Reduction::none) return;
    *result = kernels().sum(rows, a.B, 1);
    if (a.reduction == Reduction::mean) *result *= 1.0f / static_cast<float>(a.B);
  }
};

}  // namespace
}  // namespace aevb::cpu

STABLE_TORCH_LIBRARY_IMPL(aevb, CPU, m) { AEVB_REGISTER(m, aevb::cpu::Cpu); }

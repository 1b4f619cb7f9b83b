// SPDX-License-Identifier: Apache-2.0
// log p(x|z) over rows of decoder outputs, its gradient, or both in one pass, for any likelihood of formulas/.
#pragma once
#include "../formulas/bernoulli.h"
#include "convert.h"
#include "sum.h"

namespace aevb::cpu {
namespace {

// How many lanes of a group are summed side by side: as many as keep the machine busy and fit into its registers.
#if defined(AEVB_AVX512)
constexpr int kAbreast = kLanes;
#else
constexpr int kAbreast = kLanes / 2;
#endif

// What is wanted of the elements: their -log p, the gradient, or both.
enum class Want { log_prob, grad, both };
constexpr bool has_log_prob(Want want) { return want != Want::grad; }
constexpr bool has_grad(Want want) { return want != Want::log_prob; }

// What multiplies a row's gradient: first the scale, then the upstream gradient, so that a gradient taken for an
// upstream gradient of 1 and multiplied later has the same bits.
struct Upstream {
  float scale, grad;
};

// kAbreast neighbouring elements. grad may be output itself.
template <class L, Want kWant>
AEVB_FORMULA void add_elements(const float* output, const float* x, float x_scale, Upstream g, float* linear,
                               float* product, float* grad) {
#pragma omp simd
  for (int k = 0; k < kAbreast; ++k) {
    const float out = output[k], target = x[k];
    if constexpr (has_log_prob(kWant)) {
      const NegLogProb t = L::add_neg_log_prob(linear[k], out, target, x_scale);
      linear[k] = t.sum;
      product[k] = fmadd(product[k], t.excess, product[k] + t.excess);  // (1 + product) (1 + excess) - 1
    }
    if constexpr (has_grad(kWant)) grad[k] = g.grad * (g.scale * L::grad(out, target, x_scale));
  }
}

// A group of n <= kGroup elements: writes its gradient, gives -log p.
template <class L, Want kWant>
AEVB_FORMULA float add_group(const float* output, const float* x, float x_scale, Upstream g, int n, float* grad) {
  alignas(64) float linear[kLanes], product[kLanes];
  for (int first = 0; first < kLanes; first += kAbreast) {
    float linear_sum[kAbreast] = {}, product_less_1[kAbreast] = {};
    int i = first;
    for (; i + kAbreast <= n; i += kLanes)
      add_elements<L, kWant>(output + i, x + i, x_scale, g, linear_sum, product_less_1, grad + i);
    if (i < n) {
      alignas(64) float output_tail[kAbreast], x_tail[kAbreast] = {}, grad_tail[kAbreast];
      for (int k = 0; k < kAbreast; ++k) output_tail[k] = L::padding;
      __builtin_memcpy(output_tail, output + i, (n - i) * sizeof(float));
      __builtin_memcpy(x_tail, x + i, (n - i) * sizeof(float));
      add_elements<L, kWant>(output_tail, x_tail, x_scale, g, linear_sum, product_less_1, grad_tail);
      if constexpr (has_grad(kWant)) __builtin_memcpy(grad + i, grad_tail, (n - i) * sizeof(float));
    }
    if constexpr (has_log_prob(kWant)) {
#pragma omp simd
      for (int k = 0; k < kAbreast; ++k) {
        linear[first + k] = linear_sum[k];
        product[first + k] = product_less_1[k];
      }
    }
  }
  if constexpr (!has_log_prob(kWant)) return 0.0f;
#pragma omp simd
  for (int k = 0; k < kLanes; ++k) linear[k] += log1p_nonnegative(product[k]);
  return fold_lanes(linear);
}

constexpr int64_t kPastCaches = int64_t{1} << 23;  // elements: 32 MiB

// The work [begin, end), numbered row * chunks(D) + chunk.
template <class L, Want kWant>
inline void likelihood_units(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  alignas(64) float output_buffer[kGroup], x_buffer[kGroup], grad_buffer[kGroup];
  const Dtype dtype = a.output.dtype;
  const bool past_caches =
      has_grad(kWant) && dtype == Dtype::float32 && a.R * a.D >= kPastCaches && a.grad_output != a.output.data;
  const bool in_place = dtype == Dtype::float32 && !past_caches;
  const int64_t per_row = chunks(a.D);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / per_row, first = unit % per_row * kChunk;
    const int64_t last = first + kChunk < a.D ? first + kChunk : a.D;
    const int64_t sample = row / a.x_rows, b = row % a.x_rows;
    const float upstream = a.grad ? a.grad[sample * a.grad_sample_stride + b * a.grad_stride] : 1.0f;
    const Upstream g{a.grad_scale, upstream};
    PairwiseSum sum;
    for (int64_t column = first; column < last; column += kGroup) {
      const int n = static_cast<int>(column + kGroup < last ? kGroup : last - column);
      const float* output = read_rows(a.output, row, 1, column, n, output_buffer);
      const float* x = read_rows(a.x, b, 1, column, n, x_buffer);
      void* out = has_grad(kWant) ? element(a.grad_output, dtype, row * a.D + column) : nullptr;
      float* grad = in_place && has_grad(kWant) ? static_cast<float*>(out) : grad_buffer;
      sum.add(add_group<L, kWant>(output, x, a.x_scale, g, n, grad));
      if (has_grad(kWant) && past_caches)
        stream_floats(grad, n, static_cast<float*>(out));
      else if (has_grad(kWant) && !in_place)
        write_floats(grad, n, dtype, out);
    }
    if (has_log_prob(kWant)) a.log_prob[unit] = -sum.total();
  }
  if (past_caches) end_stream();
}

template <class L>
inline void likelihood_of(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  if (!a.log_prob) return likelihood_units<L, Want::grad>(a, begin, end);
  if (!a.grad_output) return likelihood_units<L, Want::log_prob>(a, begin, end);
  likelihood_units<L, Want::both>(a, begin, end);
}

// log_prob, grad_output, or both: those that are not null.
inline void likelihood_rows(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  switch (a.likelihood) {
    case Likelihood::bernoulli_logits: return likelihood_of<BernoulliLogits>(a, begin, end);
    case Likelihood::bernoulli_probs: return likelihood_of<BernoulliProbs>(a, begin, end);
  }
}

}  // namespace
}  // namespace aevb::cpu

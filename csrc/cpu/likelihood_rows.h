// SPDX-License-Identifier: Apache-2.0
// log p(x|z) over rows of decoder outputs, and its gradient, for any likelihood of formulas/.
#pragma once
#include "../formulas/bernoulli.h"
#include "convert.h"
#include "sum.h"

namespace aevb::cpu {
namespace {

// Adds kWidth elements to the lanes of a group.
template <class L, int kWidth>
AEVB_FORMULA void add_lanes(const float* output, const float* x, float x_scale, float* linear, float* product) {
#pragma omp simd
  for (int k = 0; k < kWidth; ++k) {
    const NegLogProb t = L::add_neg_log_prob(linear[k], output[k], x[k], x_scale);
    linear[k] = t.sum;
    product[k] = fmadd(product[k], t.excess, product[k] + t.excess);  // (1 + product) (1 + excess) - 1
  }
}

// -log p of a group of n <= kGroup elements.
template <class L>
AEVB_FORMULA float neg_log_prob_group(const float* output, const float* x, float x_scale, int n) {
  alignas(64) float linear[kLanes] = {}, product[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) add_lanes<L, kLanes>(output + i, x + i, x_scale, linear, product);
  if (i < n) {
    alignas(64) float output_tail[kLanes], x_tail[kLanes] = {};
    for (int k = 0; k < kLanes; ++k) output_tail[k] = L::padding;
    __builtin_memcpy(output_tail, output + i, (n - i) * sizeof(float));
    __builtin_memcpy(x_tail, x + i, (n - i) * sizeof(float));
    if (n - i <= kLanes / 2)
      add_lanes<L, kLanes / 2>(output_tail, x_tail, x_scale, linear, product);
    else
      add_lanes<L, kLanes>(output_tail, x_tail, x_scale, linear, product);
  }
#pragma omp simd
  for (int k = 0; k < kLanes; ++k) linear[k] += log1p_nonnegative(product[k]);
  return fold_lanes(linear);
}

template <class L>
AEVB_FORMULA void grad_elements(const float* output, const float* x, float x_scale, float g, int n, float* grad) {
#pragma omp simd
  for (int i = 0; i < n; ++i) grad[i] = g * L::grad(output[i], x[i], x_scale);
}

template <class L>
AEVB_FORMULA void grad_group(const float* output, const float* x, float x_scale, float g, int n, float* grad) {
  constexpr int kWidth = 16;
  const int whole = n & ~(kWidth - 1);
  grad_elements<L>(output, x, x_scale, g, whole, grad);
  if (whole < n) {
    alignas(64) float output_tail[kWidth] = {}, x_tail[kWidth] = {}, grad_tail[kWidth];
    __builtin_memcpy(output_tail, output + whole, (n - whole) * sizeof(float));
    __builtin_memcpy(x_tail, x + whole, (n - whole) * sizeof(float));
    grad_elements<L>(output_tail, x_tail, x_scale, g, kWidth, grad_tail);
    __builtin_memcpy(grad + whole, grad_tail, (n - whole) * sizeof(float));
  }
}

// Calls visit(row, column, n) for each group of the work [begin, end), numbered row * chunks(D) + chunk, and
// done(unit) after the last group of each unit.
template <class Visit, class Done>
inline void for_groups(int64_t D, int64_t begin, int64_t end, const Visit& visit, const Done& done) {
  const int64_t per_row = chunks(D);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / per_row, first = unit % per_row * kChunk;
    const int64_t last = first + kChunk < D ? first + kChunk : D;
    for (int64_t column = first; column < last; column += kGroup)
      visit(row, column, static_cast<int>(column + kGroup < last ? kGroup : last - column));
    done(unit);
  }
}

template <class L>
inline void log_prob_rows(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  alignas(64) float output_buffer[kGroup], x_buffer[kGroup];
  PairwiseSum sum;
  for_groups(
      a.D, begin, end,
      [&](int64_t row, int64_t column, int n) {
        const float* output = read_rows(a.output, row, 1, column, n, output_buffer);
        const float* x = read_rows(a.x, row % a.x_rows, 1, column, n, x_buffer);
        sum.add(neg_log_prob_group<L>(output, x, a.x_scale, n));
      },
      [&](int64_t unit) {
        a.log_prob[unit] = -sum.total();
        sum = PairwiseSum();
      });
}

constexpr int64_t kPastCaches = int64_t{1} << 23;  // elements: 32 MiB

template <class L>
inline void log_prob_backward_rows(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  alignas(64) float output_buffer[kGroup], x_buffer[kGroup], grad_buffer[kGroup];
  const Dtype dtype = a.output.dtype;
  const bool past_caches = dtype == Dtype::float32 && a.R * a.D >= kPastCaches;
  for_groups(
      a.D, begin, end,
      [&](int64_t row, int64_t column, int n) {
        const float* output = read_rows(a.output, row, 1, column, n, output_buffer);
        const int64_t sample = row / a.x_rows, b = row % a.x_rows;
        const float* x = read_rows(a.x, b, 1, column, n, x_buffer);
        const float g = a.grad_scale * a.grad[sample * a.grad_sample_stride + b * a.grad_stride];
        void* out = element(a.grad_output, dtype, row * a.D + column);
        const bool in_place = dtype == Dtype::float32 && !past_caches;
        float* grad = in_place ? static_cast<float*>(out) : grad_buffer;
        grad_group<L>(output, x, a.x_scale, g, n, grad);
        if (past_caches)
          stream_floats(grad, n, static_cast<float*>(out));
        else if (!in_place)
          write_floats(grad, n, dtype, out);
      },
      [](int64_t) {});
  if (past_caches) end_stream();
}

inline void likelihood_rows(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  switch (a.likelihood) {
    case Likelihood::bernoulli_logits: return log_prob_rows<BernoulliLogits>(a, begin, end);
    case Likelihood::bernoulli_probs: return log_prob_rows<BernoulliProbs>(a, begin, end);
  }
}

inline void likelihood_backward_rows(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  switch (a.likelihood) {
    case Likelihood::bernoulli_logits: return log_prob_backward_rows<BernoulliLogits>(a, begin, end);
    case Likelihood::bernoulli_probs: return log_prob_backward_rows<BernoulliProbs>(a, begin, end);
  }
}

}  // namespace
}  // namespace aevb::cpu

// SPDX-License-Identifier: Apache-2.0
// log p(x|z) of each row of a decoder's outputs, its gradient, or both in one pass, for any likelihood of formulas/.
#pragma once
#include "../formulas/likelihoods.h"
#include "convert.h"
#include "sum.h"

namespace aevb::cpu {
namespace {

// Lanes of a group that are summed side by side: enough to keep the machine busy, and few enough for its registers.
#if defined(AEVB_AVX512)
constexpr int kAbreast = kLanes;
#else
constexpr int kAbreast = kLanes / 2;
#endif

// Results of a kernel: -log p, its gradient, or both.
enum class Want { log_prob, grad, both };
constexpr bool has_log_prob(Want want) { return want != Want::grad; }
constexpr bool has_grad(Want want) { return want != Want::log_prob; }

// The factors of a row's gradient. The scale multiplies first, and then the upstream gradient: so a gradient that was
// taken for an upstream gradient of 1, and is multiplied later, has the same bits.
struct Upstream {
  float scale, grad;
};

// A run of elements: target x, parameters p0 and p1, weights, and gradients of the parameters. Only likelihoods with
// two parameters use p1 and grad1. A gradient may be written over its parameter.
struct Elements {
  const float *x, *p0, *p1, *weight;  // [n]
  float *grad0, *grad1;               // [n]

  // The run from element i on.
  template <class L, Want kWant, Weighting kWeighting>
  AEVB_FORMULA Elements from(int i) const {
    const int of_p1 = L::kParams > 1 ? i : 0, of_grad = has_grad(kWant) ? i : 0;
    const int of_weight = kWeighting == Weighting::none ? 0 : i;
    return {x + i, p0 + i, p1 + of_p1, weight + of_weight, grad0 + of_grad, grad1 + (L::kParams > 1 ? of_grad : 0)};
  }
};

// Adds kAbreast neighbouring elements to the lanes linear and product [kAbreast], and writes their gradients. Elements
// of weight 0 are left out by selection, so that a NaN in one of them does no harm.
template <class L, Want kWant, Weighting kWeighting>
AEVB_FORMULA void add_elements(L likelihood, const Elements& at, Upstream g, float* linear, float* product) {
  const float *x = at.x, *p0 = at.p0, *p1 = at.p1, *weight = at.weight;
  float *grad0 = at.grad0, *grad1 = at.grad1;
#pragma omp simd
  for (int k = 0; k < kAbreast; ++k) {
    const float target = x[k], a = p0[k], b = L::kParams > 1 ? p1[k] : 0.0f;
    const float w = kWeighting == Weighting::none ? 1.0f : weight[k];
    const bool selected = kWeighting == Weighting::none || w != 0.0f;
    if constexpr (has_log_prob(kWant) && kWeighting == Weighting::weights) {
      const NegLogProb t = likelihood.add_neg_log_prob(0.0f, target, a, b);
      const float element = L::kProduct ? t.sum + log1p_nonnegative(t.excess) : t.sum;
      linear[k] = selected ? fmadd(w, element, linear[k]) : linear[k];
    } else if constexpr (has_log_prob(kWant)) {
      const NegLogProb t = likelihood.add_neg_log_prob(linear[k], target, a, b);
      linear[k] = selected ? t.sum : linear[k];
      // (1 + product) (1 + excess) - 1
      const float excess = selected ? t.excess : 0.0f;
      if constexpr (L::kProduct) product[k] = fmadd(product[k], excess, product[k] + excess);
    }
    if constexpr (has_grad(kWant)) {
      const LikelihoodGradient d = likelihood.grad(target, a, b);
      const float scale = kWeighting == Weighting::weights ? g.scale * w : g.scale;
      grad0[k] = selected ? g.grad * (scale * d.p0) : 0.0f;
      if constexpr (L::kParams > 1) grad1[k] = selected ? g.grad * (scale * d.p1) : 0.0f;
    }
  }
}

// Adds the last n < kAbreast elements of a group, as add_elements does.
template <class L, Want kWant, Weighting kWeighting>
AEVB_FORMULA void add_last_elements(L likelihood, const Elements& at, Upstream g, int n, float* linear,
                                    float* product) {
  alignas(64) float x[kAbreast] = {}, p0[kAbreast] = {}, p1[kAbreast] = {}, weight[kAbreast] = {};
  alignas(64) float grad0[kAbreast], grad1[kAbreast], linear_before[kAbreast], product_before[kAbreast];
  const auto bytes = n * sizeof(float);
  __builtin_memcpy(x, at.x, bytes);
  __builtin_memcpy(p0, at.p0, bytes);
  if constexpr (L::kParams > 1) __builtin_memcpy(p1, at.p1, bytes);
  if constexpr (kWeighting != Weighting::none) __builtin_memcpy(weight, at.weight, bytes);
  for (int k = 0; k < kAbreast; ++k) linear_before[k] = linear[k], product_before[k] = product[k];
  add_elements<L, kWant, kWeighting>(likelihood, {x, p0, p1, weight, grad0, grad1}, g, linear, product);
  for (int k = 0; k < kAbreast; ++k) {
    linear[k] = k < n ? linear[k] : linear_before[k];
    product[k] = k < n ? product[k] : product_before[k];
  }
  if constexpr (has_grad(kWant)) {
    __builtin_memcpy(at.grad0, grad0, bytes);
    if constexpr (L::kParams > 1) __builtin_memcpy(at.grad1, grad1, bytes);
  }
}

// Writes the gradients of a group of n <= kGroup elements, and returns its -log p.
template <class L, Want kWant, Weighting kWeighting>
AEVB_FORMULA float add_group(L likelihood, const Elements& at, Upstream g, int n) {
  alignas(64) float linear[kLanes], product[kLanes];
  for (int first = 0; first < kLanes; first += kAbreast) {
    float linear_sum[kAbreast] = {}, product_less_1[kAbreast] = {};
    int i = first;
    for (; i + kAbreast <= n; i += kLanes)
      add_elements<L, kWant, kWeighting>(likelihood, at.from<L, kWant, kWeighting>(i), g, linear_sum, product_less_1);
    if (i < n)
      add_last_elements<L, kWant, kWeighting>(likelihood, at.from<L, kWant, kWeighting>(i), g, n - i, linear_sum,
                                              product_less_1);
    if constexpr (has_log_prob(kWant)) {
#pragma omp simd
      for (int k = 0; k < kAbreast; ++k) {
        linear[first + k] = linear_sum[k];
        product[first + k] = product_less_1[k];
      }
    }
  }
  if constexpr (!has_log_prob(kWant)) return 0.0f;
  if constexpr (L::kProduct && kWeighting != Weighting::weights) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) linear[k] += log1p_nonnegative(product[k]);
  }
  return fold_lanes(linear);
}

constexpr int64_t kPastCaches = int64_t{1} << 23;  // elements, 32 MiB: larger gradients are written past the caches

// Writes a gradient to memory, group by group. begin() gives the place to compute a group's gradient, and end() moves
// it to its tensor.
class GradientWriter {
 public:
  // data: the gradient [rows, D]; null: it is computed and dropped. of: its parameter [rows, D].
  AEVB_FORMULA GradientWriter(void* data, const Rows& of, int64_t elements)
      : data_(data),
        dtype_(of.dtype),
        past_caches_(data && of.dtype == Dtype::float32 && elements >= kPastCaches && data != of.data),
        in_place_(data && of.dtype == Dtype::float32 && !past_caches_) {}

  AEVB_FORMULA float* begin(int64_t at) {
    out_ = data_ ? element(data_, dtype_, at) : nullptr;
    return in_place_ ? static_cast<float*>(out_) : buffer_;
  }
  AEVB_FORMULA void end(int n) {
    if (past_caches_)
      stream_floats(buffer_, n, static_cast<float*>(out_));
    else if (data_ && !in_place_)
      write_floats(buffer_, n, dtype_, out_);
  }
  AEVB_FORMULA void finish() const {
    if (past_caches_) end_stream();
  }

 private:
  alignas(64) float buffer_[kGroup];
  void *data_, *out_ = nullptr;
  Dtype dtype_;
  bool past_caches_, in_place_;
};

// Columns [column, column + n) of a row of weights. A mask is read as 1 where an element takes part, and else 0.
AEVB_FORMULA const float* read_weights(const Rows& m, int64_t row, int64_t column, int n, float* buffer) {
  if (m.dtype != Dtype::uint8) return read_rows(m, row, 1, column, n, buffer);
  const auto* byte = static_cast<const uint8_t*>(element(m.data, m.dtype, row * m.stride + column));
#pragma omp simd
  for (int i = 0; i < n; ++i) buffer[i] = byte[i] ? 1.0f : 0.0f;
  return buffer;
}

// p [n] plus an offset, in `buffer` [n].
AEVB_FORMULA const float* with_offset(const float* p, int n, float offset, float* buffer) {
#pragma omp simd
  for (int i = 0; i < n; ++i) buffer[i] = p[i] + offset;
  return buffer;
}

// Computes the units [begin, end), numbered row * chunks(D) + chunk.
template <class L, Want kWant, Weighting kWeighting>
inline void likelihood_units(L likelihood, const LikelihoodArgs& a, int64_t begin, int64_t end) {
  constexpr bool kTwo = L::kParams > 1, kWeighted = kWeighting != Weighting::none;
  alignas(64) float x_buffer[kGroup], p0_buffer[kGroup], p1_buffer[kTwo ? kGroup : 1];
  alignas(64) float weight_buffer[kWeighted ? kGroup : 1];
  GradientWriter grad0(a.grad_param[0], a.param[0], a.R * a.D), grad1(a.grad_param[1], a.param[1], a.R * a.D);
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
      Elements at{};
      at.p0 = read_rows(a.param[0], row, 1, column, n, p0_buffer);
      if (a.offset) at.p0 = with_offset(at.p0, n, a.offset[b], p0_buffer);
      if constexpr (kTwo) at.p1 = read_rows(a.param[1], row, 1, column, n, p1_buffer);
      at.x = read_rows(a.x, b, 1, column, n, x_buffer);
      if constexpr (kWeighted) at.weight = read_weights(a.weight, b, column, n, weight_buffer);
      if constexpr (has_grad(kWant)) at.grad0 = grad0.begin(row * a.D + column);
      if constexpr (has_grad(kWant) && kTwo) at.grad1 = grad1.begin(row * a.D + column);
      sum.add(add_group<L, kWant, kWeighting>(likelihood, at, g, n));
      if constexpr (has_grad(kWant)) grad0.end(n);
      if constexpr (has_grad(kWant) && kTwo) grad1.end(n);
    }
    if (has_log_prob(kWant) && a.log_prob) a.log_prob[unit] = -sum.total();
  }
  if constexpr (has_grad(kWant)) grad0.finish();
  if constexpr (has_grad(kWant) && kTwo) grad1.finish();
}

template <class L, Weighting kWeighting>
inline void weighted_rows(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  const L likelihood = likelihood_of<L>(a);
  if constexpr (kWeighting == Weighting::none)  // with weights, a gradient alone is not worth the time to compile it
    if (!a.log_prob) return likelihood_units<L, Want::grad, kWeighting>(likelihood, a, begin, end);
  if (!wants_gradient(a)) return likelihood_units<L, Want::log_prob, kWeighting>(likelihood, a, begin, end);
  likelihood_units<L, Want::both, kWeighting>(likelihood, a, begin, end);
}

template <class L>
inline void rows_of(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  const Weighting weighting = weighting_of(a);
  if (weighting == Weighting::none) return weighted_rows<L, Weighting::none>(a, begin, end);
  // Without a logarithm to share, a mask is a weight of 1 or 0, and has the same bits.
  if constexpr (L::kProduct)
    if (weighting == Weighting::mask) return weighted_rows<L, Weighting::mask>(a, begin, end);
  weighted_rows<L, Weighting::weights>(a, begin, end);
}

// log_prob and the gradients. A null output pointer is not computed.
inline void likelihood_rows(const LikelihoodArgs& a, int64_t begin, int64_t end) {
#define AEVB_ROWS(name, Struct, ...) \
  case Likelihood::name: return rows_of<Struct>(a, begin, end);
  switch (a.likelihood) { AEVB_LIKELIHOODS(AEVB_ROWS) }
#undef AEVB_ROWS
}

}  // namespace
}  // namespace aevb::cpu

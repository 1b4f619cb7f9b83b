// SPDX-License-Identifier: Apache-2.0
// Work after a layer's matrix product: bias and activation in one pass, and their gradients in one pass.
#pragma once
#include "../formulas/activation.h"
#include "isa.h"

namespace aevb::cpu {
namespace {

// x = activation(x + bias), in place, for x [n] and bias [n] (null: 0).
template <Activation kActivation>
AEVB_FORMULA void activate(float* x, const float* bias, int64_t n) {
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = activated<kActivation>(x[i] + bias[i]);
  } else if (kActivation != Activation::none) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = activated<kActivation>(x[i]);
  }
}

inline void activate(Activation activation, float* x, const float* bias, int64_t n) {
  switch (activation) {
    case Activation::none: return activate<Activation::none>(x, bias, n);
    case Activation::tanh: return activate<Activation::tanh>(x, bias, n);
    case Activation::relu: return activate<Activation::relu>(x, bias, n);
  }
}

inline void activation_rows(const ActivationArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) activate(a.activation, a.out + row * a.D, a.bias, a.D);
}

// Writes the gradient of the activation's input to grad_input [n], and adds it to sum [n].
template <Activation kActivation>
AEVB_FORMULA void add_gradients(const float* out, const float* grad, float* grad_input, float* sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = activation_gradient<kActivation>(out[i], grad[i]);
    if (kActivation != Activation::none) grad_input[i] = g;
    sum[i] += g;
  }
}

inline void activation_backward_rows(const ActivationArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float* sum = a.partial_sum + block * a.D;
    for (int64_t i = 0; i < a.D; ++i) sum[i] = 0.0f;
    const int64_t last = (block + 1) * kActivationBlock < a.rows ? (block + 1) * kActivationBlock : a.rows;
    for (int64_t row = block * kActivationBlock; row < last; ++row) {
      const float *out = a.out + row * a.D, *grad = a.grad + row * a.grad_stride;
      float* grad_input = a.grad_input + row * a.D;
      switch (a.activation) {
        case Activation::none: add_gradients<Activation::none>(out, grad, grad_input, sum, a.D); break;
        case Activation::tanh: add_gradients<Activation::tanh>(out, grad, grad_input, sum, a.D); break;
        case Activation::relu: add_gradients<Activation::relu>(out, grad, grad_input, sum, a.D); break;
      }
    }
  }
}

}  // namespace
}  // namespace aevb::cpu

// SPDX-License-Identifier: Apache-2.0
// A layer's activation and its gradient, one element at a time.
#pragma once
#include "../args.h"
#include "elementary.h"

namespace aevb {
namespace {

template <Activation kActivation>
AEVB_FORMULA float activated(float x) {
  if constexpr (kActivation == Activation::tanh) return tanh_of(x);
  if constexpr (kActivation == Activation::relu) return at_least(x, 0.0f);
  return x;
}

// The gradient of the activation's input, from the activation's value y and its upstream gradient.
template <Activation kActivation>
AEVB_FORMULA float activation_gradient(float y, float grad) {
  if constexpr (kActivation == Activation::tanh) return grad * fmadd(-y, y, 1.0f);
  if constexpr (kActivation == Activation::relu) return y <= 0.0f ? 0.0f : grad;
  return grad;
}

}  // namespace
}  // namespace aevb

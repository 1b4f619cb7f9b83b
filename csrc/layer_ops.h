// SPDX-License-Identifier: Apache-2.0
// The ops that follow a layer's matrix product, written once for every device: they turn tensors into the arguments of
// kernels.
//
// A Device is as in ops.h, and has
//   void activation(const ActivationArgs&), activation_backward(ActivationArgs)
#pragma once
#include <algorithm>
#include <tuple>

#include "tensors.h"

namespace aevb {

inline Activation check_activation(const char* op, int64_t activation) {
  if (activation < 0 || activation > 2)
    fail(op, "activation is ", activation, "; expected 0 (none), 1 (tanh) or 2 (relu)");
  return static_cast<Activation>(activation);
}

// The shape {rows, D} of a contiguous float32 tensor (..., D).
inline std::pair<int64_t, int64_t> check_rows(const char* op, const char* name, const Tensor& t) {
  const Sizes sizes = sizes_of(t);
  if (t.scalar_type() != ScalarType::Float || sizes.empty() || !t.is_contiguous())
    fail(op, name, " has shape ", shape_text(t), " and dtype ", dtype_text(t.scalar_type()),
         "; expected contiguous float32 (..., D)");
  return {sizes.back() ? t.numel() / sizes.back() : 0, sizes.back()};
}

// The bias [D], checked and contiguous, if there is one.
inline OptionalTensor check_bias(const char* op, const OptionalTensor& bias, int64_t D) {
  if (!bias) return std::nullopt;
  if (bias->scalar_type() != ScalarType::Float || sizes_of(*bias) != Sizes{D})
    fail(op, "bias has shape ", shape_text(*bias), " and dtype ", dtype_text(bias->scalar_type()),
         "; expected float32 (", D, ",)");
  return dense(*bias);
}

inline const float* floats_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

template <class Device>
struct LayerOps {
  static void bias_activation_(Tensor out, const OptionalTensor& bias, int64_t activation) {
    const char* op = "bias_activation_";
    const auto [rows, D] = check_rows(op, "out", out);
    const OptionalTensor added = check_bias(op, bias, D);
    ActivationArgs a{};
    a.rows = rows;
    a.D = D;
    a.activation = check_activation(op, activation);
    a.out = out.mutable_data_ptr<float>();
    a.bias = floats_or_null(added);
    Device(out).activation(a);
  }

  static std::tuple<Tensor, Tensor> activation_backward(const Tensor& out, const Tensor& grad, int64_t activation) {
    const char* op = "activation_backward";
    if (sizes_of(grad) != sizes_of(out)) fail(op, "grad has shape ", shape_text(grad), "; expected ", shape_text(out));
    if (grad.scalar_type() != ScalarType::Float)
      fail(op, "grad is ", dtype_text(grad.scalar_type()), "; expected float32");
    const Matrix g = matrix(grad, std::max<int64_t>(check_rows(op, "out", out).second, 1));
    const bool same = check_activation(op, activation) == Activation::none;
    Device device(out);
    Tensor grad_input = device.empty(same ? Sizes{0} : sizes_of(out), ScalarType::Float);
    Tensor grad_bias = gradients(op, device, out, g.rows, activation, grad_input);
    return {grad_input, grad_bias};
  }

  static Tensor activation_backward_(const Tensor& out, Tensor grad, int64_t activation) {
    const char* op = "activation_backward_";
    if (sizes_of(grad) != sizes_of(out)) fail(op, "grad has shape ", shape_text(grad), "; expected ", shape_text(out));
    const auto [rows, D] = check_rows(op, "grad", grad);
    Device device(out);
    return gradients(op, device, out, {grad.const_data_ptr(), D, Dtype::float32}, activation, grad);
  }

 private:
  // Writes the gradient of the activation's input to `grad_input`, which may be grad, and returns the gradient of the
  // bias. Without an activation `grad_input` is not touched.
  static Tensor gradients(const char* op, Device& device, const Tensor& out, const Rows& grad, int64_t activation,
                          Tensor& grad_input) {
    const auto [rows, D] = check_rows(op, "out", out);
    ActivationArgs a{};
    a.rows = rows;
    a.D = D;
    a.activation = check_activation(op, activation);
    a.out = const_cast<float*>(out.const_data_ptr<float>());
    a.grad = static_cast<const float*>(grad.data);
    a.grad_stride = grad.stride;
    a.grad_input = grad_input.mutable_data_ptr<float>();
    Tensor grad_bias = device.empty({D}, ScalarType::Float);
    a.grad_bias = grad_bias.mutable_data_ptr<float>();
    device.activation_backward(a);
    return grad_bias;
  }
};

}  // namespace aevb

#define AEVB_REGISTER_LAYERS(library, Device)                                                   \
  library.impl("bias_activation_", TORCH_BOX(&aevb::LayerOps<Device>::bias_activation_));       \
  library.impl("activation_backward", TORCH_BOX(&aevb::LayerOps<Device>::activation_backward)); \
  library.impl("activation_backward_", TORCH_BOX(&aevb::LayerOps<Device>::activation_backward_))

// SPDX-License-Identifier: Apache-2.0
// The optimizers' ops for a GPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "../layer_ops.h"
#include "gpu.h"

namespace aevb::cuda {
namespace {

// One step of Adam over all tensors, in place. `steps` counts this step already.
void adam_(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> means,
           std::vector<Tensor> squares, std::vector<Tensor> steps, const OptionalTensor& lr, double fixed_lr,
           double beta1, double beta2, double eps) {
  const char* op = "adam_";
  const size_t count = weights.size();
  if (grads.size() != count || means.size() != count || squares.size() != count || steps.size() != count)
    fail(op, "there are ", count, " weights, ", grads.size(), " grads, ", means.size(), " means, ", squares.size(),
         " squares and ", steps.size(), " steps; expected as many of each");
  for (size_t i = 0; i < count; ++i)
    for (const Tensor* t : {&weights[i], &grads[i], &means[i], &squares[i]})
      if (t->scalar_type() != ScalarType::Float || !t->is_contiguous() || t->numel() != weights[i].numel())
        fail(op, "a tensor of number ", i, " has shape ", shape_text(*t), " and dtype ", dtype_text(t->scalar_type()),
             "; expected contiguous float32, and the ", weights[i].numel(), " elements of the weight");
  for (size_t first = 0; first < count; first += kAdamTensors) {
    AdamArgs a{};
    a.lr = floats_or_null(lr);
    a.fixed_lr = static_cast<float>(fixed_lr);
    a.beta1 = static_cast<float>(beta1);
    a.beta2 = static_cast<float>(beta2);
    a.log_beta1 = static_cast<float>(std::log(beta1));
    a.log_beta2 = static_cast<float>(std::log(beta2));
    a.eps = static_cast<float>(eps);
    for (size_t i = first; i < count && i < first + kAdamTensors; ++i)
      a.tensor[a.count++] = {weights[i].mutable_data_ptr<float>(),
                             grads[i].const_data_ptr<float>(),
                             means[i].mutable_data_ptr<float>(),
                             squares[i].mutable_data_ptr<float>(),
                             steps[i].const_data_ptr<float>(),
                             weights[i].numel(),
                             false};
    Gpu(weights[first]).adam(a);
  }
}

}  // namespace
}  // namespace aevb::cuda

#ifdef AEVB_EMULATE
STABLE_TORCH_LIBRARY_IMPL(aevb_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(aevb, CUDA, m) {
#endif
  m.impl("adam_", TORCH_BOX(&aevb::cuda::adam_));
}

// SPDX-License-Identifier: Apache-2.0
// A layer's ops for a GPU: those that a CPU has too, and what a product in pieces takes.
#include "../layer_ops.h"

#include <torch/csrc/stable/library.h>

#include "gpu.h"

namespace aevb::cuda {
namespace {

// x [rows, D] as three bfloat16 tensors whose sum it is: [3, rows, D], or by columns [rows, 3, D rounded up to 8].
Tensor split_in_bfloat16(const Tensor& x, bool by_columns) {
  const char* op = "split_bfloat16";
  const auto [rows, D] = check_rows(op, "x", x);
  if (sizes_of(x).size() != 2) fail(op, "x has shape ", shape_text(x), "; expected (rows, D)");
  const int64_t width = by_columns ? (D + 7) / 8 * 8 : D;
  Gpu gpu(x);
  Tensor pieces = gpu.empty(by_columns ? Sizes{rows, 3, width} : Sizes{3, rows, width}, ScalarType::BFloat16);
  gpu.split_bfloat16({x.const_data_ptr<float>(), rows, D, pieces.mutable_data_ptr(), by_columns ? width : rows * width,
                      by_columns ? 3 * width : width, width});
  return pieces;
}

// activation(scale * the sum of pieces [count, rows, D] over their first dimension + bias): [rows, D].
Tensor sum_of_pieces(const Tensor& pieces, double scale, const OptionalTensor& bias, int64_t activation) {
  const char* op = "add_pieces";
  const Sizes sizes = sizes_of(pieces);
  if (pieces.scalar_type() != ScalarType::Float || sizes.size() != 3 || sizes[0] < 1 ||
      (sizes[2] > 1 && pieces.stride(2) != 1))
    fail(op, "pieces has shape ", shape_text(pieces), " and dtype ", dtype_text(pieces.scalar_type()),
         "; expected float32 (count, rows, D), whose rows are contiguous");
  const OptionalTensor added = check_bias(op, bias, sizes[2]);
  Gpu gpu(pieces);
  Tensor out = gpu.empty({sizes[1], sizes[2]}, ScalarType::Float);
  gpu.add_pieces({pieces.const_data_ptr<float>(), sizes[0], pieces.stride(0), pieces.stride(1), sizes[1], sizes[2],
                  static_cast<float>(scale), floats_or_null(added), check_activation(op, activation),
                  out.mutable_data_ptr<float>()});
  return out;
}

// beta KL - log p(x|z) on average, the mean KL, and loss + ELBO: [3].
Tensor elbo_terms(const Tensor& log_prob, const Tensor& kl, const OptionalTensor& beta, double beta_scale) {
  const char* op = "elbo_terms";
  for (const Tensor* t : {&log_prob, &kl})
    if (t->scalar_type() != ScalarType::Float || !t->is_contiguous())
      fail(op, "log_prob or kl has dtype ", dtype_text(t->scalar_type()), "; expected contiguous float32");
  check_beta(op, beta, kl);
  Gpu gpu(kl);
  Tensor terms = gpu.empty({3}, ScalarType::Float);
  gpu.terms({log_prob.const_data_ptr<float>(), kl.const_data_ptr<float>(), log_prob.numel(), kl.numel(),
             static_cast<float>(beta_scale), floats_or_null(beta), terms.mutable_data_ptr<float>()});
  return terms;
}

}  // namespace
}  // namespace aevb::cuda

#ifdef AEVB_EMULATE
STABLE_TORCH_LIBRARY_IMPL(aevb_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(aevb, CUDA, m) {
#endif
  AEVB_REGISTER_LAYERS(m, aevb::cuda::Gpu);
  m.impl("split_bfloat16", TORCH_BOX(&aevb::cuda::split_in_bfloat16));
  m.impl("add_pieces", TORCH_BOX(&aevb::cuda::sum_of_pieces));
  m.impl("elbo_terms", TORCH_BOX(&aevb::cuda::elbo_terms));
}

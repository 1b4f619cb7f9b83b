// SPDX-License-Identifier: Apache-2.0
// A layer's ops for a GPU: the ops that a CPU has too, and the ops around a product in pieces.
#include "../layer_ops.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "gpu.h"

namespace aevb::cuda {
namespace {

// The bfloat16 pieces of x [rows, D], float32 or bytes: h, m and l in `pieces` stand for high, middle and low. By
// columns the result is [rows, pieces, D], and by rows [pieces, rows, D]. Zeros fill D, and by rows also the rows,
// up to a multiple of 8.
Tensor split_in_bfloat16(const Tensor& x, std::string pieces, bool by_rows) {
  const char* op = "split_bfloat16";
  const ScalarType dtype = x.scalar_type();
  const bool bytes = dtype == ScalarType::Bool || dtype == ScalarType::Byte;
  const Sizes sizes = sizes_of(x);
  if ((dtype != ScalarType::Float && !bytes) || sizes.size() != 2)
    fail(op, "x has shape ", shape_text(x), " and dtype ", dtype_text(dtype), "; expected float32 or bytes, (rows, D)");
  const std::string names = "hml";
  uint32_t order = 0;
  for (size_t p = 0; p < pieces.size(); ++p) {
    const size_t which = names.find(pieces[p]);
    if (which == std::string::npos || pieces.size() > 16) fail(op, "pieces is ", pieces, "; expected letters of hml");
    order |= static_cast<uint32_t>(which) << (2 * p);
  }
  const auto rounded = [](int64_t n) { return (n + 7) / 8 * 8; };
  const int64_t count = static_cast<int64_t>(pieces.size()), rows = sizes[0], D = sizes[1], width = rounded(D);
  const int64_t height = by_rows ? rounded(rows) : rows;
  Gpu gpu(x);
  const Matrix from = matrix(x, D);
  Tensor to = gpu.empty(by_rows ? Sizes{count, height, width} : Sizes{rows, count, width}, ScalarType::BFloat16);
  gpu.split_bfloat16({from.rows, rows, D, order, static_cast<int>(count), to.mutable_data_ptr(),
                      by_rows ? height * width : width, by_rows ? width : count * width, height, width});
  return to;
}

// activation(scale * the sum of pieces [count, rows, D] over the first dimension + bias): [rows, D].
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

// [3]: the loss, which is the mean of beta KL minus the mean log p(x|z); the mean KL; loss + ELBO.
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

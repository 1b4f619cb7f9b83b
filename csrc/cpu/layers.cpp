// SPDX-License-Identifier: Apache-2.0
// A fully connected layer's ops on a CPU, without its dense matrix product, which is torch's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../layer_ops.h"
#include "../tensors.h"
#include "columns.h"
#include "isa.h"
#include "results.h"

namespace aevb::cpu {
namespace {

// Memory from the cache of buffers, for the life of this object.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(acquire_buffer(static_cast<size_t>(bytes))) {}
  ~Scratch() { release_buffer(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

// ---- bias and activation --------------------------------------------------------------------------------------------

class Cpu {
 public:
  explicit Cpu(const Tensor&) {}

  Tensor empty(const Sizes& sizes, ScalarType dtype) { return empty_result(sizes, dtype); }

  void activation(const ActivationArgs& a) {
    torch::stable::parallel_for(0, a.rows, grain_of(a.D),
                                [&](int64_t begin, int64_t end) { kernels().activation(a, begin, end); });
  }

  void activation_backward(ActivationArgs a) { cpu::activation_backward(a); }
};

// ---- sparse products ------------------------------------------------------------------------------------------------

SparseArgs sparse_args(const char* op, const Tensor& x, const Matrix& rows, std::optional<double> x_scale, int64_t D,
                       int64_t H) {
  SparseArgs a{};
  a.x = rows.rows;
  a.x_scale = static_cast<float>(x_scale.value_or(1.0));
  a.bits = x.scalar_type() == ScalarType::Bool && a.x_scale == 1.0f;
  a.D = D;
  a.B = D ? x.numel() / D : 0;
  a.H = H;
  if (a.B * D >= int64_t{1} << 40) fail(op, "x has ", x.numel(), " elements; expected fewer than 2^40");
  if (D >= int64_t{1} << 31) fail(op, "x has ", D, " columns; expected fewer than 2^31");
  return a;
}

int64_t tiles_of(int64_t H) { return (H + kernels().sparse_columns - 1) / kernels().sparse_columns; }

// Memory for the lists of the nonzero elements of x.
class Lists {
 public:
  Lists(const SparseArgs& a, int64_t starts) : memory_(4 * starts + a.B * a.D * (a.bits ? 1 : 2) + 1) {
    found.start = static_cast<int32_t*>(memory_.data());
    found.at = reinterpret_cast<uint8_t*>(found.start + starts);
    found.value = a.bits ? nullptr : found.at + a.B * a.D;
  }
  SparseLists found;

 private:
  Scratch memory_;
};

// Shares `units` units of work between threads. A unit covers `elements` elements of x: it reads so many bytes, or adds
// a tenth as many vectors.
template <class Work>
void parallel(int64_t units, int64_t elements, const Work& work) {
  if (units > 0) torch::stable::parallel_for(0, units, grain_of(elements), work);
}

int64_t check_pixels(const char* op, const Tensor& x, std::optional<double> x_scale) {
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Bool && dtype != ScalarType::Byte)
    fail(op, "x has dtype ", dtype_text(dtype), "; expected bool, or uint8 with x_scale");
  if (dtype == ScalarType::Byte && !x_scale) fail(op, "x is uint8 and x_scale is not given");
  const Sizes sizes = sizes_of(x);
  if (sizes.empty()) fail(op, "x has shape (); expected (..., D)");
  return sizes.back();
}

Tensor sparse_linear(const Tensor& x, std::optional<double> x_scale, const Tensor& weight, const OptionalTensor& bias,
                     int64_t activation) {
  const char* op = "sparse_linear";
  const int64_t D = check_pixels(op, x, x_scale);
  const Sizes w = sizes_of(weight);
  if (weight.scalar_type() != ScalarType::Float || w.size() != 2 || w[1] != D)
    fail(op, "weight has shape ", shape_text(weight), " and dtype ", dtype_text(weight.scalar_type()),
         "; expected float32 (H, ", D, ")");
  const OptionalTensor added = check_bias(op, bias, w[0]);
  const Tensor rows_of_weight = dense(weight);
  const Matrix rows = matrix(x, D);
  Sizes sizes = sizes_of(x);
  sizes.back() = w[0];
  Tensor out = empty_result(sizes, ScalarType::Float);
  SparseArgs a = sparse_args(op, x, rows, x_scale, D, w[0]);
  a.B = w[0] ? out.numel() / w[0] : 0;
  a.weight = rows_of_weight.const_data_ptr<float>();
  a.bias = floats_or_null(added);
  a.activation = check_activation(op, activation);
  a.out = out.mutable_data_ptr<float>();
  const Kernels& k = kernels();
  const int64_t blocks = (D + k.sparse_block - 1) / k.sparse_block;
  const Lists lists(a, a.B * (blocks + 1));
  parallel(a.B, D, [&](int64_t begin, int64_t end) { k.sparse_row_lists(a, lists.found, begin, end); });
  const int64_t groups = (a.B + kSparseRows - 1) / kSparseRows;
  parallel(groups * tiles_of(w[0]), std::min(a.B, kSparseRows) * D, [&](int64_t begin, int64_t end) {
    const Scratch scratch(k.sparse_linear_scratch(a));
    k.sparse_linear(a, lists.found, scratch.data(), begin, end);
  });
  return out;
}

Tensor sparse_linear_weight_grad(const Tensor& x, std::optional<double> x_scale, const Tensor& grad) {
  const char* op = "sparse_linear_weight_grad";
  const int64_t D = check_pixels(op, x, x_scale);
  const Tensor g = dense(grad);
  const auto [count, H] = check_rows(op, "grad", g);
  if (Sizes x_rows = sizes_of(x), g_rows = sizes_of(g);
      !std::equal(x_rows.begin(), x_rows.end() - 1, g_rows.begin(), g_rows.end() - 1))
    fail(op, "x has shape ", shape_text(x), " and grad ", shape_text(grad), "; expected (..., D) and (..., H)");
  const Matrix rows = matrix(x, D);
  Tensor grad_weight = empty_result({H, D}, ScalarType::Float);
  SparseArgs a = sparse_args(op, x, rows, x_scale, D, H);
  a.B = count;
  a.grad = g.const_data_ptr<float>();
  a.grad_weight = grad_weight.mutable_data_ptr<float>();
  const Kernels& k = kernels();
  const int64_t blocks = (a.B + k.sparse_block - 1) / k.sparse_block, ranges = sparse_ranges(D);
  const int64_t width = (D + ranges - 1) / ranges;
  const Lists lists(a, blocks * ranges * (width + 1));
  parallel(blocks * ranges, k.sparse_block * width,
           [&](int64_t begin, int64_t end) { k.sparse_column_lists(a, lists.found, begin, end); });
  parallel(tiles_of(H) * ranges, a.B * width, [&](int64_t begin, int64_t end) {
    const Scratch scratch(k.sparse_gradient_scratch(a));
    k.sparse_gradient(a, lists.found, scratch.data(), begin, end);
  });
  return grad_weight;
}

double density(const Tensor& x) {
  const Sizes sizes = sizes_of(x);
  check_pixels("density", x, 1.0);
  const int64_t D = sizes.back(), rows = D ? x.numel() / D : 0;
  const Matrix m = matrix(x, std::max<int64_t>(D, 1));
  constexpr int64_t kSome = 16;
  const int64_t step = std::max<int64_t>(1, rows / kSome), some = rows ? (rows + step - 1) / step : 0;
  int64_t count = 0;
  for (int64_t r = 0; r < rows; r += step) {
    const uint8_t* row = static_cast<const uint8_t*>(m.rows.data) + r * m.rows.stride;
    for (int64_t d = 0; d < D; ++d) count += row[d] != 0;
  }
  return some ? static_cast<double>(count) / static_cast<double>(some * D) : 0.0;
}

}  // namespace
}  // namespace aevb::cpu

STABLE_TORCH_LIBRARY_IMPL(aevb, CPU, m) {
  AEVB_REGISTER_LAYERS(m, aevb::cpu::Cpu);
  m.impl("sparse_linear", TORCH_BOX(&aevb::cpu::sparse_linear));
  m.impl("sparse_linear_weight_grad", TORCH_BOX(&aevb::cpu::sparse_linear_weight_grad));
  m.impl("density", TORCH_BOX(&aevb::cpu::density));
}

// SPDX-License-Identifier: Apache-2.0
// Every op of torch.ops.aevb, and the Python module aevb._C: the table of contents of csrc/.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "formulas/philox.h"

#ifndef AEVB_CUDA_DECISION
#define AEVB_CUDA_DECISION "unknown"
#endif

// `x` is differentiable, for graphs (torch.compile, torch.export); `x_forward` is the same kernel bare, for the
// autograd.Function of eager mode; `x_backward` gives the gradients. aevb/ops.py puts them together.
STABLE_TORCH_LIBRARY(aevb, m) {
#define AEVB_DEF(name, arguments_and_results) \
  m.def(name arguments_and_results);          \
  m.def(name "_forward" arguments_and_results)

  // z = mu + exp(logvar / 2) eps, eps = normal(seed, element), and KL(N(mu, exp(logvar)) || N(0, I)).
  AEVB_DEF("sample_gaussian", "(Tensor mu, Tensor logvar, Tensor seed, int? num_samples) -> (Tensor z, Tensor kl)");
  m.def(
      "sample_gaussian_backward(Tensor mu, Tensor logvar, Tensor seed, int? num_samples, Tensor? grad_z,"
      " Tensor? grad_kl) -> (Tensor grad_mu, Tensor grad_logvar)");

  AEVB_DEF("gaussian_kl", "(Tensor mu, Tensor logvar) -> Tensor");
  m.def("gaussian_kl_backward(Tensor mu, Tensor logvar, Tensor grad) -> (Tensor grad_mu, Tensor grad_logvar)");

  // log p(x | z), one value a row, from the decoder's logits, or from probabilities.
  AEVB_DEF("bernoulli_log_prob", "(Tensor output, Tensor x, float? x_scale, bool from_probs) -> Tensor");
  m.def(
      "bernoulli_log_prob_backward(Tensor output, Tensor x, float? x_scale, bool from_probs, Tensor grad)"
      " -> Tensor");

  // beta * KL - mean over samples of log p(x | z), for the KL of (mu, logvar), or for a KL that is there already.
  // reduction: 0 none, 1 mean, 2 sum. beta is a number times an optional 0-d tensor.
  AEVB_DEF("negative_elbo",
           "(Tensor recon, Tensor x, Tensor mu, Tensor logvar, Tensor? beta, float beta_scale, int reduction,"
           " bool from_probs, float? x_scale) -> Tensor");
  m.def(
      "negative_elbo_backward(Tensor recon, Tensor x, Tensor mu, Tensor logvar, Tensor? beta, float beta_scale,"
      " int reduction, bool from_probs, float? x_scale, Tensor grad)"
      " -> (Tensor grad_recon, Tensor grad_mu, Tensor grad_logvar)");
  AEVB_DEF("negative_elbo_with_kl",
           "(Tensor recon, Tensor x, Tensor kl, Tensor? beta, float beta_scale, int reduction, bool from_probs,"
           " float? x_scale) -> Tensor");
  m.def(
      "negative_elbo_with_kl_backward(Tensor recon, Tensor x, Tensor kl, Tensor? beta, float beta_scale, int reduction,"
      " bool from_probs, float? x_scale, Tensor grad) -> (Tensor grad_recon, Tensor grad_kl)");

  // The noise itself: element i of a seed's block is output i % 4 of Philox counter i / 4. seed is a prefix of size.
  m.def("normal(Tensor seed, int[] size) -> Tensor");
  m.def("mix_seed(Tensor seed, Tensor index) -> Tensor");
#undef AEVB_DEF
}

namespace py = pybind11;
using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

namespace {

py::dict build_info() {
  py::dict info;
  info["cuda"] = AEVB_CUDA_DECISION;
  info["compiler"] = __VERSION__;
  info["isas"] = aevb::cpu::available_isas();
  info["isa"] = aevb::cpu::kernels().name;
  return info;
}

FloatArray elementary(const std::string& name, const FloatArray& x) {
  for (size_t f = 0; f < std::size(aevb::cpu::kElementaryNames); ++f) {
    if (name != aevb::cpu::kElementaryNames[f]) continue;
    FloatArray y(x.size());
    aevb::cpu::kernels().elementary(static_cast<int>(f), x.data(), y.mutable_data(), x.size());
    return y;
  }
  throw py::value_error("no elementary function is called " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "aevb's kernels: how they were built, and their parts for the tests. The ops are in torch.ops.aevb.";
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return std::string(aevb::cpu::kernels().name); });
  m.def("set_cpu_isa", [](const std::string& name) { aevb::cpu::set_isa(name.c_str()); });
  m.def("release_memory", &aevb::cpu::release_memory, "Frees cached result buffers; gives their bytes.");

  m.def("elementary", &elementary, "One elementary function over an array, by the kernels in use.");
  m.def("philox", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const aevb::Philox w = aevb::philox({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return std::array<uint32_t, 4>{w.word[0], w.word[1], w.word[2], w.word[3]};
  });
  m.def("row_sum", [](const FloatArray& x) { return aevb::cpu::kernels().sum(x.data(), x.size(), 1); });
}

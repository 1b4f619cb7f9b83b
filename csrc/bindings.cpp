// SPDX-License-Identifier: Apache-2.0
// torch.ops.aevb and the Python module aevb._C.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "formulas/philox.h"
#include "schemas.h"

#ifndef AEVB_CUDA_DECISION
#define AEVB_CUDA_DECISION "unknown"
#endif

STABLE_TORCH_LIBRARY(aevb, m) { aevb::define_ops(m); }

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

py::dict likelihoods() {
  py::dict params;
#define AEVB_ADD(name, Struct, ...) params[#name] = py::make_tuple(__VA_ARGS__);
  AEVB_LIKELIHOODS(AEVB_ADD)
#undef AEVB_ADD
  return params;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "aevb's kernels: how they were built, and their parts for the tests. The ops are in torch.ops.aevb.";
  m.def("build_info", &build_info);
  m.def("likelihoods", &likelihoods, "The names of each likelihood's parameters, by its name.");
  m.def("cpu_isa", [] { return std::string(aevb::cpu::kernels().name); });
  m.def("set_cpu_isa", [](const std::string& name) { aevb::cpu::set_isa(name.c_str()); });
  m.def("release_memory", &aevb::cpu::release_memory, "Frees cached result buffers; gives their bytes.");

  m.def("philox", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const aevb::Philox w =
        aevb::philox({{counter[0], counter[1], counter[2], counter[3]}}, aevb::philox_keys(key[0], key[1]));
    return std::array<uint32_t, 4>{w.word[0], w.word[1], w.word[2], w.word[3]};
  });
  m.def("row_sum", [](const FloatArray& x) { return aevb::cpu::kernels().sum(x.data(), x.size(), 1); });
}

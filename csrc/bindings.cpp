// SPDX-License-Identifier: Apache-2.0
// torch.ops.aevb and the Python module aevb._C, by Python's own C interface: a binding library's headers would cost the
// compiler more than the kernels of an instruction set.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "formulas/philox.h"
#include "schemas.h"

#ifndef AEVB_CUDA_DECISION
#define AEVB_CUDA_DECISION "unknown"
#endif

STABLE_TORCH_LIBRARY(aevb, m) { aevb::define_ops(m); }

namespace {

// What body() gives; an exception of ours becomes a RuntimeError.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

PyObject* build_info(PyObject*, PyObject*) {
  return guarded([] {
    return Py_BuildValue("{ssssssss}", "cuda", AEVB_CUDA_DECISION, "compiler", __VERSION__, "isas",
                         aevb::cpu::available_isas(), "isa", aevb::cpu::kernels().name);
  });
}

PyObject* cpu_isa(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(aevb::cpu::kernels().name); });
}

PyObject* set_cpu_isa(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8(name);
  if (!text) return nullptr;
  return guarded([&]() -> PyObject* {
    aevb::cpu::set_isa(text);
    Py_RETURN_NONE;
  });
}

PyObject* release_memory(PyObject*, PyObject*) { return PyLong_FromSize_t(aevb::cpu::release_memory()); }

// The `count` words that `list` holds.
bool read_words(PyObject* list, Py_ssize_t count, uint32_t* words) {
  PyObject* items = PySequence_Fast(list, "expected a list of ints");
  if (!items) return false;
  bool read = PySequence_Fast_GET_SIZE(items) == count;
  if (!read) PyErr_Format(PyExc_TypeError, "expected a list of %zd ints", count);
  for (Py_ssize_t i = 0; read && i < count; ++i) {
    const unsigned long long word = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(items, i));
    if (!PyErr_Occurred() && word > 0xffffffffu) PyErr_SetString(PyExc_TypeError, "expected ints of 32 bits");
    read = !PyErr_Occurred();
    words[i] = static_cast<uint32_t>(word);
  }
  Py_DECREF(items);
  return read;
}

PyObject* philox(PyObject*, PyObject* arguments) {
  PyObject *counter, *key;
  uint32_t c[4], k[2];
  if (!PyArg_ParseTuple(arguments, "OO:philox", &counter, &key)) return nullptr;
  if (!read_words(counter, 4, c) || !read_words(key, 2, k)) return nullptr;
  const aevb::Philox w = aevb::philox({{c[0], c[1], c[2], c[3]}}, aevb::philox_keys(k[0], k[1]));
  return Py_BuildValue("[IIII]", w.word[0], w.word[1], w.word[2], w.word[3]);
}

PyObject* row_sum(PyObject*, PyObject* x) {
  Py_buffer floats;
  if (PyObject_GetBuffer(x, &floats, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)) return nullptr;
  PyObject* sum = nullptr;
  if (floats.format && floats.format[0] == 'f' && floats.format[1] == 0)
    sum = guarded([&] {
      const auto* data = static_cast<const float*>(floats.buf);
      return PyFloat_FromDouble(
          static_cast<double>(aevb::cpu::kernels().sum(data, floats.len / static_cast<Py_ssize_t>(sizeof(float)), 1)));
    });
  else
    PyErr_SetString(PyExc_TypeError, "row_sum: expected a contiguous array of float32");
  PyBuffer_Release(&floats);
  return sum;
}

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, "How the kernels were built."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set in use."},
    {"set_cpu_isa", set_cpu_isa, METH_O, "Sets it, for tests."},
    {"release_memory", release_memory, METH_NOARGS, "Frees cached result buffers; gives their bytes."},
    {"philox", philox, METH_VARARGS, "philox(counter, key): four words."},
    {"row_sum", row_sum, METH_O, "The sum of a float32 array in the order of csrc/README.md."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "aevb's kernels: how they were built, and their parts for the tests. The ops are in torch.ops.aevb.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }

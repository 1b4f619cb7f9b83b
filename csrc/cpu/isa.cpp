// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace aevb::cpu {
namespace {

// The tables that this machine can run, the best last.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables = {&plain_kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) tables.push_back(&avx2_kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    tables.push_back(&avx512_kernels);
#endif
  return tables;
}

const Kernels* find(const char* name) {
  for (const Kernels* table : available())
    if (std::strcmp(table->name, name) == 0) return table;
  throw std::runtime_error("aevb: AEVB_ISA is \"" + std::string(name) + "\"; this build and machine have " +
                           available_isas());
}

const Kernels*& current() {
  static const Kernels* table = [] {
    const char* name = std::getenv("AEVB_ISA");
    return name && *name ? find(name) : available().back();
  }();
  return table;
}

}  // namespace

const Kernels& kernels() { return *current(); }

void set_isa(const char* name) { current() = find(name); }

const char* available_isas() {
  static const std::string names = [] {
    std::string text;
    for (const Kernels* table : available()) text += (text.empty() ? "" : ", ") + std::string(table->name);
    return text;
  }();
  return names.c_str();
}

}  // namespace aevb::cpu

// SPDX-License-Identifier: Apache-2.0
// The CPU kernels, compiled once for every instruction set; one table of them is picked at run time.
#pragma once
#include <cstdint>

namespace aevb::cpu {

enum class Dtype { float32, bfloat16, float16, uint8 };  // bool is read as uint8

// A matrix [rows, D] as the kernels read it: unit stride within a row.
struct Rows {
  const void* data = nullptr;  // null: the argument is absent
  int64_t stride = 0;          // elements from one row to the next
  Dtype dtype = Dtype::float32;
};

// z = mu + exp(logvar / 2) * normal(seed, element) and KL, and their gradients.
struct GaussianArgs {
  Rows mu, logvar;              // [B, D]
  int64_t B, D, L;              // L samples a row
  const int64_t* seeds;         // [L * B * D / seed_block]
  int64_t seed_block;           // elements of z that one seed numbers from 0
  void* z;                      // [L, B, D], mu's dtype; null: KL only
  float* kl;                    // [B, chunks(D)]; null: not wanted
  Rows grad_z;                  // [L * B, D], mu's dtype, or absent
  const float* grad_kl;         // [B], or null
  float grad_kl_scale;          // multiplies grad_kl
  bool grad_kl_is_scalar;       // grad_kl has one element for all rows
  void *grad_mu, *grad_logvar;  // [B, D], mu's dtype
};

enum class Likelihood { bernoulli_logits, bernoulli_probs };

// log p(x|z) for rows of decoder outputs, and its gradient. Row r of `output` goes with row r % x_rows of x.
struct LikelihoodArgs {
  Likelihood likelihood;
  Rows output;    // [R, D]
  Rows x;         // [x_rows, D]
  float x_scale;  // x is multiplied by it
  int64_t R, x_rows, D;
  float* log_prob;    // [R, chunks(D)]
  const float* grad;  // [x_rows] or [R] (row r takes r % grad_rows), upstream
  int64_t grad_rows;
  float grad_scale;   // multiplies grad
  void* grad_output;  // [R, D], output's dtype
};

// Rows longer than a chunk are shared between threads: a kernel's work is numbered row * chunks(D) + chunk.
constexpr int64_t kChunk = 32768;
inline int64_t chunks(int64_t D) { return D > kChunk ? (D + kChunk - 1) / kChunk : 1; }

// Functions that the tests run over all of float; the names are those that Python sees.
enum class Elementary { exp, exp_minus, expm1, expm1_minus_x, log, log1p, log_one_minus, rcp, sqrt, bfloat16, float16 };
constexpr const char* kElementaryNames[] = {"exp",           "exp_minus", "expm1", "expm1_minus_x", "log",    "log1p",
                                            "log_one_minus", "rcp",       "sqrt",  "bfloat16",      "float16"};

struct Kernels {
  const char* name;
  void (*gaussian)(const GaussianArgs&, int64_t begin, int64_t end);
  void (*gaussian_backward)(const GaussianArgs&, int64_t begin, int64_t end);
  void (*likelihood)(const LikelihoodArgs&, int64_t begin, int64_t end);
  void (*likelihood_backward)(const LikelihoodArgs&, int64_t begin, int64_t end);
  float (*sum)(const float* x, int64_t n, int64_t stride);  // in the order of csrc/README.md
  float (*sum_groups)(const float* x, int64_t n);           // joins the sums of n groups or chunks
  void (*normals)(uint64_t seed, int64_t first, int64_t n, float* out);
  void (*elementary)(int function, const float* x, float* y, int64_t n);  // for the tests
};

extern const Kernels plain_kernels, avx2_kernels, avx512_kernels;

// The best of those that this machine runs, or the one AEVB_ISA names; set_isa changes it (for tests).
const Kernels& kernels();
void set_isa(const char* name);
const char* available_isas();  // comma-separated, best last

}  // namespace aevb::cpu

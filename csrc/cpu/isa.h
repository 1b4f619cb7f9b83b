// SPDX-License-Identifier: Apache-2.0
// The CPU kernels, compiled once for every instruction set; one table of them is picked at run time.
#pragma once
#include "../args.h"

namespace aevb::cpu {

// Rows longer than a chunk are shared between threads: a kernel's work is numbered row * chunks(D) + chunk.
constexpr int64_t kChunk = 32768;
inline int64_t chunks(int64_t D) { return D > kChunk ? (D + kChunk - 1) / kChunk : 1; }

// Rows that mostly hold zeros.
constexpr int64_t kSparseRows = 512;  // of x and of the result that are gone through together, at most
constexpr int64_t kSparseSum = 512;   // rows whose gradients are summed one after the other, before the next are
inline int64_t sparse_ranges(int64_t D) { return D > 512 ? (D + 511) / 512 : 1; }  // that columns of x are cut into

// Where x is not 0: by rows or by columns, as the kernels that make and read the lists say.
struct SparseLists {
  int32_t* start;
  uint8_t* at;     // [B, D] is room enough
  uint8_t* value;  // as many; null where all are 1
};

struct Kernels {
  const char* name;
  // Where rows have several chunks, kl is [B, chunks(D)], each twice the KL, and log_prob [R, chunks(D)].
  void (*gaussian)(const GaussianArgs&, int64_t begin, int64_t end);
  void (*gaussian_backward)(const GaussianArgs&, int64_t begin, int64_t end);
  // As kl: where rows have several chunks, log_ratio is [L, B, chunks(D)], each twice the ratio.
  void (*gaussian_log_ratio)(const GaussianArgs&, int64_t begin, int64_t end);
  void (*gaussian_log_ratio_backward)(const GaussianArgs&, int64_t begin, int64_t end);
  // log_prob, grad_output, or both: those that are not null.
  void (*likelihood)(const LikelihoodArgs&, int64_t begin, int64_t end);
  void (*binarize)(const BinarizeArgs&, int64_t begin, int64_t end);               // rows
  void (*activation)(const ActivationArgs&, int64_t begin, int64_t end);           // rows
  void (*activation_backward)(const ActivationArgs&, int64_t begin, int64_t end);  // blocks of kActivationBlock rows
  // Rows that mostly hold zeros. Matrices are cut into tiles of sparse_block rows and sparse_columns columns.
  int64_t sparse_block, sparse_columns;
  int64_t (*sparse_linear_scratch)(const SparseArgs&);                                                        // bytes
  int64_t (*sparse_gradient_scratch)(const SparseArgs&);                                                      // bytes
  void (*sparse_row_lists)(const SparseArgs&, const SparseLists&, int64_t begin, int64_t end);                // rows
  void (*sparse_linear)(const SparseArgs&, const SparseLists&, void* scratch, int64_t begin, int64_t end);    // tiles
  void (*sparse_column_lists)(const SparseArgs&, const SparseLists&, int64_t begin, int64_t end);             // parts
  void (*sparse_gradient)(const SparseArgs&, const SparseLists&, void* scratch, int64_t begin, int64_t end);  // tiles
  float (*sum)(const float* x, int64_t n, int64_t stride);  // in the order of csrc/README.md
  float (*sum_groups)(const float* x, int64_t n);           // joins the sums of n groups or chunks
  void (*normals)(uint64_t seed, int64_t first, int64_t n, float* out);
  void (*elementary)(const ElementaryArgs&);  // for the tests
};

extern const Kernels plain_kernels, avx2_kernels, avx512_kernels;

// The best of those that this machine runs, or the one AEVB_ISA names; set_isa changes it (for tests).
const Kernels& kernels();
void set_isa(const char* name);
const char* available_isas();  // comma-separated, best last

}  // namespace aevb::cpu

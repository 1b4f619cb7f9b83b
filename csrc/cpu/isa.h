// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels. It is compiled once for each instruction set, and one table is picked at run time.
#pragma once
#include "../args.h"

namespace aevb::cpu {

// Elements of a chunk. Rows longer than a chunk are shared between threads: unit row * chunks(D) + chunk of a kernel's
// work is one chunk of one row.
constexpr int64_t kChunk = 32768;
inline int64_t chunks(int64_t D) { return D > kChunk ? (D + kChunk - 1) / kChunk : 1; }

// Sparse products: x [B, D] mostly holds zeros.
constexpr int64_t kSparseRows = 512;  // most rows of x and of the result in one unit of work
constexpr int64_t kSparseSum = 512;   // rows of a group: a weight's gradient adds a group's rows in order, then groups
// Ranges that the D columns of x are cut into.
inline int64_t sparse_ranges(int64_t D) { return D > 512 ? (D + 511) / 512 : 1; }

// Positions and values of the nonzero elements of x, by rows (sparse_row_lists) or by columns (sparse_column_lists).
// The layout stands beside those functions.
struct SparseLists {
  int32_t* start;  // [rows, blocks + 1] or [parts, columns + 1]: where each list begins in `at` and `value`
  uint8_t* at;     // room for [B, D]: positions within a block of columns or rows
  uint8_t* value;  // room for [B, D]; null: every value is 1
};

// One kernel does the units [begin, end) of its work, numbered row * chunks(D) + chunk unless a comment says otherwise.
struct Kernels {
  const char* name;
  // kl [B, chunks(D)]: the KL of each row, or, where rows have several chunks, twice the KL of each chunk.
  void (*gaussian)(const GaussianArgs&, int64_t begin, int64_t end);
  void (*gaussian_backward)(const GaussianArgs&, int64_t begin, int64_t end);
  // log_ratio [L, B, chunks(D)]: the log ratio of each sample, or, where rows have several chunks, twice the log
  // ratio of each chunk.
  void (*gaussian_log_ratio)(const GaussianArgs&, int64_t begin, int64_t end);
  void (*gaussian_log_ratio_backward)(const GaussianArgs&, int64_t begin, int64_t end);
  // log_prob [R, chunks(D)]: the log-likelihood of each row, or of each chunk. A null output pointer is not computed.
  void (*likelihood)(const LikelihoodArgs&, int64_t begin, int64_t end);
  void (*binarize)(const BinarizeArgs&, int64_t begin, int64_t end);               // rows
  void (*activation)(const ActivationArgs&, int64_t begin, int64_t end);           // rows
  void (*activation_backward)(const ActivationArgs&, int64_t begin, int64_t end);  // blocks of kActivationBlock rows
  // Sparse products: matrices are cut into tiles of sparse_block rows and sparse_columns columns.
  int64_t sparse_block, sparse_columns;
  int64_t (*sparse_linear_scratch)(const SparseArgs&);                                                        // bytes
  int64_t (*sparse_gradient_scratch)(const SparseArgs&);                                                      // bytes
  void (*sparse_row_lists)(const SparseArgs&, const SparseLists&, int64_t begin, int64_t end);                // rows
  void (*sparse_linear)(const SparseArgs&, const SparseLists&, void* scratch, int64_t begin, int64_t end);    // tiles
  void (*sparse_column_lists)(const SparseArgs&, const SparseLists&, int64_t begin, int64_t end);             // parts
  void (*sparse_gradient)(const SparseArgs&, const SparseLists&, void* scratch, int64_t begin, int64_t end);  // tiles
  // The sum of n elements, x[0], x[stride], ..., in the order of csrc/README.md.
  float (*sum)(const float* x, int64_t n, int64_t stride);
  // The sum of a row, from the sums x [n] of its groups or chunks.
  float (*sum_groups)(const float* x, int64_t n);
  // out [n] = the standard normals of elements [first, first + n) of the seed's block.
  void (*normals)(uint64_t seed, int64_t first, int64_t n, float* out);
  void (*elementary)(const ElementaryArgs&);  // for the tests
};

extern const Kernels plain_kernels, avx2_kernels, avx512_kernels;

// The table in use: the best that this machine runs, or the table that AEVB_ISA names. Tests change it by set_isa.
const Kernels& kernels();
void set_isa(const char* name);
const char* available_isas();  // comma-separated, best last

}  // namespace aevb::cpu

// SPDX-License-Identifier: Apache-2.0
// Matrix products with rows that mostly hold zeros, as binarized images do: of an image with 100 pixels of 784 set, the
// first layer is the sum of 100 rows of its weight, an eighth of a dense product's work.
//
// Tiles of some 64 rows and columns are copied to where the first-level cache holds them whole, and rows of the tile
// are added up in registers. Every sum is taken in the order of its terms, whatever the tiles.
#pragma once
#include "activation_rows.h"

namespace aevb::cpu {
namespace {

#if defined(AEVB_AVX512)
constexpr int kVectorFloats = 16;
#else
constexpr int kVectorFloats = 8;
#endif
typedef float Vector __attribute__((vector_size(kVectorFloats * sizeof(float))));
typedef float LooseVector __attribute__((vector_size(kVectorFloats * sizeof(float)), aligned(sizeof(float))));

constexpr int kVectors = 8;                               // added up in as many registers
constexpr int kSparseColumns = kVectors * kVectorFloats;  // of a tile
constexpr int kSparseBlock = 8192 / kSparseColumns;       // its rows: 32 KiB in all

// Eight floats, which every instruction set can shuffle.
typedef float Eight __attribute__((vector_size(32)));
typedef float LooseEight __attribute__((vector_size(32), aligned(4)));
typedef int32_t EightIndices __attribute__((vector_size(32)));

// to[j * to_stride + i] = from[i * stride + j] for i, j < 8.
AEVB_FORMULA void transpose_8x8(const float* from, int64_t stride, float* to, int64_t to_stride) {
  Eight a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const LooseEight*>(from + i * stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shuffle(a[i], a[i + 1], EightIndices{0, 8, 1, 9, 4, 12, 5, 13});
    b[i + 1] = __builtin_shuffle(a[i], a[i + 1], EightIndices{2, 10, 3, 11, 6, 14, 7, 15});
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = __builtin_shuffle(b[i + k], b[i + k + 2], EightIndices{0, 1, 8, 9, 4, 5, 12, 13});
      a[i + 2 * k + 1] = __builtin_shuffle(b[i + k], b[i + k + 2], EightIndices{2, 3, 10, 11, 6, 7, 14, 15});
    }
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = __builtin_shuffle(a[i], a[i + 4], EightIndices{0, 1, 2, 3, 8, 9, 10, 11});
    b[i + 4] = __builtin_shuffle(a[i], a[i + 4], EightIndices{4, 5, 6, 7, 12, 13, 14, 15});
  }
  for (int j = 0; j < 8; ++j) *reinterpret_cast<LooseEight*>(to + j * to_stride) = b[j];
}

// to[j * to_stride + i] = from[i * stride + j] for i < rows, j < columns.
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) transpose_8x8(from + i * stride + j, stride, to + j * to_stride + i, to_stride);
    for (; j < columns; ++j)
      for (int k = 0; k < 8; ++k) to[j * to_stride + i + k] = from[(i + k) * stride + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * stride + j];
}

// Columns [0, columns) of n rows, as rows of kSparseColumns; the rest is 0.
inline void pack(const float* from, int64_t stride, int64_t n, int columns, float* tile) {
  for (int64_t r = 0; r < n; ++r, from += stride, tile += kSparseColumns) {
    int k = 0;
    for (; k + kVectorFloats <= columns; k += kVectorFloats)
      *reinterpret_cast<Vector*>(tile + k) = *reinterpret_cast<const LooseVector*>(from + k);
    for (; k < columns; ++k) tile[k] = from[k];
    for (; k < kSparseColumns; ++k) tile[k] = 0.0f;
  }
}

inline void unpack(const float* tile, int64_t n, int columns, float* to, int64_t stride) {
  for (int64_t r = 0; r < n; ++r, to += stride, tile += kSparseColumns) {
    int k = 0;
    for (; k + kVectorFloats <= columns; k += kVectorFloats)
      *reinterpret_cast<LooseVector*>(to + k) = *reinterpret_cast<const Vector*>(tile + k);
    for (; k < columns; ++k) to[k] = tile[k];
  }
}

// sum += the rows row[0 .. n) of a tile, one after the other, each times x_scale value where there are values.
template <bool kBits>
AEVB_FORMULA void add_rows(const float* tile, const uint8_t* row, const uint8_t* value, float x_scale, int n,
                           float* sum) {
  auto* s = reinterpret_cast<Vector*>(sum);
  Vector s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3], s4 = s[4], s5 = s[5], s6 = s[6], s7 = s[7];
  for (int i = 0; i < n; ++i) {
    const auto* w = reinterpret_cast<const Vector*>(tile + static_cast<int64_t>(row[i]) * kSparseColumns);
    if constexpr (kBits) {
      s0 += w[0], s1 += w[1], s2 += w[2], s3 += w[3], s4 += w[4], s5 += w[5], s6 += w[6], s7 += w[7];
    } else {
      const float v = x_scale * static_cast<float>(static_cast<int32_t>(value[i]));
      s0 += v * w[0], s1 += v * w[1], s2 += v * w[2], s3 += v * w[3];
      s4 += v * w[4], s5 += v * w[5], s6 += v * w[6], s7 += v * w[7];
    }
  }
  s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3, s[4] = s4, s[5] = s5, s[6] = s6, s[7] = s7;
}

// visit(k, x[k]) for every x[k] of x[0 .. n) that is not 0, in order.
template <class Visit>
AEVB_FORMULA void for_nonzero(const uint8_t* x, int64_t n, const Visit& visit) {
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, x + k, 8);  // little-endian: x[k] is the lowest byte
    constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7full;
    uint64_t found = (((bytes & kLow) + kLow) | bytes) & ~kLow;  // the top bit of each byte that is not 0
    for (; found; found &= found - 1) {
      const int64_t at = k + (__builtin_ctzll(found) >> 3);
      visit(at, x[at]);
    }
  }
  for (; k < n; ++k)
    if (x[k]) visit(k, x[k]);
}

AEVB_FORMULA const uint8_t* sparse_row(const SparseArgs& a, int64_t b) {
  return static_cast<const uint8_t*>(a.x.data) + b * a.x.stride;
}

// ---- x @ weight.T ---------------------------------------------------------------------------------------------------

// Bytes of `scratch`.
inline int64_t sparse_linear_scratch(const SparseArgs& a) {
  const int64_t rows = sparse_rows_at_once(a.D), blocks = (a.D + kSparseBlock - 1) / kSparseBlock;
  return (kSparseBlock + 1 + rows) * kSparseColumns * 4 + rows * (blocks + 1) * 4 + 2 * rows * a.D;
}

template <bool kBits>
inline void sparse_linear_rows(const SparseArgs& a, void* scratch, int64_t begin, int64_t end) {
  const int64_t at_once = sparse_rows_at_once(a.D), blocks = (a.D + kSparseBlock - 1) / kSparseBlock;
  float* tile = static_cast<float*>(scratch);                                // [kSparseBlock, kSparseColumns] of weight
  float* bias = tile + kSparseBlock * kSparseColumns;                        // [kSparseColumns]
  float* sum = bias + kSparseColumns;                                        // [at_once, kSparseColumns]
  auto* start = reinterpret_cast<int32_t*>(sum + at_once * kSparseColumns);  // [at_once, blocks + 1]
  auto* column = reinterpret_cast<uint8_t*>(start + at_once * (blocks + 1));  // within the block
  uint8_t* value = column + at_once * a.D;
  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t n = end - first < at_once ? end - first : at_once;
    int32_t count = 0;
    for (int64_t r = 0; r < n; ++r) {
      const uint8_t* x = sparse_row(a, first + r);
      for (int64_t block = 0; block < blocks; ++block) {
        start[r * (blocks + 1) + block] = count;
        const int64_t d = block * kSparseBlock, left = a.D - d;
        for_nonzero(x + d, left < kSparseBlock ? left : kSparseBlock, [&](int64_t k, uint8_t v) {
          column[count] = static_cast<uint8_t>(k);
          if (!kBits) value[count] = v;
          ++count;
        });
      }
      start[r * (blocks + 1) + blocks] = count;
    }
    for (int64_t h = 0; h < a.H; h += kSparseColumns) {
      const int columns = static_cast<int>(a.H - h < kSparseColumns ? a.H - h : kSparseColumns);
      for (int k = 0; k < kSparseColumns; ++k) bias[k] = a.bias && k < columns ? a.bias[h + k] : 0.0f;
      for (int64_t r = 0; r < n; ++r) __builtin_memcpy(sum + r * kSparseColumns, bias, sizeof(float) * kSparseColumns);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t d = block * kSparseBlock, left = a.D - d;
        transpose(a.weight + h * a.D + d, a.D, columns, left < kSparseBlock ? left : kSparseBlock, tile,
                  kSparseColumns);
        for (int64_t r = 0; r < n; ++r) {
          const int32_t* s = start + r * (blocks + 1) + block;
          if (s[1] > s[0])
            add_rows<kBits>(tile, column + s[0], value + s[0], a.x_scale, s[1] - s[0], sum + r * kSparseColumns);
        }
      }
      activate(a.activation, sum, nullptr, n * kSparseColumns);
      unpack(sum, n, columns, a.out + first * a.H + h, a.H);
    }
  }
}

inline void sparse_linear_rows(const SparseArgs& a, void* scratch, int64_t begin, int64_t end) {
  if (a.bits) return sparse_linear_rows<true>(a, scratch, begin, end);
  sparse_linear_rows<false>(a, scratch, begin, end);
}

// ---- x^T @ grad -----------------------------------------------------------------------------------------------------

// Where x is not 0, column by column, for the blocks [begin, end) of kSparseBlock rows.
inline void sparse_lists_blocks(const SparseArgs& a, const SparseLists& lists, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kSparseBlock, n = a.B - first < kSparseBlock ? a.B - first : kSparseBlock;
    int32_t* start = lists.start + block * (a.D + 1);
    uint8_t* row = lists.row + first * a.D;
    uint8_t* value = lists.value ? lists.value + first * a.D : nullptr;
    for (int64_t d = 0; d <= a.D; ++d) start[d] = 0;
    for (int64_t r = 0; r < n; ++r) {
      const uint8_t* x = sparse_row(a, first + r);
#pragma omp simd
      for (int64_t d = 0; d < a.D; ++d) start[d + 1] += x[d] != 0;
    }
    for (int64_t d = 0, sum = 0; d < a.D;
         ++d) {  // start[d + 1] is where column d goes on, and in the end where it ends
      const int32_t count = start[d + 1];
      start[d + 1] = static_cast<int32_t>(sum);
      sum += count;
    }
    for (int64_t r = 0; r < n; ++r) {
      for_nonzero(sparse_row(a, first + r), a.D, [&](int64_t d, uint8_t v) {
        const int32_t at = start[d + 1]++;
        row[at] = static_cast<uint8_t>(r);
        if (value) value[at] = v;
      });
    }
  }
}

inline int64_t sparse_gradient_scratch(const SparseArgs& a) {
  const int64_t range = (a.D + sparse_ranges(a.D) - 1) / sparse_ranges(a.D);
  return (kSparseBlock + 2 * range) * kSparseColumns * 4;
}

// Units are numbered tile of columns * sparse_ranges(D) + range of rows of the weight.
template <bool kBits>
inline void sparse_gradient_tiles(const SparseArgs& a, const SparseLists& lists, void* scratch, int64_t begin,
                                  int64_t end) {
  const int64_t ranges = sparse_ranges(a.D), range = (a.D + ranges - 1) / ranges;
  const int64_t blocks = (a.B + kSparseBlock - 1) / kSparseBlock;
  constexpr int64_t kTogether = kSparseSum / kSparseBlock;  // blocks
  float* tile = static_cast<float*>(scratch);               // [kSparseBlock, kSparseColumns] of grad
  float* sum = tile + kSparseBlock * kSparseColumns;        // [range, kSparseColumns], of kSparseSum rows
  float* total = sum + range * kSparseColumns;              // [range, kSparseColumns]
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t h = unit / ranges * kSparseColumns, d0 = unit % ranges * range;
    const int64_t n = a.D - d0 < range ? a.D - d0 : range;
    if (n <= 0) continue;
    const int columns = static_cast<int>(a.H - h < kSparseColumns ? a.H - h : kSparseColumns);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kSparseBlock;
      const int64_t rows = a.B - first < kSparseBlock ? a.B - first : kSparseBlock;
      if (block % kTogether == 0) __builtin_memset(sum, 0, n * kSparseColumns * sizeof(float));
      pack(a.grad + first * a.H + h, a.H, rows, columns, tile);
      const int32_t* start = lists.start + block * (a.D + 1) + d0;
      const uint8_t *row = lists.row + first * a.D, *value = kBits ? nullptr : lists.value + first * a.D;
      for (int64_t d = 0; d < n; ++d) {
        const int count = start[d + 1] - start[d];
        if (count > 0)
          add_rows<kBits>(tile, row + start[d], kBits ? nullptr : value + start[d], a.x_scale, count,
                          sum + d * kSparseColumns);
      }
      if (block == kTogether - 1 && blocks > kTogether) {
        __builtin_memcpy(total, sum, n * kSparseColumns * sizeof(float));
      } else if (block >= kTogether && (block % kTogether == kTogether - 1 || block == blocks - 1)) {
        for (int64_t i = 0; i < n * kSparseColumns; ++i) total[i] += sum[i];
      }
    }
    if (blocks == 0) __builtin_memset(sum, 0, n * kSparseColumns * sizeof(float));
    transpose(blocks > kTogether ? total : sum, kSparseColumns, n, columns, a.grad_weight + h * a.D + d0, a.D);
  }
}

inline void sparse_gradient_tiles(const SparseArgs& a, const SparseLists& lists, void* scratch, int64_t begin,
                                  int64_t end) {
  if (a.bits) return sparse_gradient_tiles<true>(a, lists, scratch, begin, end);
  sparse_gradient_tiles<false>(a, lists, scratch, begin, end);
}

}  // namespace
}  // namespace aevb::cpu

// SPDX-License-Identifier: Apache-2.0
// Matrix products with rows that mostly hold zeros, as binarized images do. For an image with 100 of 784 pixels set,
// the first layer is the sum of 100 columns of its weight [H, D]: an eighth of a dense product's work.
//
// Tiles of 128 x 64 floats, or 64 x 128 with AVX-512, are copied to scratch memory, where the first-level cache holds a
// tile whole. Rows of a tile are added up in registers. Every sum is in the order of its terms, whatever the tiles.
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

constexpr int kVectors = 8;                               // vectors of a tile's row, added up in as many registers
constexpr int kSparseColumns = kVectors * kVectorFloats;  // columns of a tile
constexpr int kSparseBlock = 8192 / kSparseColumns;       // rows of a tile, which has 32 KiB

// Eight floats: a vector that every instruction set can shuffle.
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

// tile [n, kSparseColumns] = from [n, columns], rows `stride` apart, and 0 beyond `columns`.
inline void pack(const float* from, int64_t stride, int64_t n, int columns, float* tile) {
  for (int64_t r = 0; r < n; ++r, from += stride, tile += kSparseColumns) {
    int k = 0;
    for (; k + kVectorFloats <= columns; k += kVectorFloats)
      *reinterpret_cast<Vector*>(tile + k) = *reinterpret_cast<const LooseVector*>(from + k);
    for (; k < columns; ++k) tile[k] = from[k];
    for (; k < kSparseColumns; ++k) tile[k] = 0.0f;
  }
}

// to [n, columns], rows `stride` apart, = tile [n, kSparseColumns].
inline void unpack(const float* tile, int64_t n, int columns, float* to, int64_t stride) {
  for (int64_t r = 0; r < n; ++r, to += stride, tile += kSparseColumns) {
    int k = 0;
    for (; k + kVectorFloats <= columns; k += kVectorFloats)
      *reinterpret_cast<LooseVector*>(to + k) = *reinterpret_cast<const Vector*>(tile + k);
    for (; k < columns; ++k) to[k] = tile[k];
  }
}

// Adds rows row[0], ..., row[n - 1] of a tile to sum [kSparseColumns], in order. Without kBits, row[i] is multiplied by
// x_scale * value[i].
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

// Calls visit(k, x[k]) for every nonzero element of x [n], in order.
template <class Visit>
AEVB_FORMULA void for_nonzero(const uint8_t* x, int64_t n, const Visit& visit) {
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, x + k, 8);  // little-endian: x[k] is the lowest byte
    constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7full;
    uint64_t found = (((bytes & kLow) + kLow) | bytes) & ~kLow;  // the top bit of each nonzero byte
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

// The columns of tile t of a matrix with H columns.
struct TileColumns {
  int64_t first;
  int count;
};
AEVB_FORMULA TileColumns tile_columns(int64_t t, int64_t H) {
  const int64_t first = t * kSparseColumns, left = H - first;
  return {first, static_cast<int>(left < kSparseColumns ? left : kSparseColumns)};
}

// ---- x @ weight.T ---------------------------------------------------------------------------------------------------

// Lists the nonzero elements of rows [begin, end) of x, by blocks of kSparseBlock columns. Row b has starts of its own,
// [blocks + 1], and its list begins at b * D. Its elements in block k are at [start[k], start[k + 1]) of the list.
inline void sparse_row_lists(const SparseArgs& a, const SparseLists& lists, int64_t begin, int64_t end) {
  const int64_t blocks = (a.D + kSparseBlock - 1) / kSparseBlock;
  for (int64_t b = begin; b < end; ++b) {
    int32_t* start = lists.start + b * (blocks + 1);
    uint8_t *at = lists.at + b * a.D, *value = lists.value ? lists.value + b * a.D : nullptr;
    const uint8_t* x = sparse_row(a, b);
    int32_t count = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      start[block] = count;
      const int64_t d = block * kSparseBlock, left = a.D - d;
      for_nonzero(x + d, left < kSparseBlock ? left : kSparseBlock, [&](int64_t k, uint8_t v) {
        at[count] = static_cast<uint8_t>(k);
        if (value) value[count] = v;
        ++count;
      });
    }
    start[blocks] = count;
  }
}

inline int64_t sparse_linear_scratch(const SparseArgs& a) {  // bytes
  return (kSparseBlock + 1 + kSparseRows) * kSparseColumns * static_cast<int64_t>(sizeof(float));
}

// out, by units group * tiles + tile: up to kSparseRows rows, and a tile of the result's columns.
template <bool kBits>
inline void sparse_linear_tiles(const SparseArgs& a, const SparseLists& lists, void* scratch, int64_t begin,
                                int64_t end) {
  const int64_t blocks = (a.D + kSparseBlock - 1) / kSparseBlock, tiles = (a.H + kSparseColumns - 1) / kSparseColumns;
  const int64_t groups = (a.B + kSparseRows - 1) / kSparseRows, group_rows = groups ? (a.B + groups - 1) / groups : 0;
  float* tile = static_cast<float*>(scratch);          // [kSparseBlock, kSparseColumns] of weight.T
  float* bias = tile + kSparseBlock * kSparseColumns;  // [kSparseColumns]
  float* sum = bias + kSparseColumns;                  // [group_rows, kSparseColumns]
  for (int64_t unit = begin; unit < end; ++unit) {
    const TileColumns h = tile_columns(unit % tiles, a.H);
    const int64_t first = unit / tiles * group_rows, n = a.B - first < group_rows ? a.B - first : group_rows;
    for (int k = 0; k < kSparseColumns; ++k) bias[k] = a.bias && k < h.count ? a.bias[h.first + k] : 0.0f;
    for (int64_t r = 0; r < n; ++r) __builtin_memcpy(sum + r * kSparseColumns, bias, sizeof(float) * kSparseColumns);
    if (h.count < kSparseColumns) __builtin_memset(tile, 0, sizeof(float) * kSparseBlock * kSparseColumns);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t d = block * kSparseBlock, left = a.D - d;
      transpose(a.weight + h.first * a.D + d, a.D, h.count, left < kSparseBlock ? left : kSparseBlock, tile,
                kSparseColumns);
      for (int64_t r = 0; r < n; ++r) {
        const int32_t* start = lists.start + (first + r) * (blocks + 1) + block;
        const int64_t from = (first + r) * a.D + start[0];
        if (start[1] > start[0])
          add_rows<kBits>(tile, lists.at + from, kBits ? nullptr : lists.value + from, a.x_scale, start[1] - start[0],
                          sum + r * kSparseColumns);
      }
    }
    activate(a.activation, sum, nullptr, n * kSparseColumns);
    unpack(sum, n, h.count, a.out + first * a.H + h.first, a.H);
  }
}

inline void sparse_linear_tiles(const SparseArgs& a, const SparseLists& lists, void* scratch, int64_t begin,
                                int64_t end) {
  if (a.bits) return sparse_linear_tiles<true>(a, lists, scratch, begin, end);
  sparse_linear_tiles<false>(a, lists, scratch, begin, end);
}

// ---- grad.T @ x -----------------------------------------------------------------------------------------------------

// A part of x: one range of columns of one block of rows. Both are cut, so that few rows or few columns keep all
// threads busy.
struct SparsePart {
  int64_t first_row, rows, first_column, columns;
};
AEVB_FORMULA SparsePart sparse_part(const SparseArgs& a, int64_t block, int64_t range) {
  const int64_t ranges = sparse_ranges(a.D), width = (a.D + ranges - 1) / ranges;
  const int64_t row = block * kSparseBlock, column = range * width;
  const int64_t rows = a.B - row < kSparseBlock ? a.B - row : kSparseBlock;
  const int64_t columns = a.D - column < width ? a.D - column : width;
  return {row, rows, column, columns > 0 ? columns : 0};
}
// The beginning of a part's list, and the part's starts, [columns + 1].
AEVB_FORMULA int64_t first_of(const SparseArgs& a, const SparsePart& p) {
  return p.first_row * a.D + p.rows * p.first_column;
}
AEVB_FORMULA int32_t* starts_of(const SparseArgs& a, const SparseLists& lists, const SparsePart& p, int64_t range) {
  const int64_t ranges = sparse_ranges(a.D), width = (a.D + ranges - 1) / ranges;
  return lists.start + (p.first_row / kSparseBlock * ranges + range) * (width + 1);
}

// Lists the nonzero elements of x, column by column, for the parts [begin, end), numbered block * ranges + range.
inline void sparse_column_lists(const SparseArgs& a, const SparseLists& lists, int64_t begin, int64_t end) {
  const int64_t ranges = sparse_ranges(a.D);
  for (int64_t unit = begin; unit < end; ++unit) {
    const SparsePart p = sparse_part(a, unit / ranges, unit % ranges);
    int32_t* start = starts_of(a, lists, p, unit % ranges);
    uint8_t* at = lists.at + first_of(a, p);
    uint8_t* value = lists.value ? lists.value + first_of(a, p) : nullptr;
    for (int64_t d = 0; d <= p.columns; ++d) start[d] = 0;
    for (int64_t r = 0; r < p.rows; ++r) {
      const uint8_t* x = sparse_row(a, p.first_row + r) + p.first_column;
#pragma omp simd
      for (int64_t d = 0; d < p.columns; ++d) start[d + 1] += x[d] != 0;
    }
    int32_t sum = 0;
    for (int64_t d = 0; d < p.columns; ++d) {  // start[d + 1]: the next place of column d; its end, at last
      const int32_t count = start[d + 1];
      start[d + 1] = sum;
      sum += count;
    }
    for (int64_t r = 0; r < p.rows; ++r) {
      for_nonzero(sparse_row(a, p.first_row + r) + p.first_column, p.columns, [&](int64_t d, uint8_t v) {
        const int32_t k = start[d + 1]++;
        at[k] = static_cast<uint8_t>(r);
        if (value) value[k] = v;
      });
    }
  }
}

inline int64_t sparse_gradient_scratch(const SparseArgs& a) {  // bytes
  const int64_t width = sparse_part(a, 0, 0).columns;
  return (kSparseBlock + 2 * width) * kSparseColumns * static_cast<int64_t>(sizeof(float));
}

// grad_weight, by units tile * ranges + range: a tile of grad's columns, and a range of x's columns.
template <bool kBits>
inline void sparse_gradient_tiles(const SparseArgs& a, const SparseLists& lists, void* scratch, int64_t begin,
                                  int64_t end) {
  const int64_t ranges = sparse_ranges(a.D), blocks = (a.B + kSparseBlock - 1) / kSparseBlock;
  constexpr int64_t kTogether = kSparseSum / kSparseBlock;  // blocks of a group
  float* tile = static_cast<float*>(scratch);               // [kSparseBlock, kSparseColumns] of grad
  float* sum = tile + kSparseBlock * kSparseColumns;        // [columns, kSparseColumns], over kSparseSum rows
  float* total = sum + sparse_part(a, 0, 0).columns * kSparseColumns;  // [columns, kSparseColumns], over all rows
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t range = unit % ranges;
    const TileColumns h = tile_columns(unit / ranges, a.H);
    const SparsePart whole = sparse_part(a, 0, range);
    const int64_t floats = whole.columns * kSparseColumns;
    for (int64_t block = 0; block < blocks; ++block) {
      const SparsePart p = sparse_part(a, block, range);
      if (block % kTogether == 0) __builtin_memset(sum, 0, floats * sizeof(float));
      pack(a.grad + p.first_row * a.H + h.first, a.H, p.rows, h.count, tile);
      const int32_t* start = starts_of(a, lists, p, range);
      for (int64_t d = 0; d < p.columns; ++d) {
        const int64_t from = first_of(a, p) + start[d];
        if (start[d + 1] > start[d])
          add_rows<kBits>(tile, lists.at + from, kBits ? nullptr : lists.value + from, a.x_scale,
                          start[d + 1] - start[d], sum + d * kSparseColumns);
      }
      if (block == kTogether - 1 && blocks > kTogether) {
        __builtin_memcpy(total, sum, floats * sizeof(float));
      } else if (block >= kTogether && (block % kTogether == kTogether - 1 || block == blocks - 1)) {
        for (int64_t i = 0; i < floats; ++i) total[i] += sum[i];
      }
    }
    if (blocks == 0) __builtin_memset(sum, 0, floats * sizeof(float));
    transpose(blocks > kTogether ? total : sum, kSparseColumns, whole.columns, h.count,
              a.grad_weight + h.first * a.D + whole.first_column, a.D);
  }
}

inline void sparse_gradient_tiles(const SparseArgs& a, const SparseLists& lists, void* scratch, int64_t begin,
                                  int64_t end) {
  if (a.bits) return sparse_gradient_tiles<true>(a, lists, scratch, begin, end);
  sparse_gradient_tiles<false>(a, lists, scratch, begin, end);
}

}  // namespace
}  // namespace aevb::cpu

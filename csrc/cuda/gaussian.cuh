// SPDX-License-Identifier: Apache-2.0
// Shared code of the Gaussian posterior's kernels. A thread takes a run of V neighbouring elements in row-major order,
// whatever the rows' length. So accesses are wide, and every four elements of z are one counter of the noise.
//
// A kernel is compiled three times. `kPlain` is for the common case: every run is one complete access, and one counter
// (or two) of the only seed. `kPrior` is for a prior and a range of logvar, wherever tensors lie. The third is for the
// rest.
#pragma once
#include "../formulas/gaussian.h"
#include "grids.h"
#include "noise.cuh"

namespace aevb::cuda {

// ---- runs of elements -----------------------------------------------------------------------------------------------

// A matrix [rows, D] read by runs of elements.
template <class T>
struct Reader {
  const T* data;  // [rows, D], rows `stride` elements apart
  int64_t stride;
  bool in_runs;  // every run of V elements is an aligned access, except a run that ends beyond the last element
};

template <class T, int64_t V = kWidest<T>>
Reader<T> reader_of(const Rows& m, int64_t D) {
  const bool in_runs = m.stride == D || (D % V == 0 && m.stride % V == 0);
  return {static_cast<const T*>(m.data), m.stride, in_runs && is_aligned(m.data, 16)};
}

// Row and column of element i of a matrix with rows of D elements.
struct Place {
  int64_t row, column;
};
AEVB_DEVICE Place place_of(int64_t i, const Divider& D) {
  const int64_t row = D.divide(i);
  return {row, i - row * D.divisor()};
}

// Address of element i. `at`, its place, is needed unless rows are adjacent.
template <class T>
AEVB_DEVICE const T* address(const Reader<T>& reader, int64_t i, Place at, int64_t D) {
  return reader.data + (reader.stride == D ? i : at.row * reader.stride + at.column);
}

// Reads elements [i, i + V) to x [V], with 0 from element `count` on.
template <int V, class T>
AEVB_DEVICE void read_run(const Reader<T>& reader, int64_t i, Place at, int64_t D, int64_t count, float* x) {
  const T* data = address(reader, i, at, D);
  if (reader.in_runs && i + V <= count) return load<V>(data).unpack_to(x);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    x[j] = i + j < count ? load_one(data) : 0.0f;
    ++data;
    if (reader.stride != D && ++at.column == D) {
      at.column = 0;
      data += reader.stride - D;
    }
  }
}

// Writes x [V] to elements [i, i + V) of the contiguous `data`, but only to elements in [begin, end). `aligned`:
// element i has an address that is a multiple of 16 bytes.
template <int V, class T>
AEVB_DEVICE void write_run(const float* x, T* data, int64_t i, int64_t begin, int64_t end, bool aligned) {
  if (aligned && i >= begin && i + V <= end) return store<V>(x, data + i);
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (i + j >= begin && i + j < end) store_one(x[j], data + i + j);
}

inline Seeds seeds_of(const int64_t* seeds, int64_t block, int64_t count) {
  return {seeds, Divider(block > 0 ? block : 1), block >= count};
}

// Calls use(RangeConstant) with the range that holds all of logvar [V].
template <int V, class Use>
AEVB_DEVICE void with_range(const float* logvar, const Use& use) {
  bool moderate = true;
#pragma unroll
  for (int j = 0; j < V; ++j) moderate = moderate && abs_of(logvar[j]) <= kModerateLogvar;
  if (moderate)
    use(RangeConstant<Range::moderate>{});
  else
    use(RangeConstant<Range::any>{});
}

// ---- a prior, and a range of logvar
// ----------------------------------------------------------------------------------

struct PriorArgs {
  Reader<float> mu, logvar;  // [B, D]; without data: N(0, I)
  bool clamps;
  float min, max;                // of the posterior's logvar
  float *grad_mu, *grad_logvar;  // [B, D]; null: not wanted
};

// For runs of V elements.
template <int V>
PriorArgs prior_of(const GaussianArgs& a) {
  return {reader_of<float, V>(a.prior_mu, a.D),
          reader_of<float, V>(a.prior_logvar, a.D),
          a.clamps,
          a.logvar_min,
          a.logvar_max,
          a.grad_prior_mu,
          a.grad_prior_logvar};
}

inline bool has_prior_args(const GaussianArgs& a) { return a.clamps || a.prior_mu.data; }

// The posterior of a run as the prior sees it, N(d, exp(u)). Without a prior, d and u are mu and logvar.
template <int V>
struct Seen {
  float d[V];
  LogScale u[V];
  InverseSd inverse_sd[V];  // 1 without a prior

  // Clamps logvar [V] of the run at element i, and reads its prior.
  AEVB_DEVICE void read(const PriorArgs& a, int64_t i, Place at, int64_t D, int64_t count, const float* mu,
                        float* logvar) {
    if (a.clamps) {
#pragma unroll
      for (int j = 0; j < V; ++j) logvar[j] = clamped_logvar(logvar[j], a.min, a.max);
    }
    float prior_logvar[V] = {};
    if (a.mu.data) {
      read_run<V>(a.mu, i, at, D, count, d);
      read_run<V>(a.logvar, i, at, D, count, prior_logvar);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      inverse_sd[j] = a.mu.data ? prior_inverse_sd(prior_logvar[j]) : InverseSd{1.0f, 1.0f};
      d[j] = a.mu.data ? times(mu[j] - d[j], inverse_sd[j]) : mu[j];
      u[j] = a.mu.data ? log_scale(logvar[j], prior_logvar[j]) : LogScale{logvar[j], 0.0f};
    }
  }
};

// ---- tiles: whole rows, or a part of one long row -------------------------------------------------------------------

struct Cut {
  Divider D, parts;       // a long row is cut into `parts` tiles
  int64_t B, rows, part;  // rows of a tile, or elements of a part
};

// Elements [begin, end) of a matrix: `rows` whole rows of `columns` elements, or one part of a row. first_row is the
// first row, or the part's number among the parts of all rows.
struct Tile {
  int64_t begin, end, first_row;
  int rows, columns;
};

AEVB_DEVICE Tile tile_of(const Cut& cut, int64_t number) {
  const int64_t D = cut.D.divisor();
  if (cut.parts.divisor() == 1) {
    const int64_t row = number * cut.rows;
    const int rows = static_cast<int>(cut.rows < cut.B - row ? cut.rows : cut.B - row);
    return {row * D, (row + rows) * D, row, rows, static_cast<int>(D)};
  }
  const int64_t row = cut.parts.divide(number), part = number - row * cut.parts.divisor();
  const int64_t begin = row * D + part * cut.part;
  const int64_t end = part + 1 == cut.parts.divisor() ? (row + 1) * D : begin + cut.part;
  return {begin, end, number, 1, static_cast<int>(end - begin)};
}

// ---- sums over samples ----------------------------------------------------------------------------------------------

// Sums over samples of the gradients of mu and logvar, up to factors.
template <int V>
struct SampleSums {
  float mu[V] = {}, logvar[V] = {};
};

// Adds block [V] to total [V], and the rounding error of the addition to lost [V].
template <int V>
AEVB_DEVICE void join_block(const float* block, float* total, float* lost) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float before = total[j], x = block[j], sum = before + x, added = sum - before;
    lost[j] += (before - (sum - added)) + (x - added);
    total[j] = sum;
  }
}

constexpr int64_t kSampleBlock = 16;

// Sums blocks of 16 samples in order, and joins them by two-sum. add(first, last, sums) adds samples [first, last), in
// order, to sums that start at -0, which changes no bit. kMany: there are 16 samples or more.
template <bool kMany, int V, class Add>
AEVB_DEVICE void sum_samples(int64_t L, SampleSums<V>& sums, const Add& add) {
  const auto clear = [&] {
#pragma unroll
    for (int j = 0; j < V; ++j) sums.mu[j] = sums.logvar[j] = -0.0f;
  };
  if constexpr (kMany) {
    SampleSums<V> total, lost;
    for (int64_t l = 0; l < L; l += kSampleBlock) {
      clear();
      add(l, l + kSampleBlock < L ? l + kSampleBlock : L, sums);
      join_block<V>(sums.mu, total.mu, lost.mu);
      join_block<V>(sums.logvar, total.logvar, lost.logvar);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {  // lost is NaN, inf - inf, at an infinity
      sums.mu[j] = lost.mu[j] == lost.mu[j] ? total.mu[j] + lost.mu[j] : total.mu[j];
      sums.logvar[j] = lost.logvar[j] == lost.logvar[j] ? total.logvar[j] + lost.logvar[j] : total.logvar[j];
    }
  } else {
    clear();
    add(0, L, sums);
  }
}

}  // namespace aevb::cuda

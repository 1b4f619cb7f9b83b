// SPDX-License-Identifier: Apache-2.0
// The reparameterised sample and the Gaussian KL of rows of latents, tile by tile. A tile is some whole rows, or a
// piece of one long row. Its intermediate values stay in the first-level cache.
#pragma once
#include "../formulas/gaussian.h"
#include "convert.h"
#include "noise.h"
#include "sum.h"

namespace aevb::cpu {
namespace {

// Elements of a tile: few, so that reading a tile overlaps with computing the previous tile. Divides kGroup.
constexpr int kTile = 256;

#define AEVB_INLINE __attribute__((always_inline))

// Calls f(i) for every i < n, two vectors at a time while there are two: each fills the other's waits.
template <class F>
AEVB_FORMULA void for_elements(int n, const F& f) {
  constexpr int kAtOnce = 16;
  int i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) {
#pragma omp simd
    for (int k = 0; k < kAtOnce; ++k) f(i + k);
  }
#pragma omp simd
  for (int k = i; k < n; ++k) f(k);
}

// Calls use(RangeConstant) with the range that holds all of logvar [n].
template <class Use>
AEVB_FORMULA void with_range(const float* logvar, int n, const Use& use) {
  int beyond = 0;
#pragma omp simd reduction(| : beyond)
  for (int i = 0; i < n; ++i) beyond |= !(abs_of(logvar[i]) <= kModerateLogvar);
  if (beyond)
    use(RangeConstant<Range::any>{});
  else
    use(RangeConstant<Range::moderate>{});
}

// Rows [row, row + rows) and columns [column, column + columns) of a matrix.
struct Tile {
  int64_t row, rows, column, columns;
  int n() const { return static_cast<int>(rows * columns); }
  bool ends_chunk(int64_t D) const { return column + columns == D || (column + columns) % kChunk == 0; }
};

// Calls visit(tile) for each tile of the units [begin, end), numbered row * chunks(D) + chunk.
template <class Visit>
inline void for_tiles(int64_t D, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t per_row = chunks(D);
  if (D <= kTile) {
    int64_t step = D > 0 ? kTile / D : kTile;
    if (step >= 16) step &= ~int64_t{15};  // whole vectors, whatever D is
    for (int64_t row = begin; row < end; row += step) visit(Tile{row, row + step < end ? step : end - row, 0, D});
    return;
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % per_row * kChunk;
    const int64_t last = first + kChunk < D ? first + kChunk : D;
    for (int64_t column = first; column < last; column += kTile)
      visit(Tile{unit / per_row, 1, column, column + kTile < last ? kTile : last - column});
  }
}

// Elements [first, first + n) of the noise [L, B, D], in `buffer` [n] where they touch the blocks of several seeds: one
// run for each block.
AEVB_FORMULA const float* noise_of(const GaussianArgs& a, int64_t first, int n, Noise<kTile>& noise, float* buffer) {
  if (n == 0) return buffer;  // rows of no elements, where seed_block is 0
  int64_t block = first / a.seed_block, offset = first % a.seed_block;
  if (offset + n <= a.seed_block) return noise.fill(static_cast<uint64_t>(a.seeds[block]), offset, n);
  for (int done = 0; done < n; ++block, offset = 0) {
    const int64_t left = a.seed_block - offset;
    const int run = left < n - done ? static_cast<int>(left) : n - done;
    const float* eps = noise.fill(static_cast<uint64_t>(a.seeds[block]), offset, run);
    __builtin_memcpy(buffer + done, eps, run * sizeof(float));
    done += run;
  }
  return buffer;
}

// The posterior of a tile, and as the prior sees it, N(d, exp(u)). Without a prior, d and u are mu and logvar.
class Latents {
 public:
  explicit Latents(const GaussianArgs& a) : a_(a) {}

  const float *mu, *logvar, *d, *u;  // [n]; logvar in its range

  inline void read(const Tile& t) {
    const int n = t.n();
    d = mu = read_rows(a_.mu, t.row, t.rows, t.column, t.columns, mu_);
    u = logvar = given_ = read_rows(a_.logvar, t.row, t.rows, t.column, t.columns, logvar_);
    if (a_.clamps) {
#pragma omp simd
      for (int i = 0; i < n; ++i) clamped_[i] = clamped_logvar(given_[i], a_.logvar_min, a_.logvar_max);
      u = logvar = clamped_;
    }
    if (!has_prior()) return;
    standardise(read_rows(a_.prior_mu, t.row, t.rows, t.column, t.columns, prior_mu_),
                read_rows(a_.prior_logvar, t.row, t.rows, t.column, t.columns, prior_logvar_), mu, logvar, n, d_, u_,
                u_low_, first_, second_);
    d = d_;
    u = u_;
  }

  inline bool has_prior() const { return a_.prior_mu.data; }

  AEVB_FORMULA LogScale scale(int i) const { return {u_[i], u_low_[i]}; }  // u, where there is a prior

  AEVB_FORMULA InverseSd inverse_sd(int i) const { return {first_[i], second_[i]}; }

  // The four of RatioSlopes, each [n].
  template <bool kPath>
  inline void slopes(int n, float* mu_slope, float* slope, float* sd_mu, float* sd_slope) const {
    const float *v = logvar, *at = d;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const RatioSlopes found = gaussian_ratio_slopes(v[i], at[i], scale(i), inverse_sd(i), kPath);
      mu_slope[i] = found.mu;
      slope[i] = found.slope;
      sd_mu[i] = found.sd_mu;
      sd_slope[i] = found.sd_slope;
    }
  }

  // grad [n], of the clamped logvar, becomes that of the given one.
  inline void unclamp(float* grad, int n) const {
    if (!a_.clamps) return;
#pragma omp simd
    for (int i = 0; i < n; ++i) grad[i] = clamped_gradient(given_[i], a_.logvar_min, a_.logvar_max, grad[i]);
  }

 private:
  static inline void standardise(const float* prior_mu, const float* prior_logvar, const float* mu, const float* logvar,
                                 int n, float* d, float* u, float* u_low, float* first, float* second) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const InverseSd inverse_sd = prior_inverse_sd(prior_logvar[i]);
      first[i] = inverse_sd.first;
      second[i] = inverse_sd.second;
    }
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const LogScale scale = log_scale(logvar[i], prior_logvar[i]);
      u[i] = scale.value;
      u_low[i] = scale.low;
      d[i] = times(mu[i] - prior_mu[i], {first[i], second[i]});
    }
  }

  const GaussianArgs& a_;
  const float* given_;  // [n]
  alignas(64) float mu_[kTile], logvar_[kTile], clamped_[kTile], prior_mu_[kTile], prior_logvar_[kTile];
  alignas(64) float d_[kTile], u_[kTile], u_low_[kTile], first_[kTile], second_[kTile];
};

inline void gaussian_rows(const GaussianArgs& a, int64_t begin, int64_t end) {
  alignas(64) float sd[kTile], z_buffer[kTile], eps_buffer[kTile];
  alignas(64) float two_kl[kTile + kLanes] = {};
  Latents q(a);
  Noise<kTile> noise;
  RowSum kl;
  const float half = chunks(a.D) == 1 ? 0.5f : 1.0f;  // sums of chunks are joined before they are halved
  for_tiles(a.D, begin, end, [&](const Tile& t) {
    const int n = t.n();
    q.read(t);
    const float *mu = q.mu, *logvar = q.logvar;  // [n]
    if (!q.has_prior()) {
      with_range(logvar, n, [&](auto range) AEVB_INLINE {
        for_elements(n, [&](int i) AEVB_INLINE {
          const float m = mu[i], v = logvar[i];
          sd[i] = gaussian_sd<range.value>(v);
          two_kl[i] = gaussian_two_kl<range.value>(m, v);
        });
      });
    } else {
      if (a.z)
        with_range(logvar, n, [&](auto range) AEVB_INLINE {
          for_elements(n, [&](int i) AEVB_INLINE { sd[i] = gaussian_sd<range.value>(logvar[i]); });
        });
      const float* d = q.d;
      with_range(q.u, n, [&](auto range) AEVB_INLINE {
        for_elements(n, [&](int i) AEVB_INLINE { two_kl[i] = gaussian_two_kl<range.value>(d[i], q.scale(i)); });
      });
    }
    if (a.kl && a.D == 1) {  // a row is one element, as where the KL of each dimension is wanted
      for (int i = 0; i < n; ++i) a.kl[t.row + i] = half * (0.0f + two_kl[i]);
    } else if (a.kl && t.columns == a.D) {
      for (int64_t r = 0; r < t.rows; ++r) a.kl[t.row + r] = half * sum_group(two_kl + r * a.D, static_cast<int>(a.D));
    } else if (a.kl) {
      if (t.column % kChunk == 0) kl = RowSum();
      kl.add(two_kl, n);
      if (t.ends_chunk(a.D)) a.kl[t.row * chunks(a.D) + t.column / kChunk] = half * kl.total();
    }
    if (!a.z) return;
    for (int64_t l = 0; l < a.L; ++l) {
      const int64_t first = (l * a.B + t.row) * a.D + t.column;
      const float* eps = noise_of(a, first, n, noise, eps_buffer);
      void* out = element(a.z, a.mu.dtype, first);
      const bool in_place = a.mu.dtype == Dtype::float32;
      float* z = in_place ? static_cast<float*>(out) : z_buffer;
#pragma omp simd
      for (int i = 0; i < n; ++i) z[i] = gaussian_sample(mu[i], sd[i], eps[i]);
      if (!in_place) write_floats(z, n, a.mu.dtype, out);
    }
  });
}

// sum_l grad_z and sum_l grad_z eps of a tile, or the sums of any two numbers of each sample. Blocks of 16 samples are
// joined by two-sum, which keeps the rounding errors and adds them at the end.
class SampleSums {
 public:
  float grad_z[kTile], grad_z_eps[kTile];  // after finish(): the sums

  inline void add_pair(const float* first, const float* second, int n) {
    const bool begins = in_block_++ == 0;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      grad_z[i] = begins ? first[i] : grad_z[i] + first[i];
      grad_z_eps[i] = begins ? second[i] : grad_z_eps[i] + second[i];
    }
    if (in_block_ == kBlock) close_block(n);
  }

  inline void add(const float* g, const float* eps, int n) {
    if (in_block_++ == 0) {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        grad_z[i] = g[i];
        grad_z_eps[i] = g[i] * eps[i];
      }
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        grad_z[i] += g[i];
        grad_z_eps[i] = fmadd(g[i], eps[i], grad_z_eps[i]);
      }
    }
    if (in_block_ == kBlock) close_block(n);
  }

  inline void finish(int n) {
    if (blocks_ > 0) {
      if (in_block_ > 0) close_block(n);
      total(total_[0], lost_[0], grad_z, n);
      total(total_[1], lost_[1], grad_z_eps, n);
    }
    in_block_ = blocks_ = 0;
  }

 private:
  static constexpr int kBlock = 16;

  inline void close_block(int n) {
    join(grad_z, total_[0], lost_[0], n, blocks_ == 0);
    join(grad_z_eps, total_[1], lost_[1], n, blocks_ == 0);
    in_block_ = 0;
    ++blocks_;
  }
  static inline void join(const float* block, float* total, float* lost, int n, bool first) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const float before = first ? 0.0f : total[i], x = block[i], sum = before + x, added = sum - before;
      lost[i] = (first ? 0.0f : lost[i]) + ((before - (sum - added)) + (x - added));
      total[i] = sum;
    }
  }
  static inline void total(const float* total, const float* lost, float* out, int n) {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = lost[i] == lost[i] ? total[i] + lost[i] : total[i];  // lost is NaN at inf
  }

  int in_block_ = 0, blocks_ = 0;
  float total_[2][kTile], lost_[2][kTile];
};

// Writes the gradients [n] of a tile's prior, which begin at element `offset`.
inline void write_prior_gradient(const GaussianArgs& a, const float* mu, const float* logvar, int n, int64_t offset) {
  if (a.grad_prior_mu) write_floats(mu, n, Dtype::float32, a.grad_prior_mu + offset);
  if (a.grad_prior_logvar) write_floats(logvar, n, Dtype::float32, a.grad_prior_logvar + offset);
}

// The samples z and the log ratio log q(z|x) - log p(z) of each sample.
inline void gaussian_log_ratio_rows(const GaussianArgs& a, int64_t begin, int64_t end) {
  alignas(64) float sd[kTile], sd_less_1[kTile];
  alignas(64) float z_buffer[kTile], eps_buffer[kTile], two_ratio[kTile + kLanes] = {};
  Latents q(a);
  Noise<kTile> noise;
  const bool in_place = a.mu.dtype == Dtype::float32;
  const auto latents = [&](const Tile& t) {
    q.read(t);
    const int n = t.n();
    const float* logvar = q.logvar;
    if (q.has_prior()) {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        sd[i] = gaussian_sd(logvar[i]);
        sd_less_1[i] = half_exp(q.scale(i)).expm1;
      }
      return;
    }
    with_range(logvar, n, [&](auto range) AEVB_INLINE {
      for_elements(n, [&](int i) AEVB_INLINE {
        const ExpDifferences e = exp_differences<range.value>(0.5f * logvar[i]);
        sd[i] = e.exp;
        sd_less_1[i] = e.expm1;
      });
    });
  };
  const auto sample = [&](const Tile& t, int64_t l) {
    const int n = t.n();
    const int64_t first = (l * a.B + t.row) * a.D + t.column;
    const float* eps = noise_of(a, first, n, noise, eps_buffer);
    void* out = element(a.z, a.mu.dtype, first);
    float* z = in_place ? static_cast<float*>(out) : z_buffer;
    const float *mu = q.mu, *d = q.d, *u = q.u;  // [n]
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      z[i] = gaussian_sample(mu[i], sd[i], eps[i]);
      two_ratio[i] = gaussian_two_log_ratio(d[i], u[i], sd_less_1[i], eps[i]);
    }
    if (!in_place) write_floats(z, n, a.mu.dtype, out);
  };
  if (a.D <= kTile) {
    for_tiles(a.D, begin, end, [&](const Tile& t) {
      latents(t);
      for (int64_t l = 0; l < a.L; ++l) {
        sample(t, l);
        float* ratio = a.log_ratio + l * a.B + t.row;  // [t.rows]
        for (int64_t r = 0; r < t.rows; ++r) ratio[r] = 0.5f * sum_group(two_ratio + r * a.D, static_cast<int>(a.D));
      }
    });
    return;
  }
  // A long row has one running sum, so each sample takes a pass over the row.
  const int64_t per_row = chunks(a.D);
  const float half = per_row == 1 ? 0.5f : 1.0f;  // chunks are joined before they are halved
  for (int64_t unit = begin; unit < end; ++unit) {
    for (int64_t l = 0; l < a.L; ++l) {
      RowSum sum;
      for_tiles(a.D, unit, unit + 1, [&](const Tile& t) {
        latents(t);
        sample(t, l);
        sum.add(two_ratio, t.n());
      });
      a.log_ratio[l * a.B * per_row + unit] = half * sum.total();
    }
  }
}

inline void gaussian_log_ratio_backward_rows(const GaussianArgs& a, int64_t begin, int64_t end) {
  alignas(64) float grad_buffer[kTile], eps_buffer[kTile];
  alignas(64) float sd[kTile], slope[kTile], no_grad[kTile] = {}, grad_mu[kTile], grad_logvar[kTile];
  alignas(64) float mu_slope[kTile], sd_mu[kTile], sd_slope[kTile], prior_sd[kTile], prior_sd_slope[kTile];
  Latents q(a);
  SampleSums sums, prior_sums;
  Noise<kTile> noise;
  const Dtype dtype = a.mu.dtype;
  const bool path_only = a.path_only;
  for_tiles(a.D, begin, end, [&](const Tile& t) {
    const int n = t.n();
    const int64_t offset = t.row * a.D + t.column;
    q.read(t);
    const float *logvar = q.logvar, *d = q.d;
    if (q.has_prior()) {
      q.slopes<false>(n, mu_slope, slope, sd_mu, sd_slope);
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        sd[i] = gaussian_sd(logvar[i]);
        prior_sd[i] = gaussian_sd(q.scale(i));
        prior_sd_slope[i] = slope[i];
      }
      if (path_only) q.slopes<true>(n, mu_slope, slope, sd_mu, sd_slope);
    } else if (path_only) {  // a branch inside the loop would keep it from being vectorised
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        sd[i] = gaussian_sd(logvar[i]);
        slope[i] = gaussian_ratio_slope(logvar[i], true);
      }
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        sd[i] = gaussian_sd(logvar[i]);
        slope[i] = gaussian_ratio_slope(logvar[i], false);
      }
    }
    for (int64_t l = 0; l < a.L; ++l) {
      const int64_t row = l * a.B + t.row;
      const float* eps = noise_of(a, row * a.D + t.column, n, noise, eps_buffer);
      const float* grad_z =
          a.grad_z.data ? read_rows(a.grad_z, row, t.rows, t.column, t.columns, grad_buffer) : no_grad;
      for (int64_t r = 0; r < t.rows; ++r) {
        const float g = a.grad_log_ratio ? a.grad_log_ratio[row + r] : 0.0f;
        const float weight = a.sample_weight ? a.sample_weight[row + r] : 1.0f;
        const int64_t from = r * t.columns, to = from + t.columns;
        if (q.has_prior()) {
#pragma omp simd
          for (int64_t i = from; i < to; ++i) {
            const RatioSlopes of_prior{mu_slope[i], slope[i], sd_mu[i], sd_slope[i]};
            const RatioGradient found =
                gaussian_ratio_gradient(of_prior, sd[i], eps[i], weight * grad_z[i], g, path_only);
            grad_mu[i] = found.z;
            grad_logvar[i] = found.two_logvar;
          }
          continue;
        }
#pragma omp simd
        for (int64_t i = from; i < to; ++i) {
          const RatioGradient found =
              gaussian_ratio_gradient(d[i], sd[i], slope[i], eps[i], weight * grad_z[i], g, path_only);
          grad_mu[i] = found.z;
          grad_logvar[i] = found.two_logvar;
        }
      }
      sums.add_pair(grad_mu, grad_logvar, n);
      if (!wants_prior_gradient(a)) continue;
      for (int64_t r = 0; r < t.rows; ++r) {
        const float g = a.prior_grad ? a.prior_grad[row + r] : 0.0f;
        const int64_t from = r * t.columns, to = from + t.columns;
#pragma omp simd
        for (int64_t i = from; i < to; ++i) {
          const PriorGradient found =
              gaussian_prior_gradient(d[i], prior_sd[i], mu_slope[i], prior_sd_slope[i], eps[i], g);
          grad_mu[i] = found.mu;
          grad_logvar[i] = found.two_logvar;
        }
      }
      prior_sums.add_pair(grad_mu, grad_logvar, n);
    }
    sums.finish(n);
    prior_sums.finish(n);
    const auto totals = [&](const SampleSums& of) {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        grad_mu[i] = a.L > 0 ? of.grad_z[i] : 0.0f;
        grad_logvar[i] = a.L > 0 ? 0.5f * of.grad_z_eps[i] : 0.0f;
      }
    };
    if (wants_prior_gradient(a)) {
      totals(prior_sums);
      write_prior_gradient(a, grad_mu, grad_logvar, n, offset);
    }
    totals(sums);
    q.unclamp(grad_logvar, n);
    write_floats(grad_mu, n, dtype, element(a.grad_mu, dtype, offset));
    write_floats(grad_logvar, n, dtype, element(a.grad_logvar, dtype, offset));
  });
}

// grad_mu = sum_l grad_z + grad_kl mu;  grad_logvar = sd / 2 sum_l grad_z eps + grad_kl (exp(logvar) - 1) / 2.
inline void gaussian_backward_rows(const GaussianArgs& a, int64_t begin, int64_t end) {
  alignas(64) float grad_buffer[kTile], eps_buffer[kTile];
  alignas(64) float grad_kl[kTile], grad_mu_buffer[kTile], grad_logvar_buffer[kTile];
  alignas(64) float prior_mu[kTile], prior_logvar[kTile];  // their gradients
  Latents q(a);
  SampleSums sums;
  Noise<kTile> noise;
  const Dtype dtype = a.mu.dtype;
  const bool in_place = dtype == Dtype::float32;
  const float grad_kl_scale = a.beta ? a.grad_kl_scale * *a.beta : a.grad_kl_scale;
  for_tiles(a.D, begin, end, [&](const Tile& t) {
    const int n = t.n();
    const int64_t offset = t.row * a.D + t.column;
    q.read(t);
    const float *mu = q.mu, *logvar = q.logvar;  // [n]
    float* grad_mu = in_place ? static_cast<float*>(a.grad_mu) + offset : grad_mu_buffer;
    float* grad_logvar = in_place ? static_cast<float*>(a.grad_logvar) + offset : grad_logvar_buffer;
    for (int64_t l = 0; l < (a.grad_z.data ? a.L : 0); ++l) {
      const float* eps = noise_of(a, (l * a.B + t.row) * a.D + t.column, n, noise, eps_buffer);
      const float* grad_z = read_rows(a.grad_z, l * a.B + t.row, t.rows, t.column, t.columns, grad_buffer);
      sums.add(grad_z, eps, n);
    }
    sums.finish(n);
    if (a.grad_kl) {
      for (int64_t r = 0; r < t.rows; ++r) {
        const float g = grad_kl_scale * a.grad_kl[(t.row + r) * a.grad_kl_stride];
#pragma omp simd
        for (int64_t i = 0; i < t.columns; ++i) grad_kl[r * t.columns + i] = g;
      }
    }
    const bool through_z = a.grad_z.data && a.L > 0, through_kl = a.grad_kl != nullptr;
    if (through_kl && q.has_prior()) {
      const float* d = q.d;
      for (int i = 0; i < (through_z ? 0 : n); ++i)
        sums.grad_z[i] = grad_logvar[i] = -0.0f;  // whose sum changes no bit
      if (through_z) {
#pragma omp simd
        for (int i = 0; i < n; ++i) grad_logvar[i] = gaussian_sample_grad_logvar(logvar[i], sums.grad_z_eps[i]);
      }
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const float of_mu = times(d[i], q.inverse_sd(i));
        grad_mu[i] = fmadd(grad_kl[i], of_mu, sums.grad_z[i]);
        prior_mu[i] = -(grad_kl[i] * of_mu);
      }
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        grad_logvar[i] = fmadd(grad_kl[i], gaussian_kl_grad_logvar(q.scale(i)), grad_logvar[i]);
        prior_logvar[i] = grad_kl[i] * gaussian_kl_grad_prior_logvar(d[i], q.scale(i));
      }
    } else if (through_z && through_kl) {
      with_range(logvar, n, [&](auto range) AEVB_INLINE {
        for_elements(n, [&](int i) AEVB_INLINE {
          const float v = logvar[i];
          grad_mu[i] = fmadd(grad_kl[i], mu[i], sums.grad_z[i]);
          grad_logvar[i] = fmadd(grad_kl[i], gaussian_kl_grad_logvar<range.value>(v),
                                 gaussian_sample_grad_logvar<range.value>(v, sums.grad_z_eps[i]));
        });
      });
    } else if (through_kl) {
      with_range(logvar, n, [&](auto range) AEVB_INLINE {
        for_elements(n, [&](int i) AEVB_INLINE {
          grad_mu[i] = grad_kl[i] * mu[i];
          grad_logvar[i] = grad_kl[i] * gaussian_kl_grad_logvar<range.value>(logvar[i]);
        });
      });
    } else if (through_z) {
      with_range(logvar, n, [&](auto range) AEVB_INLINE {
        for_elements(n, [&](int i) AEVB_INLINE {
          grad_mu[i] = sums.grad_z[i];
          grad_logvar[i] = gaussian_sample_grad_logvar<range.value>(logvar[i], sums.grad_z_eps[i]);
        });
      });
    } else {
      for (int i = 0; i < n; ++i) grad_mu[i] = grad_logvar[i] = 0.0f;
    }
    q.unclamp(grad_logvar, n);
    if (wants_prior_gradient(a)) {
      for (int i = 0; i < (through_kl ? 0 : n); ++i) prior_mu[i] = prior_logvar[i] = 0.0f;
      write_prior_gradient(a, prior_mu, prior_logvar, n, offset);
    }
    if (!in_place) {
      write_floats(grad_mu, n, dtype, element(a.grad_mu, dtype, offset));
      write_floats(grad_logvar, n, dtype, element(a.grad_logvar, dtype, offset));
    }
  });
}

}  // namespace
}  // namespace aevb::cpu

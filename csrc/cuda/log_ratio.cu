// SPDX-License-Identifier: Apache-2.0
// The reparameterised sample with its log ratio log q(z|x) - log p(z), and the gradients of both.
//
// A thread keeps the values that all samples of its run share in registers, and loops over the samples.
#include "../formulas/gaussian.h"
#include "gaussian.cuh"
#include "launchers.h"
#include "sums.cuh"

namespace aevb::cuda {
namespace {

constexpr int kThreads = 256;
template <class T>
constexpr int kTile = kThreads * kWidest<T>;  // elements of a tile: one run for each thread

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardArgs {
  Reader<T> mu, logvar;  // [B, D]
  bool by_rows;          // rows of mu or logvar are not adjacent
  Cut cut;
  Divider tiles;  // number of tiles; block s * tiles + t takes share s, `samples` samples, of tile t
  int samples;
  int at_once;                // samples at once: more than 1 if a single small tile leaves threads for them
  Divider runs;               // runs of that tile
  int64_t L, count, results;  // a sample has count = B * D elements and results = B * parts sums
  Seeds seeds;
  T* z;           // [L, B, D]
  float* result;  // [L, B]: the log ratios; or [L, B, parts]: twice the log ratio of each part
  float factor;
  PriorArgs prior;
};

template <class T, bool kPlain, bool kPrior = false>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 && !kPrior ? 3 : 2) log_ratio_tile(const ForwardArgs<T> a) {
  constexpr int V = kWidest<T>;
  AEVB_SHARED(float4, tile_vectors, 2 * kTile<T> / 4);  // twice each element's log ratio, in two halves used in turn
  AEVB_SHARED(float, group_sum, 2 * kTile<T> / kGroup);
  const PhiloxKeys keys = philox_keys(static_cast<uint64_t>(*a.seeds.seeds));
  const int64_t D = a.cut.D.divisor();
  const int64_t share = a.samples < a.L ? a.tiles.divide(blockIdx.x) : 0, first_sample = share * a.samples;
  const int samples = static_cast<int>(first_sample + a.samples < a.L ? a.samples : a.L - first_sample);
  const Tile tile = tile_of(a.cut, blockIdx.x - share * a.tiles.divisor());
  const int64_t first = kPlain ? tile.begin : tile.begin / V * V;  // beginning of the first run
  const int n = tile.rows * tile.columns;
  int own = 0, k = threadIdx.x * V;  // the thread's sample among at_once, and its element in the tile
  if (a.at_once > 1) {
    own = static_cast<int>(a.runs.divide(threadIdx.x));
    k -= own * static_cast<int>(a.runs.divisor()) * V;
  }
  const int64_t i = first + k;
  const bool has_run = i < tile.end && own < a.at_once;

  float mu[V], logvar[V], sd[V], sd_less_1[V];
  [[maybe_unused]] Seen<kPrior ? V : 1> q;
  if (has_run) {
    const Place at = a.by_rows ? place_of(i, a.cut.D) : Place{};
    if constexpr (kPlain) {
      const T *mu_run = a.mu.data + i, *logvar_run = a.logvar.data + i;
      if (a.by_rows) {
        mu_run = a.mu.data + at.row * a.mu.stride + at.column;
        logvar_run = a.logvar.data + at.row * a.logvar.stride + at.column;
      }
      const Loaded<T, V> loaded_mu = load<V>(mu_run), loaded_logvar = load<V>(logvar_run);
      loaded_mu.unpack_to(mu);
      loaded_logvar.unpack_to(logvar);
    } else {
      read_run<V>(a.mu, i, at, D, a.count, mu);
      read_run<V>(a.logvar, i, at, D, a.count, logvar);
    }
    if constexpr (kPrior) q.read(a.prior, i, at, D, a.count, mu, logvar);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const ExpDifferences e = exp_differences(0.5f * logvar[j]);
      sd[j] = e.exp;
      if constexpr (kPrior)
        sd_less_1[j] = half_exp(q.u[j]).expm1;
      else
        sd_less_1[j] = e.expm1;
    }
  }

  int64_t before = (first_sample + own) * a.count;  // elements of z before this thread's sample
  float* result = a.result + first_sample * a.results + tile.first_row;
  float4* two_ratios = tile_vectors;
  for (int l = 0; l < samples; l += a.at_once) {
    if (has_run && l + own < samples) {
      float eps[V], z[V], two_ratio[V];
      if constexpr (kPlain)
        normals_of<V>(keys, before + i, eps);
      else
        normals<V>(a.seeds, before + i, static_cast<int>(tile.end - i < V ? tile.end - i : V), eps);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        z[j] = gaussian_sample(mu[j], sd[j], eps[j]);
        if constexpr (kPrior)
          two_ratio[j] = gaussian_two_log_ratio(q.d[j], q.u[j].value, sd_less_1[j], eps[j]);
        else
          two_ratio[j] = gaussian_two_log_ratio(mu[j], logvar[j], sd_less_1[j], eps[j]);
      }
      if constexpr (kPlain) {
        store<V>(z, a.z + before + i);
#pragma unroll
        for (int j = 0; j < V; j += 4)
          two_ratios[static_cast<unsigned>(own * n + k + j) / 4] =
              make_float4(two_ratio[j], two_ratio[j + 1], two_ratio[j + 2], two_ratio[j + 3]);
      } else {
        write_run<V>(z, a.z + before, i, tile.begin, tile.end, before % V == 0);
        float* to = reinterpret_cast<float*>(two_ratios) + own * n + k - (tile.begin - first);
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (i + j >= tile.begin && i + j < tile.end) to[j] = two_ratio[j];
      }
    }
    // One barrier a sample suffices: a thread here has read the other half, which the next sample overwrites.
    __syncthreads();
    const int rows = (a.at_once < samples - l ? a.at_once : samples - l) * tile.rows;
    sum_rows<kThreads>(reinterpret_cast<const float*>(two_ratios), rows, tile.columns, group_sum,
                       [&](int row, float sum) { result[row] = a.factor * sum; });
    before += a.at_once * a.count;
    result += a.at_once * a.results;
    two_ratios = two_ratios == tile_vectors ? tile_vectors + kTile<T> / 4 : tile_vectors;
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct BackwardArgs {
  Reader<T> mu, logvar, grad_z;  // [B, D], [B, D], [L, B, D]
  Divider D;
  int64_t B, L;
  Seeds seeds;
  const float *grad_log_ratio, *sample_weight;  // [L, B]
  bool path_only;
  T *grad_mu, *grad_logvar;  // [B, D]
  PriorArgs prior;
  const float* prior_grad;  // [L, B]
};

// Writes the gradients of the prior of the run at element i, whose samples' noise is computed once more. sd_slope [V]
// is that of gaussian_prior_gradient.
template <bool kManySamples, int V, class T>
AEVB_DEVICE void write_prior_gradient(const BackwardArgs<T>& a, int64_t i, Place at, unsigned row_ends,
                                      const Seen<V>& q, const RatioSlopes* slopes, const float* sd_slope) {
  const int64_t count = a.B * a.D.divisor();
  float prior_sd[V];
#pragma unroll
  for (int j = 0; j < V; ++j) prior_sd[j] = gaussian_sd(q.u[j]);
  SampleSums<V> sums;
  if (a.L > 0) {
    sum_samples<kManySamples>(a.L, sums, [&](int64_t begin, int64_t end, SampleSums<V>& block) {
      int64_t k = begin * count + i, row = begin * a.B + at.row;
      for (int64_t l = begin; l < end; ++l, k += count, row += a.B) {
        float eps[V];
        normals<V>(a.seeds, k, static_cast<int>(count - i < V ? count - i : V), eps);
        int64_t next = row;
        float g = a.prior_grad ? a.prior_grad[row] : 0.0f;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const PriorGradient found =
              gaussian_prior_gradient(q.d[j], prior_sd[j], slopes[j].mu, sd_slope[j], eps[j], g);
          block.mu[j] += found.mu;
          block.logvar[j] += found.two_logvar;
          if (row_ends >> j & 1u) {
            ++next;
            if (a.prior_grad) g = a.prior_grad[next];
          }
        }
      }
    });
  }
#pragma unroll
  for (int j = 0; j < V; ++j) sums.logvar[j] *= 0.5f;
  if (a.prior.grad_mu) write_run<V>(sums.mu, a.prior.grad_mu, i, 0, count, true);
  if (a.prior.grad_logvar) write_run<V>(sums.logvar, a.prior.grad_logvar, i, 0, count, true);
}

template <class T, bool kManySamples, bool kPlain, bool kPrior = false>
__global__ void __launch_bounds__(kThreads, kPrior           ? 1
                                            : sizeof(T) == 4 ? 3
                                                             : 2) log_ratio_gradient(const BackwardArgs<T> a) {
  constexpr int V = kWidest<T>;
  const int64_t D = a.D.divisor(), count = a.B * D;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (i >= count) return;
  const Place at = place_of(i, a.D);
  unsigned row_ends = 0;  // bit j: a row ends at element j of the run, and the run goes on in the next row
  if (D % V != 0) {
    int64_t column = at.column;
#pragma unroll
    for (int j = 0; j + 1 < V; ++j) {
      if (++column == D && i + j + 1 < count) {
        row_ends |= 1u << j;
        column = 0;
      }
    }
  }
  float mu[V], logvar[V], sd[V], slope[V];
  if constexpr (kPlain) {
    const Loaded<T, V> loaded_mu = load<V>(address(a.mu, i, at, D));
    load<V>(address(a.logvar, i, at, D)).unpack_to(logvar);
    loaded_mu.unpack_to(mu);
  } else {
    read_run<V>(a.mu, i, at, D, count, mu);
    read_run<V>(a.logvar, i, at, D, count, logvar);
  }
  [[maybe_unused]] Seen<kPrior ? V : 1> q;
  [[maybe_unused]] float given[V], prior_sd_slope[V];
  [[maybe_unused]] RatioSlopes slopes[V];
  if constexpr (kPrior) {
#pragma unroll
    for (int j = 0; j < V; ++j) given[j] = logvar[j];
    q.read(a.prior, i, at, D, count, mu, logvar);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sd[j] = gaussian_sd(logvar[j]);
      slopes[j] = gaussian_ratio_slopes(logvar[j], q.d[j], q.u[j], q.inverse_sd[j], false);
      prior_sd_slope[j] = slopes[j].slope;
    }
    if (a.path_only) {
#pragma unroll
      for (int j = 0; j < V; ++j) slopes[j] = gaussian_ratio_slopes(logvar[j], q.d[j], q.u[j], q.inverse_sd[j], true);
    }
    if (!a.prior.mu.data) {
#pragma unroll
      for (int j = 0; j < V; ++j) slopes[j].slope = gaussian_ratio_slope(logvar[j], a.path_only);
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sd[j] = gaussian_sd(logvar[j]);
      slope[j] = gaussian_ratio_slope(logvar[j], false);
    }
  }
  if (!kPrior && a.path_only) {  // one branch for the run, not one for each element
#pragma unroll
    for (int j = 0; j < V; ++j) slope[j] = gaussian_ratio_slope(logvar[j], true);
  }

  SampleSums<V> sums;
  if (a.L > 0) {
    const PhiloxKeys keys = philox_keys(static_cast<uint64_t>(*a.seeds.seeds));
    sum_samples<kManySamples>(a.L, sums, [&](int64_t begin, int64_t end, SampleSums<V>& block) {
      int64_t k = begin * count + i, row = begin * a.B + at.row;
      int64_t run = row * a.grad_z.stride + at.column;  // the run's beginning in grad_z
      for (int64_t l = begin; l < end; ++l, k += count, row += a.B, run += a.B * a.grad_z.stride) {
        float grad_z[V] = {}, eps[V];
        if constexpr (kPlain) {
          if (a.grad_z.data) load<V>(a.grad_z.data + run).unpack_to(grad_z);
        } else if (a.grad_z.data) {
          Reader<T> reader = a.grad_z;
          reader.in_runs = reader.in_runs && k % V == 0;
          read_run<V>(reader, k, {row, at.column}, D, a.L * count, grad_z);
        }
        float g = a.grad_log_ratio ? a.grad_log_ratio[row] : 0.0f;
        float weight = a.sample_weight ? a.sample_weight[row] : 1.0f;
        if constexpr (kPlain)
          normals_of<V>(keys, k, eps);
        else
          normals<V>(a.seeds, k, static_cast<int>(count - i < V ? count - i : V), eps);
        const auto add = [&](int j) {
          RatioGradient found;
          if (kPrior && a.prior.mu.data)
            found = gaussian_ratio_gradient(slopes[j], sd[j], eps[j], weight * grad_z[j], g, a.path_only);
          else
            found = gaussian_ratio_gradient(mu[j], sd[j], kPrior ? slopes[j].slope : slope[j], eps[j],
                                            weight * grad_z[j], g, a.path_only);
          block.mu[j] += found.z;
          block.logvar[j] += found.two_logvar;
        };
        if (D % V == 0) {  // the run lies in one row
#pragma unroll
          for (int j = 0; j < V; ++j) add(j);
          continue;
        }
        int64_t next = row;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          add(j);
          if (row_ends >> j & 1u) {
            ++next;
            if (a.grad_log_ratio) g = a.grad_log_ratio[next];
            if (a.sample_weight) weight = a.sample_weight[next];
          }
        }
      }
    });
  }
#pragma unroll
  for (int j = 0; j < V; ++j) sums.logvar[j] *= 0.5f;
  if constexpr (kPrior) {
    if (a.prior.clamps) {
#pragma unroll
      for (int j = 0; j < V; ++j) sums.logvar[j] = clamped_gradient(given[j], a.prior.min, a.prior.max, sums.logvar[j]);
    }
    if (a.prior.grad_mu || a.prior.grad_logvar)
      write_prior_gradient<kManySamples>(a, i, at, row_ends, q, slopes, prior_sd_slope);
  }
  if constexpr (kPlain) {
    store<V>(sums.mu, a.grad_mu + i);
    store<V>(sums.logvar, a.grad_logvar + i);
  } else {
    write_run<V>(sums.mu, a.grad_mu, i, 0, count, true);
    write_run<V>(sums.logvar, a.grad_logvar, i, 0, count, true);
  }
}

// ---- kernel selection -----------------------------------------------------------------------------------------------

struct Tiles {
  int64_t rows, parts, part;  // rows of a tile, parts of a row, elements of a part
  int64_t number, runs, at_once;
};

Tiles tiles_of(const GaussianArgs& a) {
  const int64_t V = 16 / size_of(a.mu.dtype), most = kThreads * V;
  const int64_t tile = a.D % V == 0 ? most : most - V;  // with room for a run that begins before the tile
  if (a.D > tile) {
    int64_t part = kGroup;
    while (2 * part <= tile) part *= 2;
    const int64_t parts = (a.D + part - 1) / part;
    return {1, parts, part, a.B * parts, kThreads, 1};
  }
  int64_t step = V;  // a tile's rows are a multiple of it, so that tiles begin where runs begin
  while (step > 1 && a.D * (step / 2) % V == 0) step /= 2;
  int64_t rows = tile / a.D;
  if (rows > step) rows -= rows % step;
  // Tiles of about equal size, as few as the largest size allows. So only a single tile can leave half the threads
  // idle.
  const int64_t number = (a.B + rows - 1) / rows, equal = ((a.B + number - 1) / number + step - 1) / step * step;
  if (equal < rows) rows = equal;
  const int64_t runs = (a.B * a.D + V - 1) / V;
  return {rows, 1, 0, (a.B + rows - 1) / rows, runs, a.B <= rows && 2 * runs <= kThreads ? kThreads / runs : 1};
}

}  // namespace

int64_t gaussian_log_ratio_scratch(const GaussianArgs& a, int) {
  if (a.L * a.B * a.D == 0) return 0;
  const int64_t parts = tiles_of(a).parts;
  return parts > 1 ? a.L * a.B * parts : 0;
}

const char* gaussian_log_ratio(const GaussianArgs& a, int multiprocessors, float* scratch, void* stream) {
  if (a.L * a.B == 0) return nullptr;
  if (a.D == 0) return join(nullptr, a.L * a.B, 0, 0.5f, a.log_ratio, stream);
  const Tiles tiles = tiles_of(a);
  const bool cut = tiles.parts > 1;
  const int64_t at_once = tiles.at_once < a.L ? tiles.at_once : a.L;
  // Samples are shared between blocks where tiles are too few to fill the GPU.
  constexpr int64_t kMostSamples = int64_t{1} << 30;
  int64_t samples = a.L < kMostSamples ? a.L : kMostSamples;
  while (samples >= 4 * at_once &&
         tiles.number * ((a.L + samples - 1) / samples) < 4 * static_cast<int64_t>(multiprocessors))
    samples = (samples + 1) / 2;
  samples = (samples + at_once - 1) / at_once * at_once;
  const int64_t shares = (a.L + samples - 1) / samples;
  const char* error = with_dtype(a.mu.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int V = kWidest<T>;
    const ForwardArgs<T> args{reader_of<T>(a.mu, a.D),
                              reader_of<T>(a.logvar, a.D),
                              a.mu.stride != a.D || a.logvar.stride != a.D || a.prior_mu.data,
                              {Divider(a.D), Divider(tiles.parts), a.B, tiles.rows, tiles.part},
                              Divider(tiles.number),
                              static_cast<int>(samples),
                              static_cast<int>(at_once),
                              Divider(tiles.runs),
                              a.L,
                              a.B * a.D,
                              a.B * tiles.parts,
                              seeds_of(a.seeds, a.seed_block, a.L * a.B * a.D),
                              static_cast<T*>(a.z),
                              cut ? scratch : a.log_ratio,
                              cut ? 1.0f : 0.5f,
                              prior_of<V>(a)};
    const bool plain = args.mu.in_runs && args.logvar.in_runs && (a.B * a.D) % V == 0 && args.seeds.one &&
                       (cut ? a.D : tiles.rows * a.D) % V == 0;
    const unsigned grid = blocks(tiles.number * shares, 1);
    const auto on = static_cast<cudaStream_t>(stream);
    if (has_prior_args(a))
      AEVB_LAUNCH((log_ratio_tile<T, false, true>), grid, kThreads, on, args);
    else
      with_bool(plain,
                [&](auto is_plain) { AEVB_LAUNCH((log_ratio_tile<T, is_plain.value>), grid, kThreads, on, args); });
    return status();
  });
  if (error || !cut) return error;
  return join(scratch, a.L * a.B, tiles.parts, 0.5f, a.log_ratio, stream);
}

const char* gaussian_log_ratio_backward(const GaussianArgs& a, void* stream) {
  const int64_t count = a.B * a.D;
  if (count == 0) return nullptr;
  return with_dtype(a.mu.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int V = kWidest<T>;
    const BackwardArgs<T> args{reader_of<T>(a.mu, a.D),
                               reader_of<T>(a.logvar, a.D),
                               reader_of<T>(a.grad_z, a.D),
                               Divider(a.D),
                               a.B,
                               a.L,
                               seeds_of(a.seeds, a.seed_block, a.L * count),
                               a.grad_log_ratio,
                               a.sample_weight,
                               a.path_only,
                               static_cast<T*>(a.grad_mu),
                               static_cast<T*>(a.grad_logvar),
                               prior_of<V>(a),
                               a.prior_grad};
    const bool plain = args.mu.in_runs && args.logvar.in_runs && (!a.grad_z.data || args.grad_z.in_runs) &&
                       count % V == 0 && args.seeds.one;
    with_bool(a.L >= kSampleBlock, [&](auto many) {
      if (has_prior_args(a)) {
        AEVB_LAUNCH((log_ratio_gradient<T, many.value, false, true>), blocks(count, kThreads * V), kThreads,
                    static_cast<cudaStream_t>(stream), args);
        return;
      }
      with_bool(plain, [&](auto is_plain) {
        AEVB_LAUNCH((log_ratio_gradient<T, many.value, is_plain.value>), blocks(count, kThreads * V), kThreads,
                    static_cast<cudaStream_t>(stream), args);
      });
    });
    return status();
  });
}

}  // namespace aevb::cuda

// SPDX-License-Identifier: Apache-2.0
// The reparameterised sample and the Gaussian KL, their gradients, and the noise itself.
#include "gaussian.cuh"
#include "launchers.h"
#include "sums.cuh"

namespace aevb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 4;  // resident blocks of a multiprocessor: 64 registers a thread
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1000
constexpr int kResidentHalf = 3;  // half precision needs more than 64 registers on sm_100
#else
constexpr int kResidentHalf = 4;
#endif
constexpr int kTile = 4096;       // elements of a tile: whole rows, or a part of one long row
constexpr int kSmallTile = 1024;  // elements of a tile where tiles of kTile would be too few to fill the GPU

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardArgs {
  Reader<T> mu, logvar;  // [B, D]
  bool by_rows;          // rows of mu or logvar are not adjacent
  Cut cut;
  Divider tiles;  // number of tiles; block s * tiles + t takes share s, `samples` samples, of tile t
  bool shared;    // samples are shared between blocks: there is more than one share
  int samples;
  int64_t L;
  Seeds seeds;
  T* z;           // [L, B, D]
  float* result;  // [B]: the KL; or [B, parts]: twice the KL of each part
  float factor;
  PriorArgs prior;
};

template <class T, bool kSample, bool kPlain, bool kPrior = false>
__global__ void __launch_bounds__(kThreads, kPrior           ? 2
                                            : sizeof(T) == 4 ? kResident
                                                             : kResidentHalf) gaussian_tile(const ForwardArgs<T> a) {
  constexpr int V = kWidest<T>;
  AEVB_SHARED(float4, tile_vectors, kTile / 4 + V / 2);  // twice the KL of each element
  AEVB_SHARED(float, group_sum, 2 * kTile / kGroup);
  const int64_t D = a.cut.D.divisor(), count = a.cut.B * D;
  const int64_t share = a.shared ? a.tiles.divide(blockIdx.x) : 0, first_sample = share * a.samples;
  const int64_t number = blockIdx.x - (a.shared ? share * a.tiles.divisor() : 0);
  const int samples = static_cast<int>(first_sample + a.samples < a.L ? a.samples : a.L - first_sample);
  const Tile tile = tile_of(a.cut, number);
  const int64_t first = tile.begin / V * V;  // beginning of the first run; tile.begin itself with kPlain

  const auto to_tile = [&](int k, const float* two_kl) {
#pragma unroll
    for (int j = 0; j < V; j += 4)
      tile_vectors[static_cast<unsigned>(k + j) / 4] =
          make_float4(two_kl[j], two_kl[j + 1], two_kl[j + 2], two_kl[j + 3]);
  };
  float mu[V], logvar[V], sd[V], two_kl[V], eps[V], z[V];
  [[maybe_unused]] Seen<kPrior ? V : 1> q;
  const auto latent = [&] {
    if constexpr (kPrior) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sd[j] = gaussian_sd(logvar[j]);
        two_kl[j] = gaussian_two_kl(q.d[j], q.u[j]);
      }
      return;
    }
    const auto of_all = [&](auto range) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sd[j] = gaussian_sd<range.value>(logvar[j]);
        two_kl[j] = gaussian_two_kl<range.value>(mu[j], logvar[j]);
      }
    };
    if constexpr (kSample)  // the noise takes the registers, and the time
      of_all(RangeConstant<Range::any>{});
    else
      with_range<V>(logvar, of_all);
  };
  const auto sample = [&] {
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] = gaussian_sample(mu[j], sd[j], eps[j]);
  };

  if constexpr (kPlain) {
    constexpr int kAtOnce = sizeof(T) == 4 ? 2 : 1;  // two runs of 4 elements, or one of 8, as registers allow
    const PhiloxKeys keys = philox_keys(static_cast<uint64_t>(kSample ? *a.seeds.seeds : 0));
    const int n = tile.rows * tile.columns;
    for (int k0 = threadIdx.x * V; k0 < n; k0 += kAtOnce * kThreads * V) {
      Loaded<T, V> loaded_mu[kAtOnce], loaded_logvar[kAtOnce];  // both in flight before the first is used
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int k = k0 + r * kThreads * V;
        if (k >= n) break;
        const T *mu_run = a.mu.data + first + k, *logvar_run = a.logvar.data + first + k;
        if (a.by_rows) {
          const Place at = place_of(first + k, a.cut.D);
          mu_run = a.mu.data + at.row * a.mu.stride + at.column;
          logvar_run = a.logvar.data + at.row * a.logvar.stride + at.column;
        }
        loaded_mu[r] = load<V>(mu_run);
        loaded_logvar[r] = load<V>(logvar_run);
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int k = k0 + r * kThreads * V;
        if (k >= n) break;
        loaded_mu[r].unpack_to(mu);
        loaded_logvar[r].unpack_to(logvar);
        latent();
        to_tile(k, two_kl);
        if constexpr (kSample) {
          int64_t at = first_sample * count + first + k;  // the run's beginning in z
          for (int l = 0; l < samples; ++l, at += count) {
            normals_of<V>(keys, at, eps);
            sample();
            store<V>(z, a.z + at);
          }
        }
      }
    }
  } else {
    for (int64_t i = first + threadIdx.x * V; i < tile.end; i += kThreads * V) {
      const Place at = a.by_rows ? place_of(i, a.cut.D) : Place{};
      read_run<V>(a.mu, i, at, D, count, mu);
      read_run<V>(a.logvar, i, at, D, count, logvar);
      if constexpr (kPrior) q.read(a.prior, i, at, D, count, mu, logvar);
      latent();
      to_tile(static_cast<int>(i - first), two_kl);
      if constexpr (kSample) {
        for (int l = 0; l < samples; ++l) {
          const int64_t before = (first_sample + l) * count;
          normals<V>(a.seeds, before + i, static_cast<int>(tile.end - i < V ? tile.end - i : V), eps);
          sample();
          write_run<V>(z, a.z + before, i, tile.begin, tile.end, before % V == 0);
        }
      }
    }
  }
  if (share > 0) return;  // all threads of the block; share 0 has the KL
  __syncthreads();
  sum_rows<kThreads>(reinterpret_cast<const float*>(tile_vectors) + (tile.begin - first), tile.rows, tile.columns,
                     group_sum, [&](int row, float sum) { a.result[tile.first_row + row] = a.factor * sum; });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct BackwardArgs {
  Reader<T> mu, logvar, grad_z;  // [B, D], [B, D], [L, B, D]
  bool by_rows;                  // an element's row must be known, for strides, or a gradient of each row's KL
  Divider D;
  int64_t B, L;
  Seeds seeds;
  const float *grad_kl, *beta;  // [B] or [1], []
  int64_t grad_kl_stride;
  float grad_kl_scale;
  T *grad_mu, *grad_logvar;  // [B, D]
  PriorArgs prior;
};

// Adds samples [first, last) of the run at element i to its sums of grad_z and of grad_z eps.
template <bool kPlain, int V, class T>
AEVB_DEVICE void add_samples(const BackwardArgs<T>& a, const PhiloxKeys& keys, int64_t i, int64_t count, int64_t first,
                             int64_t last, SampleSums<V>& sums) {
  const int64_t D = a.D.divisor();
  for (int64_t l = first; l < last; ++l) {
    float grad_z[V], eps[V];
    const int64_t at = l * count + i;
    const Place place = a.grad_z.stride == D ? Place{} : place_of(at, a.D);
    if constexpr (kPlain) {
      load<V>(address(a.grad_z, at, place, D)).unpack_to(grad_z);
      normals_of<V>(keys, at, eps);
    } else {
      Reader<T> reader = a.grad_z;
      reader.in_runs = reader.in_runs && at % V == 0;
      read_run<V>(reader, at, place, D, a.L * count, grad_z);
      normals<V>(a.seeds, at, static_cast<int>(count - i < V ? count - i : V), eps);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sums.logvar[j] = fmadd(grad_z[j], eps[j], sums.logvar[j]);
      sums.mu[j] += grad_z[j];
    }
  }
}

template <class T, bool kManySamples, bool kPlain, bool kPrior = false>
__global__ void __launch_bounds__(kThreads, kPrior                          ? 2
                                            : kManySamples && sizeof(T) < 4 ? 2
                                                                            : kResident)
    gaussian_gradient(const BackwardArgs<T> a) {
  constexpr int V = kWidest<T>;
  const int64_t D = a.D.divisor(), count = a.B * D;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (i >= count) return;
  Place at = a.by_rows ? place_of(i, a.D) : Place{};
  const bool through_z = a.grad_z.data && a.L > 0, through_kl = a.grad_kl;
  float mu[V] = {}, logvar[V], grad_mu[V], grad_logvar[V];
  Loaded<T, V> mu_run, logvar_run;  // in flight while the samples are added
  if constexpr (kPlain) {
    logvar_run = load<V>(address(a.logvar, i, at, D));
    if (through_kl) mu_run = load<V>(address(a.mu, i, at, D));
  }
  SampleSums<V> sums;
  if (through_z) {
    const PhiloxKeys keys = philox_keys(static_cast<uint64_t>(*a.seeds.seeds));
    sum_samples<kManySamples>(a.L, sums, [&](int64_t first, int64_t last, SampleSums<V>& block) {
      add_samples<kPlain>(a, keys, i, count, first, last, block);
    });
  }
  if constexpr (kPlain) {
    logvar_run.unpack_to(logvar);
    if (through_kl) mu_run.unpack_to(mu);
  } else {
    read_run<V>(a.logvar, i, at, D, count, logvar);
    if (through_kl) read_run<V>(a.mu, i, at, D, count, mu);
  }
  [[maybe_unused]] Seen<kPrior ? V : 1> q;
  [[maybe_unused]] float given[V], prior_mu[V] = {}, prior_logvar[V] = {};  // logvar, and gradients of the prior
  if constexpr (kPrior) {
#pragma unroll
    for (int j = 0; j < V; ++j) given[j] = logvar[j];
    q.read(a.prior, i, at, D, count, mu, logvar);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    grad_mu[j] = sums.mu[j];
    grad_logvar[j] = through_z ? gaussian_sample_grad_logvar(logvar[j], sums.logvar[j]) : 0.0f;
  }
  if (through_kl) {
    const float scale = a.beta ? a.grad_kl_scale * *a.beta : a.grad_kl_scale;
    float g = scale * a.grad_kl[at.row * a.grad_kl_stride];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float kl_grad_mu = mu[j], kl_grad_logvar;
      if constexpr (kPrior) {
        kl_grad_mu = times(q.d[j], q.inverse_sd[j]);
        kl_grad_logvar = gaussian_kl_grad_logvar(q.u[j]);
        prior_mu[j] = -(g * kl_grad_mu);
        prior_logvar[j] = g * gaussian_kl_grad_prior_logvar(q.d[j], q.u[j]);
      } else {
        kl_grad_logvar = gaussian_kl_grad_logvar(logvar[j]);
      }
      grad_mu[j] = through_z ? fmadd(g, kl_grad_mu, grad_mu[j]) : g * kl_grad_mu;
      grad_logvar[j] = through_z ? fmadd(g, kl_grad_logvar, grad_logvar[j]) : g * kl_grad_logvar;
      if (a.by_rows && ++at.column == D && j + 1 < V && i + j + 1 < count) {
        at.column = 0;
        g = scale * a.grad_kl[++at.row * a.grad_kl_stride];
      }
    }
  }
  if constexpr (kPrior) {
    if (a.prior.clamps) {
#pragma unroll
      for (int j = 0; j < V; ++j) grad_logvar[j] = clamped_gradient(given[j], a.prior.min, a.prior.max, grad_logvar[j]);
    }
    if (a.prior.grad_mu) write_run<V>(prior_mu, a.prior.grad_mu, i, 0, count, true);
    if (a.prior.grad_logvar) write_run<V>(prior_logvar, a.prior.grad_logvar, i, 0, count, true);
  }
  if constexpr (kPlain) {
    store<V>(grad_mu, a.grad_mu + i);
    store<V>(grad_logvar, a.grad_logvar + i);
  } else {
    write_run<V>(grad_mu, a.grad_mu, i, 0, count, true);
    write_run<V>(grad_logvar, a.grad_logvar, i, 0, count, true);
  }
}

// ---- noise ----------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) normal_runs(const Seeds seeds, int64_t count, float* __restrict__ eps) {
  constexpr int V = kWidest<float>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (i >= count) return;
  float x[V];
  normals<V>(seeds, i, static_cast<int>(count - i < V ? count - i : V), x);
  write_run<V>(x, eps, i, 0, count, true);
}

__global__ void __launch_bounds__(kThreads) mix_seeds(const MixSeedArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < a.n)
    a.mixed[i] =
        static_cast<int64_t>(aevb::mix_seed(static_cast<uint64_t>(a.seed[i]), static_cast<uint64_t>(a.index[i])));
}

// ---- kernel selection -----------------------------------------------------------------------------------------------

struct Tiles {
  int64_t rows, parts, part;  // rows of a tile, parts of a row, elements of a part
};
Tiles tiles_of(const GaussianArgs& a, int multiprocessors) {
  const int64_t tile = a.B * a.D >= 4 * static_cast<int64_t>(multiprocessors) * kTile ? kTile : kSmallTile;
  if (a.D > kTile) return {1, (a.D + tile - 1) / tile, tile};
  int64_t rows = tile / a.D;
  if (rows > 8) rows &= ~int64_t{7};  // so that tiles begin where runs begin
  return {rows > 0 ? rows : 1, 1, 0};
}

}  // namespace

int64_t gaussian_scratch(const GaussianArgs& a, int multiprocessors) {
  return a.D > kTile ? a.B * tiles_of(a, multiprocessors).parts : 0;
}

const char* gaussian(const GaussianArgs& a, int multiprocessors, float* scratch, void* stream) {
  if (a.B == 0) return nullptr;
  if (a.D == 0) return join(nullptr, a.B, 0, 0.5f, a.kl, stream);
  const Tiles tiles = tiles_of(a, multiprocessors);
  const bool cut = tiles.parts > 1;
  const int64_t number = cut ? a.B * tiles.parts : (a.B + tiles.rows - 1) / tiles.rows;
  // Samples are shared between blocks where tiles are too few to fill the GPU. A full share has at least kFewest
  // samples, to be worth another read of mu and logvar.
  constexpr int64_t kFewest = 8, kMostSamples = int64_t{1} << 30;
  const bool sampling = a.z && a.L > 0;
  int64_t samples = a.L < kMostSamples ? a.L : kMostSamples;
  while (samples >= 2 * kFewest && number * ((a.L + samples - 1) / samples) < 4 * static_cast<int64_t>(multiprocessors))
    samples = (samples + 1) / 2;
  const int64_t shares = sampling ? (a.L + samples - 1) / samples : 1;
  const char* error = with_dtype(a.mu.dtype, [&](auto t) {
    using T = decltype(t);
    const ForwardArgs<T> args{reader_of<T>(a.mu, a.D),
                              reader_of<T>(a.logvar, a.D),
                              a.mu.stride != a.D || a.logvar.stride != a.D || a.prior_mu.data,
                              {Divider(a.D), Divider(tiles.parts), a.B, tiles.rows, tiles.part},
                              Divider(number),
                              shares > 1,
                              static_cast<int>(samples),
                              a.L,
                              seeds_of(a.seeds, a.seed_block, a.L * a.B * a.D),
                              static_cast<T*>(a.z),
                              cut ? scratch : a.kl,
                              cut ? 1.0f : 0.5f,
                              prior_of<kWidest<T>>(a)};
    constexpr int V = kWidest<T>;
    const bool plain = args.mu.in_runs && args.logvar.in_runs && (a.B * a.D) % V == 0 && args.seeds.one &&
                       (cut ? a.D : tiles.rows * a.D) % V == 0;
    const unsigned grid = blocks(number * shares, 1);
    const auto on = static_cast<cudaStream_t>(stream);
    with_bool(sampling, [&](auto sample) {
      if (has_prior_args(a)) {
        AEVB_LAUNCH((gaussian_tile<T, sample.value, false, true>), grid, kThreads, on, args);
        return;
      }
      with_bool(plain, [&](auto is_plain) {
        AEVB_LAUNCH((gaussian_tile<T, sample.value, is_plain.value>), grid, kThreads, on, args);
      });
    });
    return status();
  });
  if (error || !cut) return error;
  return join(scratch, a.B, tiles.parts, 0.5f, a.kl, stream);
}

const char* gaussian_backward(const GaussianArgs& a, void* stream) {
  const int64_t count = a.B * a.D;
  if (count == 0) return nullptr;
  return with_dtype(a.mu.dtype, [&](auto t) {
    using T = decltype(t);
    const BackwardArgs<T> args{
        reader_of<T>(a.mu, a.D),
        reader_of<T>(a.logvar, a.D),
        reader_of<T>(a.grad_z, a.D),
        a.mu.stride != a.D || a.logvar.stride != a.D || a.prior_mu.data || (a.grad_kl && a.grad_kl_stride),
        Divider(a.D),
        a.B,
        a.L,
        seeds_of(a.seeds, a.seed_block, a.L * count),
        a.grad_kl,
        a.beta,
        a.grad_kl_stride,
        a.grad_kl_scale,
        static_cast<T*>(a.grad_mu),
        static_cast<T*>(a.grad_logvar),
        prior_of<kWidest<T>>(a)};
    const bool plain = args.mu.in_runs && args.logvar.in_runs && (!a.grad_z.data || args.grad_z.in_runs) &&
                       count % kWidest<T> == 0 && args.seeds.one;
    const unsigned grid = blocks(count, kThreads * kWidest<T>);
    const auto on = static_cast<cudaStream_t>(stream);
    with_bool(a.L >= kSampleBlock, [&](auto many) {
      if (has_prior_args(a)) {
        AEVB_LAUNCH((gaussian_gradient<T, many.value, false, true>), grid, kThreads, on, args);
        return;
      }
      with_bool(plain, [&](auto is_plain) {
        AEVB_LAUNCH((gaussian_gradient<T, many.value, is_plain.value>), grid, kThreads, on, args);
      });
    });
    return status();
  });
}

const char* normal(const NormalArgs& a, void* stream) {
  const int64_t count = a.blocks * a.n;
  if (count == 0) return nullptr;
  AEVB_LAUNCH(normal_runs, blocks(count, kThreads * kWidest<float>), kThreads, static_cast<cudaStream_t>(stream),
              seeds_of(a.seeds, a.n, count), count, a.eps);
  return status();
}

const char* mix_seed(const MixSeedArgs& a, void* stream) {
  if (a.n == 0) return nullptr;
  AEVB_LAUNCH(mix_seeds, blocks(a.n, kThreads), kThreads, static_cast<cudaStream_t>(stream), a);
  return status();
}

}  // namespace aevb::cuda

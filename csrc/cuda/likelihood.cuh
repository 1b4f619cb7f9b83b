// SPDX-License-Identifier: Apache-2.0
// log p(x|z) over rows of decoder outputs, and its gradient, for any likelihood of formulas/: the kernels, and what
// launches them for a file that says with which types.
#pragma once
#include <algorithm>

#include "../formulas/likelihood.h"
#include "division.h"
#include "launch.h"
#include "launching.h"
#include "sums.cuh"
#include "vectors.cuh"

namespace aevb::cuda {
namespace {

constexpr int kThreads = 256;

// Elements whose dtype is known only at run time, read one by one: the kernels for every dtype of output, of logvar and
// of x would be many, and mostly unused.
struct AnyDtype {};

// Rows beside the output: x, or logvar.
template <class T>
struct Beside {
  static constexpr bool kAtRunTime = false;
  const T* data;
  int64_t stride;
  template <int V>
  AEVB_DEVICE Loaded<T, V> load_at(int64_t i) const {
    return load<V>(data + i);
  }
};

template <int V>
struct LoadedAny {
  float x[V];
  AEVB_DEVICE void unpack_to(float* out) const {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = x[i];
  }
};

template <>
struct Beside<AnyDtype> {
  static constexpr bool kAtRunTime = true;
  const void* data;
  int64_t stride;
  Dtype dtype;
  template <int V>
  AEVB_DEVICE LoadedAny<V> load_at(int64_t i) const {
    LoadedAny<V> r;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      switch (dtype) {
        case Dtype::float32: r.x[k] = load_one(static_cast<const float*>(data) + i + k); break;
        case Dtype::bfloat16: r.x[k] = load_one(static_cast<const BFloat16*>(data) + i + k); break;
        case Dtype::float16: r.x[k] = load_one(static_cast<const Float16*>(data) + i + k); break;
        default: r.x[k] = load_one(static_cast<const uint8_t*>(data) + i + k);  // dtype_of gives no other
      }
    }
    return r;
  }
};

// logvar [R, D] of likelihoods with kLogvar, and its gradient; nothing of others.
template <bool kLogvar, class T>
struct Logvars {
  static constexpr int64_t stride = 0;
  template <int V>
  AEVB_DEVICE LoadedAny<V> load_at(int64_t) const {
    return {};
  }
  template <int V>
  AEVB_DEVICE void store_grad(const float*, int64_t) const {}
};

template <class T>
struct Logvars<true, T> : Beside<T> {
  T* grad;  // [R, D], or null
  template <int V>
  AEVB_DEVICE void store_grad(const float* x, int64_t i) const {
    if (grad) store<V>(x, grad + i);
  }
};

template <>
struct Logvars<true, AnyDtype> : Beside<AnyDtype> {
  void* grad;
  template <int V>
  AEVB_DEVICE void store_grad(const float* x, int64_t i) const {
    if (!grad) return;
    switch (dtype) {
      case Dtype::bfloat16: store<V>(x, static_cast<BFloat16*>(grad) + i); break;
      case Dtype::float16: store<V>(x, static_cast<Float16*>(grad) + i); break;
      default: store<V>(x, static_cast<float*>(grad) + i);  // no logvar is uint8
    }
  }
};

// Where the dtype of x is known at compile time, logvar's is that of the output.
template <class T, class X>
struct LogvarType {
  using Type = T;
};
template <class T>
struct LogvarType<T, AnyDtype> {
  using Type = AnyDtype;
};
template <class L, class T, class X>
using LogvarsOf = Logvars<L::kLogvar, typename LogvarType<T, X>::Type>;

// V neighbouring elements, and the gradients of which likelihoods with kLogvar give two.
template <int V>
struct Gradients {
  float output[V], logvar[V];
};

template <class L, int V>
AEVB_DEVICE void gradients_of(const L& likelihood, const float* out, const float* logvar, const float* target,
                              float upstream, float scale, Gradients<V>& grad) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const LikelihoodGradient g = likelihood.grad(out[i], logvar[i], target[i]);
    grad.output[i] = upstream * (scale * g.output);
    if constexpr (L::kLogvar) grad.logvar[i] = upstream * (scale * g.logvar);
  }
}

// ---- log p, and with it the gradient where that is asked for --------------------------------------------------------

template <class L, class T, class X>
struct ForwardArgs {
  L likelihood;
  const T* output;  // [R, D]
  int64_t output_stride;
  LogvarsOf<L, T, X> logvar;
  Beside<X> x;  // [x_rows, D]
  Divider x_rows, parts;
  int64_t units, D, part_elements;  // a row is cut into `parts` parts; R * parts units
  float sign;
  float* result;  // [R, parts]
  // Of the kernels with kGrad:
  const float* grad;
  int64_t grad_sample_stride, grad_stride;
  float grad_scale;
  T* grad_output;  // [R, D]; may be `output`; with kLogvar may be null
};

// Blocks on a multiprocessor at once, as registers allow: 128 a thread, 80, or 64; from sm_100 on it takes more of
// them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class L, bool kGrad, int V>
constexpr int kResident = L::kLogvar                         ? (kGrad && V > 4 ? 1 : 2)
                          : V > 4 || (kGrad && !L::kProduct) ? 2
                                                             : 3;
#else
template <class L, bool kGrad, int V>
constexpr int kResident = V > 4 || (kGrad && !L::kProduct) ? 2
                          : V > 2 || L::kLogvar            ? 3
                                                           : 4;
#endif

// kLanes / V threads share a unit: each adds up V neighbouring lanes of every group.
template <class L, bool kGrad, int V, class T, class X>
__global__ void __launch_bounds__(kThreads, kResident<L, kGrad, V>) log_prob_rows(const ForwardArgs<L, T, X> a) {
  constexpr int kSharing = kLanes / V;
  constexpr int kAtOnce = Beside<X>::kAtRunTime ? 1 : (V > 4 || L::kLogvar ? 2 : 4);  // vectors under way
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kSharing;
  if (unit >= a.units) return;
  const int t = threadIdx.x % kSharing;
  const unsigned sharing = (kSharing == kWarp ? ~0u : (1u << (kSharing % kWarp)) - 1u)
                           << (threadIdx.x % kWarp / kSharing * kSharing);
  const int64_t row = a.parts.divide(unit), sample = a.x_rows.divide(row), x_row = row - sample * a.x_rows.divisor();
  const int64_t begin = (unit - row * a.parts.divisor()) * a.part_elements;
  const int64_t end = begin + a.part_elements < a.D ? begin + a.part_elements : a.D;
  float upstream = 1.0f;
  if (kGrad && a.grad) upstream = a.grad[sample * a.grad_sample_stride + x_row * a.grad_stride];
  TreeSum<7> sum;
  for (int64_t first = begin; first < end; first += kGroup) {
    const int n = static_cast<int>(end - first < kGroup ? end - first : kGroup);
    const T* output = a.output + row * a.output_stride + first + t * V;
    int64_t x = x_row * a.x.stride + first + t * V, logvar = row * a.logvar.stride + first + t * V;
    int64_t grad = row * a.D + first + t * V;
    int k = 0;
    float linear[V] = {}, product[V] = {};
    const auto add = [&](const auto& loaded_output, const auto& loaded_logvar, const auto& loaded_x, int64_t grad_at) {
      float out[V], log_variance[V], target[V];
      loaded_output.unpack_to(out);
      loaded_logvar.unpack_to(log_variance);
      loaded_x.unpack_to(target);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const NegLogProb p = a.likelihood.add_neg_log_prob(linear[i], out[i], log_variance[i], target[i]);
        linear[i] = p.sum;
        // (1 + product) (1 + excess) - 1
        if constexpr (L::kProduct) product[i] = fmadd(product[i], p.excess, product[i] + p.excess);
      }
      if constexpr (kGrad) {
        Gradients<V> g;
        gradients_of(a.likelihood, out, log_variance, target, upstream, a.grad_scale, g);
        if (!L::kLogvar || a.grad_output) store<V>(g.output, a.grad_output + grad_at);
        a.logvar.template store_grad<V>(g.logvar, grad_at);
      }
    };
    const auto go_on = [&](int elements) {
      k += elements;
      output += elements;
      logvar += elements;
      x += elements;
      grad += elements;
    };
    for (; k + kAtOnce * kLanes <= n; go_on(kAtOnce * kLanes)) {
      decltype(load<V>(output)) loaded_output[kAtOnce];
      decltype(a.logvar.template load_at<V>(0)) loaded_logvar[kAtOnce];
      decltype(a.x.template load_at<V>(0)) loaded_x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        loaded_output[j] = load<V>(output + j * kLanes);
        loaded_logvar[j] = a.logvar.template load_at<V>(logvar + j * kLanes);
        loaded_x[j] = a.x.template load_at<V>(x + j * kLanes);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) add(loaded_output[j], loaded_logvar[j], loaded_x[j], grad + j * kLanes);
    }
    for (; k + t * V < n; go_on(kLanes))  // n is a multiple of V
      add(load<V>(output), a.logvar.template load_at<V>(logvar), a.x.template load_at<V>(x), grad);
    if constexpr (L::kProduct) {
#pragma unroll
      for (int i = 0; i < V; ++i) linear[i] += log1p_nonnegative(product[i]);
    }
    sum.add(fold_neighbours<V>(linear, sharing));
  }
  if (t == 0) a.result[unit] = a.sign * sum.total();
}

// ---- the gradient alone ---------------------------------------------------------------------------------------------

template <class L, class T, class X>
struct BackwardArgs {
  L likelihood;
  const T* output;  // [R, D]
  int64_t output_stride;
  LogvarsOf<L, T, X> logvar;
  Beside<X> x;          // [x_rows, D]
  Divider row_vectors;  // D / V
  Divider x_rows;
  int64_t vectors, D;  // R * D / V
  bool by_rows;        // rows matter: strides, samples, or a gradient for each
  float grad_scale;
  const float* grad;
  int64_t grad_sample_stride, grad_stride;
  T* result;  // [R, D]; with kLogvar may be null
};

constexpr int kVectorsAtOnce = 2;  // of a thread

// Vectors first, first + kThreads, ... of the gradient.
template <class L, int V, class T, class X>
AEVB_DEVICE void gradient_vectors(const BackwardArgs<L, T, X>& a, int64_t first) {
  constexpr int kAtOnce = kVectorsAtOnce;
  decltype(load<V>(a.output)) loaded_output[kAtOnce];
  decltype(a.logvar.template load_at<V>(0)) loaded_logvar[kAtOnce];
  decltype(a.x.template load_at<V>(0)) loaded_x[kAtOnce];
  float upstream[kAtOnce];
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    const int64_t vector = first + j * kThreads;
    if (vector >= a.vectors) break;
    int64_t output = vector * V, logvar = output, x = output, grad = 0;
    if (a.by_rows) {
      const int64_t row = a.row_vectors.divide(vector), column = output - row * a.D;
      const int64_t sample = a.x_rows.divide(row), x_row = row - sample * a.x_rows.divisor();
      output = row * a.output_stride + column;
      logvar = row * a.logvar.stride + column;
      x = x_row * a.x.stride + column;
      grad = sample * a.grad_sample_stride + x_row * a.grad_stride;
    }
    loaded_output[j] = load<V>(a.output + output);
    loaded_logvar[j] = a.logvar.template load_at<V>(logvar);
    loaded_x[j] = a.x.template load_at<V>(x);
    upstream[j] = a.grad[grad];
  }
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    const int64_t vector = first + j * kThreads;
    if (vector >= a.vectors) break;
    float out[V], log_variance[V], target[V];
    loaded_output[j].unpack_to(out);
    loaded_logvar[j].unpack_to(log_variance);
    loaded_x[j].unpack_to(target);
    Gradients<V> g;
    gradients_of(a.likelihood, out, log_variance, target, upstream[j], a.grad_scale, g);
    if (!L::kLogvar || a.result) store<V>(g.output, a.result + vector * V);
    a.logvar.template store_grad<V>(g.logvar, vector * V);
  }
}

template <class L, int V, class T, class X>
__global__ void __launch_bounds__(kThreads) log_prob_gradient(const BackwardArgs<L, T, X> a) {
  constexpr int kVectors = kVectorsAtOnce * kThreads;  // of a block
  gradient_vectors<L, V>(a, static_cast<int64_t>(blockIdx.x) * kVectors + threadIdx.x);
}

// The same where it is done already if grad[0] is 1, which it mostly is: so the grid is no larger than fills the GPU,
// but where elements are read one by one.
template <class L, int V, class T, class X>
__global__ void __launch_bounds__(kThreads) log_prob_gradient_unless_1(const BackwardArgs<L, T, X> a) {
  constexpr int kVectors = kVectorsAtOnce * kThreads;
  if (*a.grad == 1.0f) return;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kVectors + threadIdx.x;
  if constexpr (Beside<X>::kAtRunTime)
    gradient_vectors<L, V>(a, first);
  else
    for (; first < a.vectors; first += static_cast<int64_t>(gridDim.x) * kVectors) gradient_vectors<L, V>(a, first);
}

// ---- which kernel ---------------------------------------------------------------------------------------------------

constexpr const char* kUnknownLikelihood = "aevb has no kernel for this likelihood";

// Whether rows of `m` can be read V elements at a time.
template <int V>
bool in_vectors(const Rows& m, int64_t D, int64_t rows) {
  const int64_t bytes = V * size_of(m.dtype);
  return D % V == 0 && (rows == 1 || m.stride % V == 0) && is_aligned(m.data, bytes < 16 ? bytes : 16);
}

inline Beside<AnyDtype> beside(const Rows& m, AnyDtype) { return {m.data, m.stride, m.dtype}; }
template <class X>
Beside<X> beside(const Rows& m, X) {
  return {static_cast<const X*>(m.data), m.stride};
}

template <class T>
void set_logvars(Logvars<false, T>&, const LikelihoodArgs&) {}
template <class T>
void set_logvars(Logvars<true, T>& logvars, const LikelihoodArgs& a) {
  static_cast<Beside<T>&>(logvars) = beside(a.logvar, T{});
  logvars.grad = static_cast<decltype(logvars.grad)>(a.grad_logvar);
}

// Whether what a likelihood reads can be read V elements at a time.
template <int V>
bool in_vectors(const LikelihoodArgs& a) {
  return in_vectors<V>(a.output, a.D, a.R) && in_vectors<V>(a.x, a.D, a.x_rows) &&
         (!a.logvar.data || in_vectors<V>(a.logvar, a.D, a.R));
}

// How many parts a row is cut into, each a node of its tree: one, unless rows are long, and then as many as it takes to
// keep the GPU busy.
struct Parts {
  int64_t parts, elements;
};
inline Parts parts_of(const LikelihoodArgs& a, int multiprocessors) {
  constexpr int64_t kMost = 64, kWhole = 8;  // groups in a part, at most; rows of so many are not cut
  const int64_t groups = (a.D + kGroup - 1) / kGroup;
  int64_t each = kMost;
  while (groups > kWhole && each > 1 &&
         a.R * ((groups + each - 1) / each) < 128 * static_cast<int64_t>(multiprocessors))
    each /= 2;
  return {groups > each ? (groups + each - 1) / each : 1, each * kGroup};
}

// `with_types(a, narrow, use)` calls use(likelihood, T, V, X): the likelihood, the output's element, the elements of
// one access, the targets' element. `narrow` asks for accesses of one element.
template <class WithTypes>
const char* launch_gradient(const LikelihoodArgs& a, int multiprocessors, void* stream, const WithTypes& with_types) {
  if (a.D == 0) return nullptr;
  return with_types(a, false, [&](auto likelihood, auto t, auto v, auto x) {
    using L = decltype(likelihood);
    using T = decltype(t);
    using X = decltype(x);
    constexpr int V = decltype(v)::value;
    const int64_t vectors = a.R * (a.D / V);
    const bool by_rows = a.output.stride != a.D || a.x.stride != a.D || a.x_rows != a.R || a.grad_stride ||
                         a.grad_sample_stride || (L::kLogvar && a.logvar.stride != a.D);
    LogvarsOf<L, T, X> logvars;
    set_logvars(logvars, a);
    const BackwardArgs<L, T, X> args{likelihood,
                                     static_cast<const T*>(a.output.data),
                                     a.output.stride,
                                     logvars,
                                     beside(a.x, x),
                                     Divider(a.D / V),
                                     Divider(a.x_rows),
                                     vectors,
                                     a.D,
                                     by_rows,
                                     a.grad_scale,
                                     a.grad,
                                     a.grad_sample_stride,
                                     a.grad_stride,
                                     static_cast<T*>(a.grad_output)};
    const unsigned grid = blocks(vectors, kVectorsAtOnce * kThreads);
    const auto on = static_cast<cudaStream_t>(stream);
    if (!a.done_for_1) {
      AEVB_LAUNCH((log_prob_gradient<L, V, T, X>), grid, kThreads, on, args);
    } else if constexpr (L::kLoss) {
      const unsigned filling =
          Beside<X>::kAtRunTime ? grid : std::min(grid, 8u * static_cast<unsigned>(multiprocessors));
      AEVB_LAUNCH((log_prob_gradient_unless_1<L, V, T, X>), filling, kThreads, on, args);
    }
    return status();
  });
}

template <class WithTypes>
const char* launch_likelihood(const LikelihoodArgs& a, int multiprocessors, float* scratch, void* stream,
                              const WithTypes& with_types) {
  if (a.R == 0) return nullptr;
  if (!a.log_prob) return launch_gradient(a, multiprocessors, stream, with_types);
  const Parts parts = parts_of(a, multiprocessors);
  const int64_t units = a.R * parts.parts;
  const bool cut = parts.parts > 1;
  // A small batch is a matter of latency: more threads a row, each with less to do.
  const bool narrow = units * (kLanes / 4) < 64 * static_cast<int64_t>(multiprocessors) &&
                      a.output.dtype == Dtype::float32 && a.x.dtype == Dtype::float32;
  const char* error = with_types(a, narrow, [&](auto likelihood, auto t, auto v, auto x) {
    using L = decltype(likelihood);
    using T = decltype(t);
    using X = decltype(x);
    constexpr int V = decltype(v)::value;
    LogvarsOf<L, T, X> logvars;
    set_logvars(logvars, a);
    const ForwardArgs<L, T, X> args{likelihood,
                                    static_cast<const T*>(a.output.data),
                                    a.output.stride,
                                    logvars,
                                    beside(a.x, x),
                                    Divider(a.x_rows),
                                    Divider(parts.parts),
                                    units,
                                    a.D,
                                    parts.elements,
                                    cut ? 1.0f : -1.0f,
                                    cut ? scratch : a.log_prob,
                                    a.grad,
                                    a.grad_sample_stride,
                                    a.grad_stride,
                                    a.grad_scale,
                                    static_cast<T*>(a.grad_output)};
    with_bool(a.grad_output || a.grad_logvar, [&](auto grad) {
      AEVB_LAUNCH((log_prob_rows<L, grad.value, V, T, X>), blocks(units, kThreads / (kLanes / V)), kThreads,
                  static_cast<cudaStream_t>(stream), args);
    });
    return status();
  });
  if (error || !cut) return error;
  return join(scratch, a.R, parts.parts, -1.0f, a.log_prob, stream);
}

}  // namespace
}  // namespace aevb::cuda

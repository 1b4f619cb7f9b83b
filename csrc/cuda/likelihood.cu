// SPDX-License-Identifier: Apache-2.0
// log p(x|z) over rows of decoder outputs, and its gradient, for any likelihood of formulas/.
#include "../formulas/bernoulli.h"
#include "division.h"
#include "launch.h"
#include "launching.h"
#include "sums.cuh"
#include "vectors.cuh"

namespace aevb::cuda {
namespace {

constexpr int kThreads = 256;

// Targets whose dtype is known only at run time, read one by one: the kernels for every dtype of output and of x would
// be many, and mostly unused.
struct AnyDtype {};

template <class T>
struct Targets {
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
struct Targets<AnyDtype> {
  static constexpr bool kAtRunTime = true;
  const void* data;
  int64_t stride;
  Dtype dtype;
  template <int V>
  AEVB_DEVICE LoadedAny<V> load_at(int64_t first) const {
    LoadedAny<V> r;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      switch (dtype) {
        case Dtype::float32: r.x[i] = load_one(static_cast<const float*>(data) + first + i); break;
        case Dtype::bfloat16: r.x[i] = load_one(static_cast<const BFloat16*>(data) + first + i); break;
        case Dtype::float16: r.x[i] = load_one(static_cast<const Float16*>(data) + first + i); break;
        default: r.x[i] = load_one(static_cast<const uint8_t*>(data) + first + i);
      }
    }
    return r;
  }
};

// ---- log p, and with it the gradient where that is asked for
// ---------------------------------------------------------

template <class T, class X>
struct ForwardArgs {
  const T* output;  // [R, D]
  int64_t output_stride;
  Targets<X> x;  // [x_rows, D]
  Divider x_rows, parts;
  int64_t units, D, part_elements;  // a row is cut into `parts` parts; R * parts units
  float x_scale, sign;
  float* result;  // [R, parts]
  // Of the kernels with kGrad:
  const float* grad;
  int64_t grad_sample_stride, grad_stride;
  float grad_scale;
  T* grad_output;  // [R, D]; may be `output`
};

// kLanes / V threads share a unit: each adds up V neighbouring lanes of every group.
template <class L, bool kGrad, int V, class T, class X>
__global__ void __launch_bounds__(kThreads, V > 4 ? 2 : 3) log_prob_rows(const ForwardArgs<T, X> a) {
  constexpr int kSharing = kLanes / V;
  constexpr int kAtOnce = Targets<X>::kAtRunTime ? 1 : (V > 4 ? 2 : 4);  // vectors under way: as registers allow
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
    T* grad_output = kGrad ? a.grad_output + row * a.D + first + t * V : nullptr;
    int64_t x = x_row * a.x.stride + first + t * V;
    int k = 0;
    float linear[V] = {}, product[V] = {};
    const auto add = [&](const auto& loaded_output, const auto& loaded_x, T* grad_to) {
      float out[V], target[V];
      loaded_output.unpack_to(out);
      loaded_x.unpack_to(target);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const NegLogProb p = L::add_neg_log_prob(linear[i], out[i], target[i], a.x_scale);
        linear[i] = p.sum;
        product[i] = fmadd(product[i], p.excess, product[i] + p.excess);  // (1 + product) (1 + excess) - 1
        if constexpr (kGrad) out[i] = upstream * (a.grad_scale * L::grad(out[i], target[i], a.x_scale));
      }
      if constexpr (kGrad) store<V>(out, grad_to);
    };
    const auto go_on = [&](int elements) {
      k += elements;
      output += elements;
      x += elements;
      if constexpr (kGrad) grad_output += elements;
    };
    for (; k + kAtOnce * kLanes <= n; go_on(kAtOnce * kLanes)) {
      decltype(load<V>(output)) loaded_output[kAtOnce];
      decltype(a.x.template load_at<V>(0)) loaded_x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        loaded_output[j] = load<V>(output + j * kLanes);
        loaded_x[j] = a.x.template load_at<V>(x + j * kLanes);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) add(loaded_output[j], loaded_x[j], grad_output + j * kLanes);
    }
    for (; k + t * V < n; go_on(kLanes))
      add(load<V>(output), a.x.template load_at<V>(x), grad_output);  // n is a multiple of V
#pragma unroll
    for (int i = 0; i < V; ++i) linear[i] += log1p_nonnegative(product[i]);
    sum.add(fold_neighbours<V>(linear, sharing));
  }
  if (t == 0) a.result[unit] = a.sign * sum.total();
}

// ---- the gradient alone ---------------------------------------------------------------------------------------------

template <class T, class X>
struct BackwardArgs {
  const T* output;  // [R, D]
  int64_t output_stride;
  Targets<X> x;         // [x_rows, D]
  Divider row_vectors;  // D / V
  Divider x_rows;
  int64_t vectors, D;  // R * D / V
  bool by_rows;        // rows matter: strides, samples, or a gradient for each
  float x_scale, grad_scale;
  const float* grad;
  int64_t grad_sample_stride, grad_stride;
  T* result;  // [R, D]
};

template <class L, int V, class T, class X>
__global__ void __launch_bounds__(kThreads) log_prob_gradient(const BackwardArgs<T, X> a) {
  constexpr int kAtOnce = 2;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kAtOnce * kThreads) + threadIdx.x;
  decltype(load<V>(a.output)) loaded_output[kAtOnce];
  decltype(a.x.template load_at<V>(0)) loaded_x[kAtOnce];
  float upstream[kAtOnce];
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    const int64_t vector = first + j * kThreads;
    if (vector >= a.vectors) break;
    int64_t output = vector * V, x = output, grad = 0;
    if (a.by_rows) {
      const int64_t row = a.row_vectors.divide(vector), column = output - row * a.D;
      const int64_t sample = a.x_rows.divide(row), x_row = row - sample * a.x_rows.divisor();
      output = row * a.output_stride + column;
      x = x_row * a.x.stride + column;
      grad = sample * a.grad_sample_stride + x_row * a.grad_stride;
    }
    loaded_output[j] = load<V>(a.output + output);
    loaded_x[j] = a.x.template load_at<V>(x);
    upstream[j] = a.grad[grad];
  }
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    const int64_t vector = first + j * kThreads;
    if (vector >= a.vectors) break;
    float out[V], target[V];
    loaded_output[j].unpack_to(out);
    loaded_x[j].unpack_to(target);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = upstream[j] * (a.grad_scale * L::grad(out[i], target[i], a.x_scale));
    store<V>(out, a.result + vector * V);
  }
}

// ---- which kernel ---------------------------------------------------------------------------------------------------

// Whether rows of `m` can be read V elements at a time.
template <int V>
bool in_vectors(const Rows& m, int64_t D, int64_t rows) {
  const int64_t bytes = V * size_of(m.dtype);
  return D % V == 0 && (rows == 1 || m.stride % V == 0) && is_aligned(m.data, bytes < 16 ? bytes : 16);
}

Targets<AnyDtype> targets_of(const Rows& x, AnyDtype) { return {x.data, x.stride, x.dtype}; }
template <class X>
Targets<X> targets_of(const Rows& x, X) {
  return {static_cast<const X*>(x.data), x.stride};
}

// Calls use(L, T, V, X): the likelihood, the output's element, the elements of one access, the targets' element.
// `narrow` asks for accesses of one element.
template <class Use>
const char* with_types(const LikelihoodArgs& a, bool narrow, const Use& use) {
  return with_dtype(a.output.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int V = kWidest<T>;
    const bool vectors = !narrow && in_vectors<V>(a.output, a.D, a.R) && in_vectors<V>(a.x, a.D, a.x_rows);
    switch (a.likelihood) {
      case Likelihood::bernoulli_probs:
        if (vectors) return use(BernoulliProbs{}, t, Constant<V>{}, AnyDtype{});
        return use(BernoulliProbs{}, t, Constant<1>{}, AnyDtype{});
      case Likelihood::bernoulli_logits:
        if (!vectors) return use(BernoulliLogits{}, t, Constant<1>{}, AnyDtype{});
        if (a.x.dtype == Dtype::uint8) return use(BernoulliLogits{}, t, Constant<V>{}, uint8_t{});
        return with_dtype(a.x.dtype, [&](auto x) { return use(BernoulliLogits{}, t, Constant<V>{}, x); });
    }
    return static_cast<const char*>("a likelihood that has no CUDA kernels");
  });
}

// How many parts a row is cut into, each a node of its tree: one, unless rows are long, and then as many as it takes to
// keep the GPU busy.
struct Parts {
  int64_t parts, elements;
};
Parts parts_of(const LikelihoodArgs& a, int multiprocessors) {
  constexpr int64_t kMost = 64, kWhole = 8;  // groups in a part, at most; rows of so many are not cut
  const int64_t groups = (a.D + kGroup - 1) / kGroup;
  int64_t each = kMost;
  while (groups > kWhole && each > 1 &&
         a.R * ((groups + each - 1) / each) < 128 * static_cast<int64_t>(multiprocessors))
    each /= 2;
  return {groups > each ? (groups + each - 1) / each : 1, each * kGroup};
}

const char* gradient(const LikelihoodArgs& a, void* stream) {
  if (a.D == 0) return nullptr;
  return with_types(a, false, [&](auto formula, auto t, auto v, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    constexpr int V = decltype(v)::value;
    const int64_t vectors = a.R * (a.D / V);
    const bool by_rows =
        a.output.stride != a.D || a.x.stride != a.D || a.x_rows != a.R || a.grad_stride || a.grad_sample_stride;
    const BackwardArgs<T, X> args{static_cast<const T*>(a.output.data),
                                  a.output.stride,
                                  targets_of(a.x, x),
                                  Divider(a.D / V),
                                  Divider(a.x_rows),
                                  vectors,
                                  a.D,
                                  by_rows,
                                  a.x_scale,
                                  a.grad_scale,
                                  a.grad,
                                  a.grad_sample_stride,
                                  a.grad_stride,
                                  static_cast<T*>(a.grad_output)};
    AEVB_LAUNCH((log_prob_gradient<decltype(formula), V, T, X>), blocks(vectors, 2 * kThreads), kThreads,
                static_cast<cudaStream_t>(stream), args);
    return status();
  });
}

}  // namespace

int64_t likelihood_scratch(const LikelihoodArgs& a, int multiprocessors) {
  if (!a.log_prob) return 0;
  const int64_t parts = parts_of(a, multiprocessors).parts;
  return parts > 1 ? a.R * parts : 0;
}

const char* likelihood(const LikelihoodArgs& a, int multiprocessors, float* scratch, void* stream) {
  if (a.R == 0) return nullptr;
  if (!a.log_prob) return gradient(a, stream);
  const Parts parts = parts_of(a, multiprocessors);
  const int64_t units = a.R * parts.parts;
  const bool cut = parts.parts > 1;
  // A small batch is a matter of latency: more threads a row, each with less to do.
  const bool narrow = units * (kLanes / 4) < 64 * static_cast<int64_t>(multiprocessors) &&
                      a.output.dtype == Dtype::float32 && a.x.dtype == Dtype::float32;
  const char* error = with_types(a, narrow, [&](auto formula, auto t, auto v, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    constexpr int V = decltype(v)::value;
    const ForwardArgs<T, X> args{static_cast<const T*>(a.output.data),
                                 a.output.stride,
                                 targets_of(a.x, x),
                                 Divider(a.x_rows),
                                 Divider(parts.parts),
                                 units,
                                 a.D,
                                 parts.elements,
                                 a.x_scale,
                                 cut ? 1.0f : -1.0f,
                                 cut ? scratch : a.log_prob,
                                 a.grad,
                                 a.grad_sample_stride,
                                 a.grad_stride,
                                 a.grad_scale,
                                 static_cast<T*>(a.grad_output)};
    with_bool(a.grad_output, [&](auto grad) {
      AEVB_LAUNCH((log_prob_rows<decltype(formula), grad.value, V, T, X>), blocks(units, kThreads / (kLanes / V)),
                  kThreads, static_cast<cudaStream_t>(stream), args);
    });
    return status();
  });
  if (error || !cut) return error;
  return join(scratch, a.R, parts.parts, -1.0f, a.log_prob, stream);
}

}  // namespace aevb::cuda

// SPDX-License-Identifier: Apache-2.0
// log p(x|z) of each row of a decoder's outputs, and its gradient, for any likelihood of formulas/: kernels and
// launchers.
#pragma once
#include <algorithm>

#include "../formulas/likelihoods.h"
#include "division.h"
#include "grids.h"
#include "launchers.h"
#include "parts.h"
#include "sums.cuh"
#include "vectors.cuh"

namespace aevb::cuda {
namespace {

constexpr int kThreads = 256;

// Element type known only at run time; elements are read one by one. Kernels for every pair of dtypes of parameters and
// x would be many, and mostly unused.
struct AnyDtype {};

// The same for x, with the weights of its elements or an offset of the first parameter.
struct WeightedAnyDtype {};

// A matrix read beside the first parameter: x, or the second parameter.
template <class T>
struct Beside {
  static constexpr bool kAtRunTime = false, kWeighted = false;
  const T* data;  // [rows, D], rows `stride` elements apart
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
  static constexpr bool kAtRunTime = true, kWeighted = false;
  const void* data;  // [rows, D], rows `stride` elements apart
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
        default: r.x[k] = load_one(static_cast<const uint8_t*>(data) + i + k);  // uint8: dtype_of gives no other dtype
      }
    }
    return r;
  }
};

template <>
struct Beside<WeightedAnyDtype> : Beside<AnyDtype> {
  static constexpr bool kWeighted = true;
  Beside<AnyDtype> weight;  // [x_rows, D], or null
  bool is_mask;             // weights are 0 or not, or there are none
  const float* offset;      // [x_rows], or null

  AEVB_DEVICE float weight_at(int64_t i) const {
    float w = 1.0f;
    if (weight.data) weight.load_at<1>(i).unpack_to(&w);
    return w;
  }
};

// The second parameter and its gradient. Empty for a likelihood with one parameter.
template <bool kThere, class T>
struct Second {
  static constexpr int64_t stride = 0;
  template <int V>
  AEVB_DEVICE LoadedAny<V> load_at(int64_t) const {
    return {};
  }
  template <int V>
  AEVB_DEVICE void store_grad(const float*, int64_t) const {}
};

template <class T>
struct Second<true, T> : Beside<T> {
  T* grad;  // [R, D], or null
  template <int V>
  AEVB_DEVICE void store_grad(const float* x, int64_t i) const {
    if (grad) store<V>(x, grad + i);
  }
};

template <>
struct Second<true, AnyDtype> : Beside<AnyDtype> {
  void* grad;  // [R, D], the parameter's dtype, or null
  template <int V>
  AEVB_DEVICE void store_grad(const float* x, int64_t i) const {
    if (!grad) return;
    switch (dtype) {
      case Dtype::bfloat16: store<V>(x, static_cast<BFloat16*>(grad) + i); break;
      case Dtype::float16: store<V>(x, static_cast<Float16*>(grad) + i); break;
      default: store<V>(x, static_cast<float*>(grad) + i);  // no parameter is uint8
    }
  }
};

// Element type of the second parameter: the first parameter's where the dtype of x is known at compile time.
template <class T, class X>
struct SecondType {
  using Type = T;
};
template <class T>
struct SecondType<T, AnyDtype> {
  using Type = AnyDtype;
};
template <class T>
struct SecondType<T, WeightedAnyDtype> {
  using Type = AnyDtype;
};
template <class L, class T, class X>
using SecondOf = Second<(L::kParams > 1), typename SecondType<T, X>::Type>;

// Inputs of a kernel.
template <class L, class T, class X>
struct Operands {
  L likelihood;
  const T* p0;  // [R, D]
  int64_t p0_stride;
  SecondOf<L, T, X> p1;  // [R, D]
  Beside<X> x;           // [x_rows, D]
};

// The gradients of V neighbouring elements.
template <int V>
struct Gradients {
  float p0[V], p1[V];
};

// The gradients of one element of weight w, which is left out where w is 0.
template <class L>
AEVB_DEVICE void weighted_gradients(const L& likelihood, float x, float p0, float p1, float upstream, float scale,
                                    float w, bool is_mask, Gradients<1>& grad) {
  if (!is_mask) scale *= w;
  const LikelihoodGradient g = likelihood.grad(x, p0, p1);
  grad.p0[0] = w != 0.0f ? upstream * (scale * g.p0) : 0.0f;
  if constexpr (L::kParams > 1) grad.p1[0] = w != 0.0f ? upstream * (scale * g.p1) : 0.0f;
}

template <class L, int V>
AEVB_DEVICE void gradients_of(const L& likelihood, const float* x, const float* p0, const float* p1, float upstream,
                              float scale, Gradients<V>& grad) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const LikelihoodGradient g = likelihood.grad(x[i], p0[i], p1[i]);
    grad.p0[i] = upstream * (scale * g.p0);
    if constexpr (L::kParams > 1) grad.p1[i] = upstream * (scale * g.p1);
  }
}

// ---- the log-likelihood, with kGrad its gradient too ----------------------------------------------------------------

template <class L, class T, class X>
struct ForwardArgs : Operands<L, T, X> {
  Divider x_rows, parts;            // a row is cut into `parts` parts
  int64_t units, D, part_elements;  // R * parts units of work
  float sign;
  float* result;  // [R, parts]
  // With kGrad only:
  const float* grad;  // upstream gradient, at l * grad_sample_stride + b * grad_stride; null: 1
  int64_t grad_sample_stride, grad_stride;
  float grad_scale;
  T* grad0;  // [R, D]; may be p0; may be null where there are two parameters
};

// Resident blocks of a multiprocessor, as registers allow: 2, 3 or 4 blocks leave a thread 128, 80 or 64 registers.
// From sm_100 on the kernels need more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class L, bool kGrad, int V>
constexpr int kResident = L::kParams > 1                     ? (kGrad && V > 4 ? 1 : 2)
                          : V > 4 || (kGrad && !L::kProduct) ? 2
                                                             : 3;
#else
template <class L, bool kGrad, int V>
constexpr int kResident = V > 4 || (kGrad && !L::kProduct) ? 2
                          : V > 2 || L::kParams > 1        ? 3
                                                           : 4;
#endif

// `sign` times -log p of each unit, a row or a part of a row. kLanes / V threads share a unit: each thread adds up V
// neighbouring lanes of every group.
template <class L, bool kGrad, int V, class T, class X>
__global__ void __launch_bounds__(kThreads, kResident<L, kGrad, V>) log_prob_rows(const ForwardArgs<L, T, X> a) {
  constexpr int kSharing = kLanes / V;
  constexpr int kAtOnce = Beside<X>::kAtRunTime ? 1 : (V > 4 || L::kParams > 1 ? 2 : 4);  // vectors in flight
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
  float offset = 0.0f;
  if constexpr (Beside<X>::kWeighted) {
    if (a.x.offset) offset = a.x.offset[x_row];
  }
  TreeSum<7> sum;
  for (int64_t first = begin; first < end; first += kGroup) {
    const int n = static_cast<int>(end - first < kGroup ? end - first : kGroup);
    const T* p0 = a.p0 + row * a.p0_stride + first + t * V;
    int64_t x = x_row * a.x.stride + first + t * V, p1 = row * a.p1.stride + first + t * V;
    int64_t grad = row * a.D + first + t * V;
    int k = 0;
    float linear[V] = {}, product[V] = {};
    const auto add = [&](const auto& loaded0, const auto& loaded1, const auto& loaded_x, int64_t grad_at) {
      float param0[V], param1[V], target[V], w = 1.0f;
      loaded0.unpack_to(param0);
      loaded1.unpack_to(param1);
      loaded_x.unpack_to(target);
      if constexpr (Beside<X>::kWeighted) {
        w = a.x.weight_at(x_row * a.x.weight.stride + first + t + k);
        if (a.x.offset) param0[0] += offset;
        if (!a.x.is_mask) {  // a logarithm for each element
          const NegLogProb p = a.likelihood.add_neg_log_prob(0.0f, target[0], param0[0], param1[0]);
          const float element = L::kProduct ? p.sum + log1p_nonnegative(p.excess) : p.sum;
          if (w != 0.0f) linear[0] = fmadd(w, element, linear[0]);
        }
      }
      bool shares = true;  // one logarithm for many elements
      if constexpr (Beside<X>::kWeighted) shares = a.x.is_mask;
      if (shares) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const NegLogProb p = a.likelihood.add_neg_log_prob(linear[i], target[i], param0[i], param1[i]);
          if (Beside<X>::kWeighted && w == 0.0f) continue;
          linear[i] = p.sum;
          // (1 + product) (1 + excess) - 1
          if constexpr (L::kProduct) product[i] = fmadd(product[i], p.excess, product[i] + p.excess);
        }
      }
      if constexpr (kGrad) {
        Gradients<V> g;
        if constexpr (Beside<X>::kWeighted)
          weighted_gradients(a.likelihood, target[0], param0[0], param1[0], upstream, a.grad_scale, w, a.x.is_mask, g);
        else
          gradients_of(a.likelihood, target, param0, param1, upstream, a.grad_scale, g);
        if (L::kParams == 1 || a.grad0) store<V>(g.p0, a.grad0 + grad_at);
        a.p1.template store_grad<V>(g.p1, grad_at);
      }
    };
    const auto go_on = [&](int elements) {
      k += elements;
      p0 += elements;
      p1 += elements;
      x += elements;
      grad += elements;
    };
    for (; k + kAtOnce * kLanes <= n; go_on(kAtOnce * kLanes)) {
      decltype(load<V>(p0)) loaded0[kAtOnce];
      decltype(a.p1.template load_at<V>(0)) loaded1[kAtOnce];
      decltype(a.x.template load_at<V>(0)) loaded_x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        loaded0[j] = load<V>(p0 + j * kLanes);
        loaded1[j] = a.p1.template load_at<V>(p1 + j * kLanes);
        loaded_x[j] = a.x.template load_at<V>(x + j * kLanes);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) add(loaded0[j], loaded1[j], loaded_x[j], grad + j * kLanes);
    }
    for (; k + t * V < n; go_on(kLanes))  // n is a multiple of V
      add(load<V>(p0), a.p1.template load_at<V>(p1), a.x.template load_at<V>(x), grad);
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
struct BackwardArgs : Operands<L, T, X> {
  Divider row_vectors;  // D / V
  Divider x_rows;
  int64_t vectors, D;  // R * D / V vectors
  bool by_rows;        // a vector's row must be known, for strides, samples, or an upstream gradient of each row
  float grad_scale;
  const float* grad;  // upstream gradient, at l * grad_sample_stride + b * grad_stride
  int64_t grad_sample_stride, grad_stride;
  T* grad0;  // [R, D]; may be null where there are two parameters
};

constexpr int kVectorsAtOnce = 2;  // vectors that a thread has in flight

// Computes vectors first, first + kThreads, ... of the gradient, kVectorsAtOnce of them.
template <class L, int V, class T, class X>
AEVB_DEVICE void gradient_vectors(const BackwardArgs<L, T, X>& a, int64_t first) {
  constexpr int kAtOnce = kVectorsAtOnce;
  decltype(load<V>(a.p0)) loaded0[kAtOnce];
  decltype(a.p1.template load_at<V>(0)) loaded1[kAtOnce];
  decltype(a.x.template load_at<V>(0)) loaded_x[kAtOnce];
  float upstream[kAtOnce], w[kAtOnce], offset[kAtOnce];  // w and offset with weights only
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    const int64_t vector = first + j * kThreads;
    if (vector >= a.vectors) break;
    int64_t p0 = vector * V, p1 = p0, x = p0, grad = 0;
    if (Beside<X>::kWeighted || a.by_rows) {
      const int64_t row = a.row_vectors.divide(vector), column = p0 - row * a.D;
      const int64_t sample = a.x_rows.divide(row), x_row = row - sample * a.x_rows.divisor();
      p0 = row * a.p0_stride + column;
      p1 = row * a.p1.stride + column;
      x = x_row * a.x.stride + column;
      grad = sample * a.grad_sample_stride + x_row * a.grad_stride;
      if constexpr (Beside<X>::kWeighted) {
        w[j] = a.x.weight_at(x_row * a.x.weight.stride + column);
        offset[j] = a.x.offset ? a.x.offset[x_row] : 0.0f;
      }
    }
    loaded0[j] = load<V>(a.p0 + p0);
    loaded1[j] = a.p1.template load_at<V>(p1);
    loaded_x[j] = a.x.template load_at<V>(x);
    upstream[j] = a.grad[grad];
  }
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    const int64_t vector = first + j * kThreads;
    if (vector >= a.vectors) break;
    float param0[V], param1[V], target[V];
    loaded0[j].unpack_to(param0);
    loaded1[j].unpack_to(param1);
    loaded_x[j].unpack_to(target);
    Gradients<V> g;
    if constexpr (Beside<X>::kWeighted) {
      if (a.x.offset) param0[0] += offset[j];
      weighted_gradients(a.likelihood, target[0], param0[0], param1[0], upstream[j], a.grad_scale, w[j], a.x.is_mask,
                         g);
    } else {
      gradients_of(a.likelihood, target, param0, param1, upstream[j], a.grad_scale, g);
    }
    if (L::kParams == 1 || a.grad0) store<V>(g.p0, a.grad0 + vector * V);
    a.p1.template store_grad<V>(g.p1, vector * V);
  }
}

template <class L, int V, class T, class X>
__global__ void __launch_bounds__(kThreads) log_prob_gradient(const BackwardArgs<L, T, X> a) {
  constexpr int kVectors = kVectorsAtOnce * kThreads;  // vectors of a block
  gradient_vectors<L, V>(a, static_cast<int64_t>(blockIdx.x) * kVectors + threadIdx.x);
}

// The gradient, computed only if *grad is not 1: grad0 already holds the gradient for 1. *grad mostly is 1, so the grid
// is no larger than fills the GPU, and a block loops. Where elements are read one by one, the grid covers all vectors.
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

// ---- kernel selection -----------------------------------------------------------------------------------------------

// Whether rows of `m` [rows, D] can be read V elements at a time.
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

template <class X>
Beside<X> targets_of(const LikelihoodArgs& a, X) {
  return beside(a.x, X{});
}
inline Beside<WeightedAnyDtype> targets_of(const LikelihoodArgs& a, WeightedAnyDtype) {
  return {beside(a.x, AnyDtype{}), beside(a.weight, AnyDtype{}), weighting_of(a) != Weighting::weights, a.offset};
}

template <class T>
void set_second(Second<false, T>&, const LikelihoodArgs&) {}
template <class T>
void set_second(Second<true, T>& p1, const LikelihoodArgs& a) {
  static_cast<Beside<T>&>(p1) = beside(a.param[1], T{});
  p1.grad = static_cast<decltype(p1.grad)>(a.grad_param[1]);
}

template <class L, class T, class X>
Operands<L, T, X> operands_of(const LikelihoodArgs& a) {
  SecondOf<L, T, X> second;
  set_second(second, a);
  return {likelihood_of<L>(a), static_cast<const T*>(a.param[0].data), a.param[0].stride, second, targets_of(a, X{})};
}

// Whether all parameters and x can be read V elements at a time.
template <int V>
bool in_vectors(const LikelihoodArgs& a) {
  for (const Rows& param : a.param)
    if (param.data && !in_vectors<V>(param, a.D, a.R)) return false;
  return in_vectors<V>(a.x, a.D, a.x_rows);
}

// Calls use(T, V, X): the first parameter's element type, the elements of one access, the element type of x. `narrow`
// asks for accesses of one element. Memory alone bounds a likelihood with kProduct, so it has kernels for every dtype
// of x. Arithmetic bounds a likelihood with kHeavy, so one kernel serves all dtypes of x. With weights or an offset
// elements are read one by one.
template <class L, class Use>
const char* with_types(const LikelihoodArgs& a, bool narrow, const Use& use) {
  return with_dtype(a.param[0].dtype, [&](auto t) {
    // With kProduct or kHeavy, float32 does without the widest accesses: 16 threads a row, not 8, keep more loads in
    // flight.
    constexpr int V = (L::kProduct || L::kHeavy) && sizeof(t) == 4 ? 2 : kWidest<decltype(t)>;
    if (a.weight.data || a.offset) return use(t, Constant<1>{}, WeightedAnyDtype{});
    if (narrow || !in_vectors<V>(a)) return use(t, Constant<1>{}, AnyDtype{});
    if constexpr (L::kProduct) {
      if (a.x.dtype == Dtype::uint8) return use(t, Constant<V>{}, uint8_t{});
      return with_dtype(a.x.dtype, [&](auto x) { return use(t, Constant<V>{}, x); });
    } else if constexpr (L::kHeavy) {
      return use(t, Constant<V>{}, AnyDtype{});
    } else {
      const bool one_dtype = L::kParams == 1 || a.param[1].dtype == a.param[0].dtype;
      if (a.x.dtype == Dtype::float32 && one_dtype) return use(t, Constant<V>{}, float{});
      return use(t, Constant<V>{}, AnyDtype{});
    }
  });
}

template <class L>
const char* launch_gradient(const LikelihoodArgs& a, int multiprocessors, void* stream) {
  if (a.D == 0) return nullptr;
  return with_types<L>(a, false, [&](auto t, auto v, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    constexpr int V = decltype(v)::value;
    const int64_t vectors = a.R * (a.D / V);
    const bool by_rows = a.param[0].stride != a.D || a.x.stride != a.D || a.x_rows != a.R || a.grad_stride ||
                         a.grad_sample_stride || (L::kParams > 1 && a.param[1].stride != a.D);
    const BackwardArgs<L, T, X> args{operands_of<L, T, X>(a),
                                     Divider(a.D / V),
                                     Divider(a.x_rows),
                                     vectors,
                                     a.D,
                                     by_rows,
                                     a.grad_scale,
                                     a.grad,
                                     a.grad_sample_stride,
                                     a.grad_stride,
                                     static_cast<T*>(a.grad_param[0])};
    const unsigned grid = blocks(vectors, kVectorsAtOnce * kThreads);
    const auto on = static_cast<cudaStream_t>(stream);
    if (!a.done_for_1) {
      AEVB_LAUNCH((log_prob_gradient<L, V, T, X>), grid, kThreads, on, args);
    } else if constexpr (L::kParams == 1 && !Beside<X>::kWeighted) {
      const unsigned filling =
          Beside<X>::kAtRunTime ? grid : std::min(grid, 8u * static_cast<unsigned>(multiprocessors));
      AEVB_LAUNCH((log_prob_gradient_unless_1<L, V, T, X>), filling, kThreads, on, args);
    }
    return status();
  });
}

template <class L>
const char* launch_likelihood(const LikelihoodArgs& a, int multiprocessors, float* scratch, void* stream) {
  if (a.R == 0) return nullptr;
  if (!a.log_prob) return launch_gradient<L>(a, multiprocessors, stream);
  const Parts parts = parts_of(a, multiprocessors);
  const int64_t units = a.R * parts.parts;
  const bool cut = parts.parts > 1;
  // Latency bounds a small batch: more threads share a row, and each has less to do.
  const bool narrow = units * (kLanes / 4) < 64 * static_cast<int64_t>(multiprocessors) &&
                      a.param[0].dtype == Dtype::float32 && a.x.dtype == Dtype::float32;
  const char* error = with_types<L>(a, narrow, [&](auto t, auto v, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    constexpr int V = decltype(v)::value;
    const ForwardArgs<L, T, X> args{operands_of<L, T, X>(a),
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
                                    static_cast<T*>(a.grad_param[0])};
    with_bool(wants_gradient(a), [&](auto grad) {
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

// SPDX-License-Identifier: Apache-2.0
// Kernels with a bug each, and the same without it (kRight), for tests/ops/test_cuda_shim.py. The tests load this as a
// library; with -DAEVB_PROGRAM it is a program, to be run under sanitizers: planted_bugs <name> <n> right|wrong ...
#include <algorithm>
#include <iostream>
#include <map>

#include "cuda_shim.h"

namespace {

static_assert(sizeof(float4) == 16 && alignof(float4) == 16 && alignof(float2) == 8);
static_assert(sizeof(uint4) == 16 && alignof(uint4) == 16 && alignof(uint2) == 8);
static_assert(sizeof(ushort4) == 8 && alignof(ushort4) == 8 && alignof(uchar4) == 4 && alignof(longlong2) == 16);

// ---- shared memory and barriers

template <bool kRight>
__global__ void missing_barrier(float* out) {
  AEVB_SHARED(float, s, 128);
  const int i = threadIdx.x;
  s[i] = static_cast<float>(i);
  if (kRight) __syncthreads();
  out[blockIdx.x * 128 + i] = s[127 - i];
}

template <bool kRight>
__global__ void missing_second_barrier(float* out) {  // the next round overwrites what others still read
  AEVB_SHARED(float, s, 128);
  const int i = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    s[i] = static_cast<float>(100 * round + i);
    __syncthreads();
    sum += s[127 - i];
    if (kRight) __syncthreads();
  }
  out[i] = sum;
}

template <bool kRight>
__global__ void missing_warp_barrier(float* out) {
  AEVB_SHARED(float, s, 32);
  const int i = threadIdx.x;
  s[i] = static_cast<float>(i);
  if (kRight) __syncwarp();
  out[i] = s[31 - i];
}

template <bool kRight>
__global__ void order_of_blocks(float* out) {  // which block writes last
  out[kRight ? blockIdx.x * 32 + threadIdx.x : threadIdx.x] = static_cast<float>(blockIdx.x);
}

template <bool kRight>
__global__ void unwritten_shared(float* out) {  // the second block must not find what the first one wrote
  AEVB_SHARED(float, s, 32);
  const int i = threadIdx.x;
  if (kRight || (blockIdx.x == 0 && i < 8)) s[i] = static_cast<float>(i);
  __syncthreads();
  out[blockIdx.x * 32 + i] = s[i];
}

template <bool kRight>
__global__ void shared_write_behind(float* out) {
  AEVB_SHARED(float, s, 32);
  const int i = threadIdx.x;
  s[kRight ? i : i + 1] = static_cast<float>(i);
  __syncthreads();
  out[i] = s[i];
}

template <bool kRight>
__global__ void shared_write_before(float* out) {
  AEVB_SHARED(float, s, 32);
  const int i = threadIdx.x;
  float* p = s;
  p[kRight ? i : i - 1] = static_cast<float>(i);
  __syncthreads();
  out[i] = s[i];
}

template <bool kRight>
__global__ void shared_read_behind(float* out) {
  AEVB_SHARED(float, s, 32);
  const int i = threadIdx.x;
  s[i] = static_cast<float>(i);
  __syncthreads();
  const float* p = s;
  out[i] = p[kRight ? i : i + 1];
}

template <bool kRight>
__global__ void divergent_barrier(float* out) {
  const int i = threadIdx.x;
  if (kRight || i < 16) __syncthreads();
  out[i] = static_cast<float>(i);
}

template <bool kRight>
__global__ void different_barriers(float* out) {
  const int i = threadIdx.x;
  if (kRight || i < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[i] = static_cast<float>(i);
}

template <bool kRight>
__global__ void barriers_in_a_loop(float* out) {  // not as many for every thread
  const int i = threadIdx.x;
  for (int round = 0; round < (kRight ? 3 : 1 + i % 3); ++round) __syncthreads();
  out[i] = static_cast<float>(i);
}

template <bool kRight>
__global__ void barrier_or_shuffle(float* out) {
  const int i = threadIdx.x;
  float x = static_cast<float>(i);
  if (kRight || i < 16) __syncthreads();
  if (kRight || i >= 16) x = __shfl_sync(~0u, x, i);
  out[i] = x;
}

// ---- shuffles

template <bool kRight>
__global__ void mask_without_caller(float* out) {
  const int i = threadIdx.x;
  out[i] = __shfl_xor_sync(kRight ? ~0u : 0xffffu, static_cast<float>(i), 1);
}

template <bool kRight>
__global__ void mask_with_returned_lanes(float* out) {
  const int i = threadIdx.x;
  if (!kRight && i >= 16) return;
  out[i] = __shfl_xor_sync(~0u, static_cast<float>(i), 1);
}

template <bool kRight>
__global__ void mask_past_the_block(float* out) {  // of 40 threads
  const int i = threadIdx.x;
  out[i] = __shfl_xor_sync(kRight && i >= 32 ? 0xffu : ~0u, static_cast<float>(i), 1);
}

template <bool kRight>
__global__ void read_outside_the_mask(float* out) {
  const int i = threadIdx.x;
  if (i < 16) out[i] = __shfl_sync(0xffffu, static_cast<float>(i), kRight ? 3 : 20);
}

template <bool kRight>
__global__ void different_masks(float* out) {
  const int i = threadIdx.x;
  out[i] = __shfl_xor_sync(kRight || i < 16 ? ~0u : 0xffff0001u, static_cast<float>(i), 1);
}

template <bool kRight>
__global__ void different_masks_deadlock(float* out) {
  const int i = threadIdx.x;
  out[i] = __shfl_xor_sync(kRight || i < 16 ? ~0u : 0xffff0000u, static_cast<float>(i), 1);
}

template <bool kRight>
__global__ void different_shuffles(float* out) {
  const int i = threadIdx.x;
  if (kRight || i < 16) {
    out[i] = __shfl_xor_sync(~0u, static_cast<float>(i), 1);
  } else {
    out[i] = __shfl_xor_sync(~0u, static_cast<float>(i), 2);
  }
}

template <bool kRight>
__global__ void odd_width(float* out) {
  const int i = threadIdx.x;
  out[i] = __shfl_down_sync(~0u, static_cast<float>(i), 1, kRight ? 8 : 12);
}

// ---- other

template <bool kRight>
__global__ void exception(float* out) {
  const int i = threadIdx.x;
  float local[100] = {};  // on the stack of those that are given up, where AddressSanitizer marks what lies beside it
  if (!kRight && i == 77) throw std::logic_error("thrown by a kernel");
  local[i % 100] = static_cast<float>(i);
  __syncthreads();
  out[i] = __shfl_xor_sync(~0u, local[i % 100], 1);
}

template <bool kRight>
__global__ void global_write_behind(float* out, int n) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  if (i < n || !kRight) out[i] = static_cast<float>(i);
}

template <bool kRight>
__global__ void global_read_behind(float* out, int n) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  if (i < n) out[i] = out[kRight ? i : i + 1];
}

template <bool kRight>
__global__ void misaligned(float* out) {
  const int i = threadIdx.x;
  reinterpret_cast<float4*>(out + (kRight ? 0 : 1))[i] = make_float4(1, 2, 3, 4);
}

// The bugs by name; out has n elements.
using Run = void (*)(float* out, int n);
struct Twins {
  Run wrong, right;
};
#define TWINS(kernel, grid, threads)                                                      \
  {                                                                                       \
    #kernel, {                                                                            \
      [](float* out, int) { AEVB_LAUNCH(kernel<false>, grid, threads, nullptr, out); },   \
          [](float* out, int) { AEVB_LAUNCH(kernel<true>, grid, threads, nullptr, out); } \
    }                                                                                     \
  }
#define TWINS_OF_N(kernel)                                                                         \
  {                                                                                                \
    #kernel, {                                                                                     \
      [](float* out, int n) { AEVB_LAUNCH(kernel<false>, (n + 63) / 64, 64, nullptr, out, n); },   \
          [](float* out, int n) { AEVB_LAUNCH(kernel<true>, (n + 63) / 64, 64, nullptr, out, n); } \
    }                                                                                              \
  }
const std::map<std::string, Twins> kTwins = {
    TWINS(missing_barrier, 2, 128),     TWINS(missing_second_barrier, 1, 128),
    TWINS(missing_warp_barrier, 1, 32), TWINS(order_of_blocks, 8, 32),
    TWINS(unwritten_shared, 2, 32),     TWINS(shared_write_behind, 1, 32),
    TWINS(shared_write_before, 1, 32),  TWINS(shared_read_behind, 1, 32),
    TWINS(divergent_barrier, 1, 64),    TWINS(different_barriers, 1, 64),
    TWINS(barriers_in_a_loop, 1, 64),   TWINS(barrier_or_shuffle, 1, 32),
    TWINS(mask_without_caller, 1, 32),  TWINS(mask_with_returned_lanes, 1, 32),
    TWINS(mask_past_the_block, 1, 40),  TWINS(read_outside_the_mask, 1, 32),
    TWINS(different_masks, 1, 32),      TWINS(different_masks_deadlock, 1, 32),
    TWINS(different_shuffles, 1, 32),   TWINS(odd_width, 1, 32),
    TWINS(exception, 3, 128),           TWINS_OF_N(global_write_behind),
    TWINS_OF_N(global_read_behind),     TWINS(misaligned, 1, 16),
};

// ---- what CUDA's functions give

// Every lane of the mask shuffles its thread's number; the others have -1. Kinds: 0 idx, 1 up, 2 down, 3 xor.
__global__ void shuffle_numbers(int kind, int operand, int width, unsigned mask, int* out) {
  const int i = threadIdx.x;
  out[i] = -1;
  if (!(mask >> i % 32 & 1)) return;
  if (kind == 0) out[i] = __shfl_sync(mask, i, operand, width);
  if (kind == 1) out[i] = __shfl_up_sync(mask, i, operand, width);
  if (kind == 2) out[i] = __shfl_down_sync(mask, i, operand, width);
  if (kind == 3) out[i] = __shfl_xor_sync(mask, i, operand, width);
}

// Shuffles of other types than int, and lanes that do two with half the warp while others have yet to leave the first.
__global__ void shuffle_types(double* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_down_sync(~0u, lane + 0.1, 4);
  out[32 + lane] = static_cast<double>(__shfl_up_sync(~0u, (1ll << 40) + lane, 4));
  out[64 + lane] = static_cast<double>(__shfl_xor_sync(~0u, -0.5f * static_cast<float>(lane), 3));
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  const int all = __shfl_xor_sync(~0u, lane, 16);
  const int once = __shfl_xor_sync(half, all, 1);
  out[96 + lane] = __shfl_xor_sync(half, once, 2) + 100 * once + 10000 * all;
}

__global__ void votes(unsigned mask, unsigned predicates, unsigned* out) {
  const int lane = threadIdx.x, p = predicates >> lane & 1;
  if (!(mask >> lane & 1)) return;
  out[3 * lane] = __ballot_sync(mask, p);
  out[3 * lane + 1] = static_cast<unsigned>(__any_sync(mask, p));
  out[3 * lane + 2] = static_cast<unsigned>(__all_sync(mask, p));
}

__global__ void block_votes(const int* predicates, int* out) {
  const int i = threadIdx.x;
  out[3 * i] = __syncthreads_count(predicates[i]);
  out[3 * i + 1] = __syncthreads_or(predicates[i]);
  out[3 * i + 2] = __syncthreads_and(predicates[i]);
}

__global__ void intrinsics(uint64_t* out) {
  out[0] = __umulhi(0xfffffffeu, 0xfffffffdu);
  out[1] = __umul64hi(0xfffffffffffffffeull, 0xfffffffffffffffdull);
  out[2] = __float_as_uint(-1.5f);
  out[3] = __float_as_uint(__uint_as_float(0x7fc12345u));
  __stcs(&out[4], __ldg(&out[0]) + __ldcs(&out[1]));
  out[5] = threadIdx.x + 10 * blockIdx.x + 100 * blockDim.x + 1000 * gridDim.x + 10000 * warpSize;
}

// When each thread ran, before its barrier and after.
__global__ void tickets(int* next, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[2 * i] = (*next)++;
  __syncthreads();
  out[2 * i + 1] = (*next)++;
}

__global__ void nothing(int) {}

// What went wrong, or null.
template <class F>
const char* error_of(const F& run) {
  static std::string error;
  try {
    run();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

const char* run(const char* name, bool right, float* out, int n) {
  return error_of([&] { (right ? kTwins.at(name).right : kTwins.at(name).wrong)(out, n); });
}

}  // namespace

#ifdef AEVB_PROGRAM

int main(int argc, char** argv) {
  const int n = std::stoi(argv[2]);
  float* out = new float[n]();
  for (int i = 3; i < argc; ++i) {
    const char* error = run(argv[1], argv[i] == std::string("right"), out, n);
    std::cout << (error ? "error" : "done") << ", " << std::count_if(out, out + n, [](float x) { return x != x; })
              << " NaN" << std::endl;
  }
  delete[] out;
}

#else

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* planted(const char* name, bool right, float* out, int n) { return run(name, right, out, n); }
EXPORT const char* run_shuffle_numbers(int kind, int operand, int width, unsigned mask, int* out) {
  return error_of([&] { AEVB_LAUNCH(shuffle_numbers, 1, 64, nullptr, kind, operand, width, mask, out); });
}
EXPORT const char* run_shuffle_types(double* out) {
  return error_of([&] { AEVB_LAUNCH(shuffle_types, 1, 32, nullptr, out); });
}
EXPORT const char* run_votes(unsigned mask, unsigned predicates, unsigned* out) {
  return error_of([&] { AEVB_LAUNCH(votes, 1, 32, nullptr, mask, predicates, out); });
}
EXPORT const char* run_block_votes(const int* predicates, int threads, int* out) {
  return error_of([&] { AEVB_LAUNCH(block_votes, 1, threads, nullptr, predicates, out); });
}
EXPORT const char* run_intrinsics(uint64_t* out) {
  return error_of([&] { AEVB_LAUNCH(intrinsics, 1, 1, nullptr, out); });
}
EXPORT const char* run_tickets(int64_t grid, int64_t threads, int* out) {
  int next = 0;
  return error_of([&] { AEVB_LAUNCH(tickets, grid, threads, nullptr, &next, out); });
}
EXPORT const char* run_nothing(int64_t grid, int64_t threads) {
  return error_of([&] { AEVB_LAUNCH(nothing, grid, threads, nullptr, 0); });
}
EXPORT const char* run_nothing_2d(unsigned x, unsigned y) {
  return error_of([&] { AEVB_LAUNCH(nothing, dim3(x, y), dim3(32), nullptr, 0); });
}

#endif

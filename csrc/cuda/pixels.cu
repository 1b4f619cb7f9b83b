// SPDX-License-Identifier: Apache-2.0
// Binarization: images are gathered from a data set, and their grey pixels drawn anew as bits.
#include "../formulas/philox.h"
#include "division.h"
#include "grids.h"
#include "launchers.h"

namespace aevb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 16;  // pixels of a thread: four counters, and one access where rows are aligned

struct BinarizeKernelArgs {
  const uint8_t* images;  // [N, D]
  int64_t N;
  const int64_t* index;  // [B]; null: 0, 1, 2, ...
  const int64_t* seed;   // []
  int64_t D, runs;       // B * runs_of_row runs of kPixels pixels
  Divider runs_of_row;
  uint32_t max_value, step;
  uint8_t* x;  // [B, D]
};

// A thread takes a run of kPixels neighbouring pixels of an image. kWide: every run is complete and aligned.
template <bool kWide>
__global__ void __launch_bounds__(kThreads) binarize_pixels(const BinarizeKernelArgs a) {
  const int64_t run = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (run >= a.runs) return;
  const int64_t b = a.runs_of_row.divide(run), d = (run - b * a.runs_of_row.divisor()) * kPixels;
  const int64_t image = a.index ? a.index[b] : b;
#ifdef __CUDA_ARCH__
  if (image < 0 || image >= a.N) __trap();  // as torch's own indexing does
#endif
  const uint8_t* pixel = a.images + image * a.D + d;
  uint8_t* x = a.x + b * a.D + d;
  const int n = a.D - d < kPixels ? static_cast<int>(a.D - d) : kPixels;
  uint32_t word[kPixels / 4];  // four pixels a word
  if constexpr (kWide) {
    Access<16>::split(*reinterpret_cast<const uint4*>(pixel), word);
  } else {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (i % 4 == 0) word[i / 4] = 0u;
      if (i < n) word[i / 4] |= static_cast<uint32_t>(pixel[i]) << (8 * (i % 4));
    }
  }
  const PhiloxKeys keys = philox_keys(aevb::mix_seed(static_cast<uint64_t>(*a.seed), static_cast<uint64_t>(image)));
#pragma unroll
  for (int j = 0; j < kPixels / 4; ++j) {
    const Philox noise = noise_words(keys, static_cast<uint64_t>(d) / 4 + j, kForPixels);
    uint32_t bits = 0u;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      bits |= static_cast<uint32_t>(is_set(noise.word[i], (word[j] >> (8 * i)) & 0xffu, a.max_value, a.step))
              << (8 * i);
    word[j] = bits;
  }
  if constexpr (kWide) {
    put(reinterpret_cast<uint4*>(x), Access<16>::join(word));
  } else {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
      if (i < n) x[i] = static_cast<uint8_t>(word[i / 4] >> (8 * (i % 4)));
  }
}

}  // namespace

const char* binarize(const BinarizeArgs& a, void* stream) {
  if (a.B == 0 || a.D == 0) return nullptr;
  const int64_t runs_of_row = (a.D + kPixels - 1) / kPixels, runs = a.B * runs_of_row;
  const BinarizeKernelArgs args{
      a.images, a.N, a.index, a.seed, a.D, runs, Divider(runs_of_row), a.max_value, grey_step(a.max_value), a.x};
  with_bool(a.D % kPixels == 0 && is_aligned(a.images, 16) && is_aligned(a.x, 16), [&](auto wide) {
    AEVB_LAUNCH((binarize_pixels<wide.value>), blocks(runs, kThreads), kThreads, static_cast<cudaStream_t>(stream),
                args);
  });
  return status();
}

}  // namespace aevb::cuda

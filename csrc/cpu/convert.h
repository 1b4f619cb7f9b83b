// SPDX-License-Identifier: Apache-2.0
// Conversion of tensor elements to float and back, run by run.
#pragma once
#include "../formulas/half.h"
#include "isa.h"

#ifndef AEVB_CONVERSION
#define AEVB_CONVERSION inline
#endif

namespace aevb::cpu {
namespace {

AEVB_FORMULA int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::uint8 ? 1 : 2; }

// out [n] = the elements data [n].
AEVB_CONVERSION void read_floats(const void* data, Dtype dtype, int64_t n, float* out) {
  const auto* half = static_cast<const uint16_t*>(data);
  const auto* byte = static_cast<const uint8_t*>(data);
  switch (dtype) {
    case Dtype::float32:
      if (n > 0) __builtin_memcpy(out, data, n * sizeof(float));  // data may be null where n is 0
      break;
    case Dtype::bfloat16:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = from_bfloat16(half[i]);
      break;
    case Dtype::float16:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = from_float16(half[i]);
      break;
    case Dtype::uint8:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<int32_t>(byte[i]));
      break;
  }
}

// data [n] = x [n], rounded to dtype.
AEVB_CONVERSION void write_floats(const float* x, int64_t n, Dtype dtype, void* data) {
  auto* half = static_cast<uint16_t*>(data);
  switch (dtype) {
    case Dtype::bfloat16:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) half[i] = to_bfloat16(x[i]);
      break;
    case Dtype::float16:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) half[i] = to_float16(x[i]);
      break;
    case Dtype::float32:
      if (n > 0) __builtin_memcpy(data, x, n * sizeof(float));
      break;
    case Dtype::uint8: break;  // no result is written as uint8
  }
}

AEVB_FORMULA const void* element(const void* data, Dtype dtype, int64_t i) {
  return static_cast<const char*>(data) + i * size_of(dtype);
}
AEVB_FORMULA void* element(void* data, Dtype dtype, int64_t i) { return static_cast<char*>(data) + i * size_of(dtype); }

// Writes x [n] to out [n] past the caches, from which so large a result would only push needed data out. end_stream()
// must come before another thread reads the result.
AEVB_FORMULA void stream_floats(const float* x, int n, float* out) {
  int i = 0;
#if defined(AEVB_AVX512)
  for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 64; ++i) out[i] = x[i];
  for (; i + 16 <= n; i += 16) _mm512_stream_ps(out + i, _mm512_loadu_ps(x + i));
#elif defined(AEVB_AVX2)
  for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 32; ++i) out[i] = x[i];
  for (; i + 8 <= n; i += 8) _mm256_stream_ps(out + i, _mm256_loadu_ps(x + i));
#endif
  for (; i < n; ++i) out[i] = x[i];
}

AEVB_FORMULA void end_stream() {
#if defined(AEVB_AVX512) || defined(AEVB_AVX2)
  _mm_sfence();
#endif
}

// Columns [column, column + n) of `count` rows from `row` on, as adjacent floats [count, n]. They are read in place if
// they lie so already, else to `buffer` [count, n].
inline const float* read_rows(const Rows& m, int64_t row, int64_t count, int64_t column, int64_t n, float* buffer) {
  if (m.dtype == Dtype::float32 && (count == 1 || m.stride == n))
    return static_cast<const float*>(m.data) + row * m.stride + column;
  for (int64_t r = 0; r < count; ++r)
    read_floats(element(m.data, m.dtype, (row + r) * m.stride + column), m.dtype, n, buffer + r * n);
  return buffer;
}

}  // namespace
}  // namespace aevb::cpu

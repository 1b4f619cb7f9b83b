// SPDX-License-Identifier: Apache-2.0
// Loads and stores of V neighbouring elements of a tensor as floats, by accesses of up to 16 bytes.
#pragma once
#include "../formulas/half.h"
#include "platform.h"

namespace aevb::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Elements of an access of 16 bytes.
template <class T>
constexpr int kWidest = 16 / sizeof(T);

// The type of an access of kBytes, and its 32-bit words.
template <int kBytes>
struct Access;
template <>
struct Access<16> {
  using Type = uint4;
  static AEVB_DEVICE void split(Type v, uint32_t* word) { word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w; }
  static AEVB_DEVICE Type join(const uint32_t* word) { return make_uint4(word[0], word[1], word[2], word[3]); }
};
template <>
struct Access<8> {
  using Type = uint2;
  static AEVB_DEVICE void split(Type v, uint32_t* word) { word[0] = v.x, word[1] = v.y; }
  static AEVB_DEVICE Type join(const uint32_t* word) { return make_uint2(word[0], word[1]); }
};
template <class T>
struct SmallAccess {
  using Type = T;
  static AEVB_DEVICE void split(Type v, uint32_t* word) { word[0] = v; }
  static AEVB_DEVICE Type join(const uint32_t* word) { return static_cast<T>(word[0]); }
};
template <>
struct Access<4> : SmallAccess<uint32_t> {};
template <>
struct Access<2> : SmallAccess<uint16_t> {};
template <>
struct Access<1> : SmallAccess<uint8_t> {};

// Element i of packed words.
AEVB_DEVICE float unpack(float, const uint32_t* word, int i) { return float_of(word[i]); }
AEVB_DEVICE float unpack(BFloat16, const uint32_t* word, int i) {
  return float_of(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
}
AEVB_DEVICE float unpack(Float16, const uint32_t* word, int i) {
  return from_float16(static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2))));
}
AEVB_DEVICE float unpack(uint8_t, const uint32_t* word, int i) {
  return static_cast<float>((word[i / 4] >> (8 * (i % 4))) & 0xffu);
}

// Packs two elements into one word.
AEVB_DEVICE uint32_t pack_pair(BFloat16, float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return to_bfloat16(low) | static_cast<uint32_t>(to_bfloat16(high)) << 16;
#endif
}
AEVB_DEVICE uint32_t pack_pair(Float16, float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return to_float16(low) | static_cast<uint32_t>(to_float16(high)) << 16;
#endif
}

template <class T, int V>
AEVB_DEVICE void pack(const float* x, uint32_t* word) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) word[i] = bits_of(x[i]);
  } else if constexpr (V == 1) {
    word[0] = pack_pair(T{}, x[0], 0.0f) & 0xffffu;
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 2) word[i / 2] = pack_pair(T{}, x[i], x[i + 1]);
  }
}

// V elements that load() has read and nobody has unpacked yet, so that several loads can be in flight.
template <class T, int V>
struct Loaded {
  static constexpr int kBytes = V * sizeof(T) < 16 ? V * sizeof(T) : 16, kAccesses = V * sizeof(T) / kBytes;
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  typename Access<kBytes>::Type access[kAccesses];

  AEVB_DEVICE void unpack_to(float* x) const {
    uint32_t word[kAccesses * kWords];
#pragma unroll
    for (int a = 0; a < kAccesses; ++a) Access<kBytes>::split(access[a], word + a * kWords);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = unpack(T{}, word, i);
  }
};

// Reads data [V], which is aligned to its size in bytes, at most 16.
template <int V, class T>
AEVB_DEVICE Loaded<T, V> load(const T* data) {
  using Result = Loaded<T, V>;
  Result r;
#pragma unroll
  for (int a = 0; a < Result::kAccesses; ++a)
    r.access[a] = reinterpret_cast<const typename Access<Result::kBytes>::Type*>(data)[a];
  return r;
}

template <class A>
AEVB_DEVICE void put(A* to, A value) {
  *to = value;
}
AEVB_DEVICE void put(uint4* to, uint4 value) {
#ifdef __CUDA_ARCH__
  // nvcc would split a plain store where another branch stores the same words one by one.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#else
  *to = value;
#endif
}

// Writes x [V] to data [V] in global memory, aligned as for load().
template <int V, class T>
AEVB_DEVICE void store(const float* x, T* data) {
  using Layout = Loaded<T, V>;
  uint32_t word[Layout::kAccesses * Layout::kWords];
  pack<T, V>(x, word);
#pragma unroll
  for (int a = 0; a < Layout::kAccesses; ++a)
    put(reinterpret_cast<typename Access<Layout::kBytes>::Type*>(data) + a,
        Access<Layout::kBytes>::join(word + a * Layout::kWords));
}

template <class T>
AEVB_DEVICE float load_one(const T* data) {
  float x;
  load<1>(data).unpack_to(&x);
  return x;
}
template <class T>
AEVB_DEVICE void store_one(float x, T* data) {
  store<1>(&x, data);
}

// x rounded to T.
template <class T>
AEVB_DEVICE float round_to(float x) {
  uint32_t word;
  pack<T, 1>(&x, &word);
  return unpack(T{}, &word, 0);
}

}  // namespace aevb::cuda

// SPDX-License-Identifier: Apache-2.0
// Memory for large results: a cache of buffers that are used again.
//
// A training step frees and allocates the same large tensors again and again. malloc hands each back to the system,
// and every first touch of a page is a fault: on a virtual machine that can take longer than computing the data.
#pragma once
#include <cstddef>
#include <cstdint>

namespace aevb::cpu {

constexpr size_t kCachedBytes = 128 * 1024;  // smallest result that comes from the cache

// A buffer of at least `bytes` bytes, aligned to 64, to be given back with release_buffer. Throws std::bad_alloc.
void* acquire_buffer(size_t bytes);
void release_buffer(void* data);

// Frees all cached buffers, and returns their bytes. AEVB_CACHE_MB limits the cache (default 512, 0 for none).
size_t release_memory();

}  // namespace aevb::cpu

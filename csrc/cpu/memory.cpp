// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace aevb::cpu {
namespace {

constexpr size_t kHeader = 64;  // bytes before a block's data, which hold its size
constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  size_t bytes;  // of header and data
};

Block* new_block(size_t bytes) {
  const bool huge = bytes >= 2 * kHugePage;
  const size_t alignment = huge ? kHugePage : 4096;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
  if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (huge) madvise(memory, rounded, MADV_HUGEPAGE);  // a hint: fewer faults
#endif
  return new (memory) Block{rounded};
}

class Cache {
 public:
  Cache() {
    if (const char* text = std::getenv("AEVB_CACHE_MB")) limit_ = std::strtoull(text, nullptr, 10) << 20;
  }

  Block* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = blocks_.end();
    for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
      const bool fits = (*it)->bytes >= bytes && (*it)->bytes <= bytes + bytes / 2 + kHugePage;
      if (fits && (best == blocks_.end() || (*it)->bytes < (*best)->bytes)) best = it;
    }
    if (best == blocks_.end()) return nullptr;
    Block* block = *best;
    blocks_.erase(best);
    bytes_ -= block->bytes;
    return block;
  }

  void give(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(block);
    bytes_ += block->bytes;
    free_down_to(limit_);
  }

  size_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = bytes_;
    free_down_to(0);
    return bytes;
  }

 private:
  void free_down_to(size_t limit) {  // frees the blocks that were unused for longest first
    while (bytes_ > limit) {
      bytes_ -= blocks_.front()->bytes;
      std::free(blocks_.front());
      blocks_.pop_front();
    }
  }

  std::mutex mutex_;
  std::list<Block*> blocks_;
  size_t bytes_ = 0, limit_ = size_t{512} << 20;
};

Cache& cache() {
  static Cache* instance = new Cache;  // never destroyed: tensors may outlive every static object
  return *instance;
}

}  // namespace

void* acquire_buffer(size_t bytes) {
  Block* block = cache().take(bytes + kHeader);
  if (!block) block = new_block(bytes + kHeader);
  return reinterpret_cast<char*>(block) + kHeader;
}

void release_buffer(void* data) { cache().give(reinterpret_cast<Block*>(static_cast<char*>(data) - kHeader)); }

size_t release_memory() { return cache().clear(); }

}  // namespace aevb::cpu

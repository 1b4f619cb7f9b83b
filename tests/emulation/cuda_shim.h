// SPDX-License-Identifier: Apache-2.0
// CUDA kernels on the CPU, for tests: g++ -x c++ -DAEVB_EMULATE -I tests/emulation compiles the .cu that nvcc compiles.
//
// Every CUDA thread is a fiber that runs until it returns or waits: at a barrier for the block, at a shuffle for the
// lanes in its mask. Then another thread of the block goes on, chosen by the order: the lowest-numbered that can run,
// the highest, or a random one. Blocks run one after another, in the same order. Threads that are not kept apart by a
// barrier so meet in every sequence, and a missing barrier shows as results that depend on the order.
//
// What CUDA forbids is a std::runtime_error that names the source line, the block and the thread: a barrier or shuffle
// that not all threads reach, a wrong mask, a lane read that is not in it, a write beside a shared array, a launch
// configuration over the limits. Shared memory starts as 0xff in every block, NaN and -1, so that a read of what
// nobody wrote shows. Access out of bounds or misaligned is for AddressSanitizer and UBSan, under which this works.
//
// Not modelled: memory order between threads that run at once, blocks that run at once, atomics, dynamic shared memory,
// __launch_bounds__, grids of two and three dimensions, what the hardware rounds otherwise than a CPU.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(AEVB_EMULATION_UCONTEXT)
#define AEVB_EMULATION_ASSEMBLY 0
#include <ucontext.h>
#else
#define AEVB_EMULATION_ASSEMBLY 1
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// ---- types ----------------------------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// CUDA aligns a vector to its size, so that UBSan sees a misaligned one.
#define AEVB_VECTOR2(T, name)                        \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }
#define AEVB_VECTOR4(T, name)                              \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
AEVB_VECTOR2(unsigned char, uchar)
AEVB_VECTOR4(unsigned char, uchar)
AEVB_VECTOR2(short, short)
AEVB_VECTOR4(short, short)
AEVB_VECTOR2(unsigned short, ushort)
AEVB_VECTOR4(unsigned short, ushort)
AEVB_VECTOR2(int, int)
AEVB_VECTOR4(int, int)
AEVB_VECTOR2(unsigned, uint)
AEVB_VECTOR4(unsigned, uint)
AEVB_VECTOR2(float, float)
AEVB_VECTOR4(float, float)
AEVB_VECTOR2(long long, longlong)
AEVB_VECTOR2(unsigned long long, ulonglong)
#undef AEVB_VECTOR2
#undef AEVB_VECTOR4

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInsufficientDriver,
  cudaErrorNoKernelImageForDevice,
  cudaErrorUnsupportedPtxVersion
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // errors of a launch are thrown instead
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// ---- the machine ----------------------------------------------------------------------------------------------------

namespace aevb::emulation {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxBlocks = 2147483647;

enum class Order { forward = 0, reverse = 1, shuffled = 2 };

// A place in a kernel's source, taken where a function with such a default argument is called.
struct Where {
  const char* file;
  int line;

  static Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Where& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return (slash ? slash + 1 : file) + (":" + std::to_string(line));
  }
};

// A stack, and where what runs on it stopped.
struct Context {
#if AEVB_EMULATION_ASSEMBLY
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

#if AEVB_EMULATION_ASSEMBLY
// Saves what a function must preserve and the stack pointer, and goes on where another context did the same. noipa:
// the compiler must not look inside and conclude that other registers survive.
__attribute__((naked, noipa)) inline void swap_stacks([[maybe_unused]] void** save, [[maybe_unused]] void* load) {
  __asm__(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
      "ret");
}
#endif

// A stack that runs one CUDA thread after another, for as long as none of them waits.
struct Worker : Context {
  char* memory = nullptr;
};

// A static shared array, with a gap on either side that nothing may write to.
struct SharedArray {
  static constexpr size_t kGap = 1024;

  SharedArray(const char* name, size_t bytes, Where at);
  void* in_this_block();
  void check_gaps() const;

  const char* name;
  size_t bytes;
  Where at;
  std::unique_ptr<char[]> memory;
  char* data;
  uint64_t block = 0;  // the last block that used it
};

struct Launch {
  int64_t grid, threads;
};

class Machine {
 public:
  // For tests: the order and its seed, and what was launched.
  Order order = Order::forward;
  uint64_t seed = 0;
  std::vector<Launch> launches;

  // For kernels.
  uint3 thread_idx{}, block_idx{};
  dim3 block_dim, grid_dim;

  void launch(int64_t grid, int64_t threads, void (*body)(void*), void* argument);

  // Waits for the whole block; gives how many threads passed true.
  int barrier(bool predicate, Where at);

  // Waits for the lanes in the mask. Gives the value of lane `source`, or, where it is kBallot, the lanes whose value
  // is not 0.
  static constexpr int kBallot = -1;
  uint64_t collective(uint32_t mask, uint64_t value, int source, Where at);
  int lane() const { return current_ % kWarp; }

  // Throws, naming the thread that runs now.
  [[noreturn]] void fail(Where at, const std::string& what) const;

 private:
  friend struct SharedArray;

  struct Thread {
    Worker* worker = nullptr;  // null before the thread's first instruction and after its last
    Where waits_at{};
    uint64_t value = 0, result = 0;  // a collective's
    int source = 0;
  };
  struct Collective {
    uint32_t mask = 0, arrived = 0;
    Where at{};
  };

  static std::string plural(int n) { return std::to_string(n) + (n == 1 ? " thread" : " threads"); }

  int64_t block_at(int64_t i) const;
  void run_block();
  int choose(uint32_t bits);
  int pick();
  void make_ready(int warp, uint32_t lanes);
  void switch_to(int thread);
  void yield(Where at);
  [[noreturn]] void stalled() const;
  [[noreturn]] void work();
  int next_after_return();
  Worker* idle_worker();
  void prepare(Worker& worker);
  void jump(Context& from, Context& to);
  void arrived_from_jump(Context& self);
  void abandon_block();
  void set_current(int thread) {
    current_ = thread;
    thread_idx.x = static_cast<unsigned>(thread);
  }
  uint32_t lanes_of(int warp) const {
    const int lanes = threads_in_block_ - warp * kWarp;
    return lanes >= kWarp ? ~0u : (1u << lanes) - 1;
  }
  uint64_t random();

  std::mutex one_launch_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  int64_t grid_ = 0;
  uint64_t stride_ = 1, offset_ = 0;  // of shuffled blocks
  uint64_t random_state_ = 0;

  int threads_in_block_ = 0, warps_ = 0, current_ = -1, returned_count_ = 0;
  // Bits. A word of ready_ or returned_ has a warp's lanes; ready_warps_ the warps whose word in ready_ is not 0.
  uint32_t ready_warps_ = 0, ready_[kMaxThreads / kWarp] = {}, returned_[kMaxThreads / kWarp] = {};
  Thread threads_[kMaxThreads];
  Collective collectives_[kMaxThreads];  // by the first thread in the mask
  int arrived_ = 0, predicates_ = 0, barrier_result_ = 0;
  Where barrier_at_{};

  uint64_t blocks_run_ = 0;
  std::vector<SharedArray*> shared_;  // used by the block
  std::exception_ptr error_;

  Context main_;
  Context* previous_ = nullptr;  // who jumped last
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<Worker*> idle_;
};

inline Machine machine;

inline void Machine::fail(Where at, const std::string& what) const {
  throw std::runtime_error("CUDA emulation: " + at.text() + ": " + what + " (block " + std::to_string(block_idx.x) +
                           (current_ < 0 ? "" : ", thread " + std::to_string(current_)) + ")");
}

// ---- fibers

inline void Machine::prepare(Worker& worker) {
  constexpr size_t kStack = 128 << 10;
  if (!worker.memory) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    worker.memory = static_cast<char*>(memory);
    mprotect(memory, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);  // an overflow stops here
    worker.stack = memory;
    worker.stack_size = kStack - 64 * (workers_.size() % 64);  // tops at different offsets share no cache set
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(worker.memory, kStack);
#endif
  void (*entry)() = [] { machine.work(); };
#if AEVB_EMULATION_ASSEMBLY
  // What swap_stacks pops: six registers and an address to return to; then a return address of the entry, never used.
  void** top = reinterpret_cast<void**>(worker.memory + worker.stack_size) - 8;
  std::memset(static_cast<void*>(top), 0, 8 * sizeof *top);
  top[6] = reinterpret_cast<void*>(entry);
  worker.stack_pointer = top;
#else
  getcontext(&worker.registers);
  worker.registers.uc_stack.ss_sp = worker.memory;
  worker.registers.uc_stack.ss_size = worker.stack_size;
  worker.registers.uc_link = nullptr;
  makecontext(&worker.registers, entry, 0);
#endif
}

inline Worker* Machine::idle_worker() {
  if (idle_.empty()) {
    workers_.push_back(std::make_unique<Worker>());
    prepare(*workers_.back());
    return workers_.back().get();
  }
  Worker* worker = idle_.back();
  idle_.pop_back();
  return worker;
}

inline void Machine::jump(Context& from, Context& to) {
  previous_ = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
#endif
#if AEVB_EMULATION_ASSEMBLY
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrived_from_jump(from);
}

inline void Machine::arrived_from_jump([[maybe_unused]] Context& self) {
#ifdef __SANITIZE_ADDRESS__
  // Also tells where the stack lies that was left: the main one's is not known before.
  __sanitizer_finish_switch_fiber(self.fake_stack, &previous_->stack, &previous_->stack_size);
#endif
}

// What a worker does: it runs threads to their ends. A thread that is about to begin runs on the same stack at once.
inline void Machine::work() {
  Worker& self = *threads_[current_].worker;
  arrived_from_jump(self);
  for (;;) {
    int next = -1;
    try {
      body_(argument_);
      next = next_after_return();
    } catch (...) {
      error_ = std::current_exception();
    }
    if (next >= 0 && !threads_[next].worker) {
      threads_[next].worker = &self;
      set_current(next);
      continue;
    }
    idle_.push_back(&self);
    if (next >= 0) {
      set_current(next);
      jump(self, *threads_[next].worker);
    } else {
      jump(self, main_);
    }
  }
}

inline int Machine::next_after_return() {
  threads_[current_].worker = nullptr;
  returned_[current_ / kWarp] |= 1u << lane();
  ++returned_count_;
  const int next = pick();
  if (next < 0 && returned_count_ < threads_in_block_) stalled();
  return next;
}

inline void Machine::switch_to(int thread) {
  Worker& from = *threads_[current_].worker;
  if (!threads_[thread].worker) threads_[thread].worker = idle_worker();
  set_current(thread);
  jump(from, *threads_[thread].worker);
}

// ---- the order

inline uint64_t Machine::random() {  // splitmix64
  uint64_t z = random_state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// One of the set bits, by the order.
inline int Machine::choose(uint32_t bits) {
  if (order == Order::reverse) return 31 - __builtin_clz(bits);
  if (order == Order::shuffled) {
    const int turn = static_cast<int>(random() % 32);
    if (bits >> turn) return turn + __builtin_ctz(bits >> turn);
  }
  return __builtin_ctz(bits);
}

// Takes the next thread to run, or gives -1 where none can.
inline int Machine::pick() {
  if (!ready_warps_) return -1;
  const int warp = choose(ready_warps_), lane = choose(ready_[warp]);
  ready_[warp] &= ~(1u << lane);
  if (!ready_[warp]) ready_warps_ &= ~(1u << warp);
  return warp * kWarp + lane;
}

inline void Machine::make_ready(int warp, uint32_t lanes) {
  ready_[warp] |= lanes;
  ready_warps_ |= 1u << warp;
}

// The number of the i-th block to run. Shuffled: steps that share no divisor with the grid meet every block once.
inline int64_t Machine::block_at(int64_t i) const {
  if (order == Order::forward) return i;
  if (order == Order::reverse) return grid_ - 1 - i;
  return static_cast<int64_t>((offset_ + static_cast<uint64_t>(i) * stride_) % static_cast<uint64_t>(grid_));
}

// ---- waiting

inline void Machine::yield(Where at) {
  threads_[current_].waits_at = at;
  const int next = pick();
  if (next < 0) stalled();
  if (next != current_) switch_to(next);
}

inline void Machine::stalled() const {
  struct Group {
    Where at;
    int count, first;
  };
  std::vector<Group> groups;
  int returned = 0, first_returned = -1;
  for (int t = 0; t < threads_in_block_; ++t) {
    if (returned_[t / kWarp] >> t % kWarp & 1) {
      if (!returned++) first_returned = t;
      continue;
    }
    size_t g = 0;
    while (g < groups.size() && !(groups[g].at == threads_[t].waits_at)) ++g;
    if (g == groups.size()) groups.push_back({threads_[t].waits_at, 0, t});
    ++groups[g].count;
  }
  std::string text = "deadlock: ";
  for (const Group& g : groups) {
    text += plural(g.count) + " of the block's " + std::to_string(threads_in_block_) + " wait at " + g.at.text() +
            " (the first is " + std::to_string(g.first) + "), ";
  }
  if (returned) text += plural(returned) + " returned (the first is " + std::to_string(first_returned) + "), ";
  fail(groups[0].at, text + "and none can go on");
}

inline int Machine::barrier(bool predicate, Where at) {
  if (arrived_ == 0) predicates_ = 0;
  if (arrived_ && !(barrier_at_ == at)) {
    fail(at, "this thread is at a barrier, and others of its block wait at the barrier at " + barrier_at_.text());
  }
  barrier_at_ = at;
  predicates_ += predicate;
  if (++arrived_ == threads_in_block_) {
    arrived_ = 0;
    barrier_result_ = predicates_;  // the next barrier cannot be complete before every thread has read this
    for (int warp = 0; warp < warps_; ++warp) make_ready(warp, lanes_of(warp));
  }
  yield(at);
  return barrier_result_;
}

inline uint64_t Machine::collective(uint32_t mask, uint64_t value, int source, Where at) {
  const int warp = current_ / kWarp, begin = warp * kWarp;
  const auto hex = [](uint32_t m) {
    char text[11];
    std::snprintf(text, sizeof text, "0x%08x", m);
    return std::string(text);
  };
  if (!(mask >> lane() & 1)) {
    fail(at, "the mask " + hex(mask) + " has not the lane that calls, " + std::to_string(lane()));
  }
  if (mask & ~lanes_of(warp)) fail(at, "the mask " + hex(mask) + " has lanes past the block's end");
  if (source != kBallot && !(mask >> source & 1)) {
    fail(at, "reads lane " + std::to_string(source) + ", which is not in the mask " + hex(mask));
  }
  Collective& c = collectives_[begin + __builtin_ctz(mask)];
  if (c.arrived && (c.mask != mask || !(c.at == at))) {
    fail(at,
         "this lane has the mask " + hex(mask) + ", and others of it wait at " + c.at.text() + " with " + hex(c.mask));
  }
  c.mask = mask;
  c.at = at;
  c.arrived |= 1u << lane();
  Thread& self = threads_[current_];
  self.value = value;
  self.source = source;
  if (c.arrived == mask) {
    c.arrived = 0;
    uint64_t ballot = 0;
    for (uint32_t m = mask; m; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      if (threads_[begin + lane].value) ballot |= uint64_t{1} << lane;
    }
    for (uint32_t m = mask; m; m &= m - 1) {
      Thread& thread = threads_[begin + __builtin_ctz(m)];
      thread.result = thread.source == kBallot ? ballot : threads_[begin + thread.source].value;
    }
    make_ready(warp, mask);
  }
  yield(at);
  return self.result;
}

// ---- launches

inline void Machine::launch(int64_t grid, int64_t threads, void (*body)(void*), void* argument) {
  const auto check = [](const char* what, int64_t n, int64_t limit) {
    if (n >= 1 && n <= limit) return;
    throw std::runtime_error("CUDA emulation: a launch with " + std::to_string(n) + " " + what + "; 1 to " +
                             std::to_string(limit) + " are possible");
  };
  check("blocks", grid, kMaxBlocks);
  check("threads a block", threads, kMaxThreads);
  const std::lock_guard<std::mutex> lock(one_launch_);
  launches.push_back({grid, threads});
  body_ = body;
  argument_ = argument;
  grid_ = grid;
  grid_dim = dim3(static_cast<unsigned>(grid));
  block_dim = dim3(static_cast<unsigned>(threads));
  threads_in_block_ = static_cast<int>(threads);
  warps_ = (threads_in_block_ + kWarp - 1) / kWarp;
  random_state_ = seed;
  offset_ = random() % static_cast<uint64_t>(grid);
  do {
    stride_ = 1 + random() % static_cast<uint64_t>(grid);
  } while (std::gcd(stride_, static_cast<uint64_t>(grid)) != 1);
  for (int64_t i = 0; i < grid; ++i) {
    block_idx.x = static_cast<unsigned>(block_at(i));
    run_block();
  }
}

inline void Machine::run_block() {
  ++blocks_run_;
  returned_count_ = 0;
  for (int warp = 0; warp < warps_; ++warp) {
    make_ready(warp, lanes_of(warp));
    returned_[warp] = 0;
  }
  const int first = pick();
  Worker* worker = threads_[first].worker = idle_worker();
  set_current(first);
  jump(main_, *worker);
  current_ = -1;
  if (error_) {
    abandon_block();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
  for (const SharedArray* array : std::exchange(shared_, {})) array->check_gaps();
}

// After an error: threads that wait are given up, with what their stacks hold.
inline void Machine::abandon_block() {
  arrived_ = 0;
  ready_warps_ = 0;
  for (uint32_t& lanes : ready_) lanes = 0;
  shared_.clear();
  for (Thread& thread : threads_) thread = Thread{};
  for (Collective& collective : collectives_) collective = Collective{};
  idle_.clear();
  for (const auto& worker : workers_) {
    prepare(*worker);
    idle_.push_back(worker.get());
  }
}

// ---- shared memory

inline SharedArray::SharedArray(const char* name, size_t bytes, Where at) : name(name), bytes(bytes), at(at) {
  constexpr size_t kAlign = 128;
  memory.reset(new char[kAlign + kGap + bytes + kGap]);
  data = memory.get() + kGap;
  data += (kAlign - reinterpret_cast<uintptr_t>(data) % kAlign) % kAlign;
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(data - kGap, kGap);
  __asan_poison_memory_region(data + bytes, kGap);
#endif
}

// The first thread of a block that comes here fills the array, before any can use it.
inline void* SharedArray::in_this_block() {
  if (block != machine.blocks_run_) {
    block = machine.blocks_run_;
    machine.shared_.push_back(this);
#ifdef __SANITIZE_ADDRESS__
    std::memset(data, 0xff, bytes);
#else
    std::memset(data - kGap, 0xff, kGap + bytes + kGap);
#endif
  }
  return data;
}

inline void SharedArray::check_gaps() const {
#ifndef __SANITIZE_ADDRESS__
  for (ptrdiff_t i = -static_cast<ptrdiff_t>(kGap); i < static_cast<ptrdiff_t>(bytes + kGap); ++i) {
    if (i == 0) i = static_cast<ptrdiff_t>(bytes);
    if (static_cast<unsigned char>(data[i]) == 0xff) continue;
    machine.fail(at, std::string("a thread wrote at byte ") + std::to_string(i) + " of the shared array " + name +
                         ", which has " + std::to_string(bytes));
  }
#endif
}

// A number of blocks or threads; 64 bits, so that one too large is seen.
struct Extent {
  int64_t n;
  Extent(int64_t n) : n(n) {}
  Extent(dim3 d) : n(d.x) {
    if (d.y != 1 || d.z != 1) throw std::runtime_error("CUDA emulation: grids and blocks have one dimension here");
  }
};

template <class... P, class... A>
void launch(void (*kernel)(P...), Extent grid, Extent block, cudaStream_t, A&&... arguments) {
  std::tuple<P...> parameters(std::forward<A>(arguments)...);  // converted once, copied every call
  auto thread = [&] { std::apply(kernel, parameters); };
  machine.launch(grid.n, block.n, [](void* t) { (*static_cast<decltype(thread)*>(t))(); }, &thread);
}

// ---- shuffles

enum class Shuffle { idx, up, down, xor_ };

// The lane that shfl.sync reads, by PTX's rules: the operand counts modulo 32, and a source outside of the calling
// lane's segment is the lane itself, but for xor, which may read from earlier segments.
inline int shuffle_source(Shuffle kind, int lane, int operand, int width) {
  const int b = operand & (kWarp - 1), first = lane & ~(width - 1), last = first + width - 1;
  switch (kind) {
    case Shuffle::idx: return first | (b & (width - 1));
    case Shuffle::up: return lane - b >= first ? lane - b : lane;
    case Shuffle::down: return lane + b <= last ? lane + b : lane;
    case Shuffle::xor_: return (lane ^ b) <= last ? lane ^ b : lane;
  }
  __builtin_unreachable();
}

template <class T>
T shuffle(Shuffle kind, unsigned mask, T value, int operand, int width, Where at) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles take numbers of 32 or 64 bits");
  if (width < 1 || width > kWarp || (width & (width - 1))) {
    machine.fail(at, "a shuffle of width " + std::to_string(width) + "; a power of two up to 32 is possible");
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = machine.collective(mask, bits, shuffle_source(kind, machine.lane(), operand, width), at);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned ballot(unsigned mask, bool predicate, Where at) {
  return static_cast<unsigned>(machine.collective(mask, predicate, Machine::kBallot, at));
}

}  // namespace aevb::emulation

// ---- CUDA's names ---------------------------------------------------------------------------------------------------

#define AEVB_LAUNCH(kernel, grid, block, stream, ...) \
  ::aevb::emulation::launch(kernel, grid, block, stream, __VA_ARGS__)

#define AEVB_SHARED(T, name, n)                                                                                  \
  static ::aevb::emulation::SharedArray name##_memory(#name, sizeof(T) * (n), ::aevb::emulation::Where::here()); \
  T(&name)[n] = *static_cast<T(*)[n]>(name##_memory.in_this_block())

static const uint3& threadIdx = ::aevb::emulation::machine.thread_idx;
static const uint3& blockIdx = ::aevb::emulation::machine.block_idx;
static const dim3& blockDim = ::aevb::emulation::machine.block_dim;
static const dim3& gridDim = ::aevb::emulation::machine.grid_dim;
constexpr int warpSize = ::aevb::emulation::kWarp;

#define AEVB_HERE ::aevb::emulation::Where at = ::aevb::emulation::Where::here()

inline void __syncthreads(AEVB_HERE) { ::aevb::emulation::machine.barrier(false, at); }
inline int __syncthreads_count(int p, AEVB_HERE) { return ::aevb::emulation::machine.barrier(p, at); }
inline int __syncthreads_or(int p, AEVB_HERE) { return ::aevb::emulation::machine.barrier(p, at) > 0; }
inline int __syncthreads_and(int p, AEVB_HERE) { return ::aevb::emulation::machine.barrier(!p, at) == 0; }

inline void __syncwarp(unsigned mask = ~0u, AEVB_HERE) { ::aevb::emulation::ballot(mask, false, at); }
inline unsigned __ballot_sync(unsigned mask, int p, AEVB_HERE) { return ::aevb::emulation::ballot(mask, p, at); }
inline int __any_sync(unsigned mask, int p, AEVB_HERE) { return ::aevb::emulation::ballot(mask, p, at) != 0; }
inline int __all_sync(unsigned mask, int p, AEVB_HERE) { return ::aevb::emulation::ballot(mask, !p, at) == 0; }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, AEVB_HERE) {
  return ::aevb::emulation::shuffle(::aevb::emulation::Shuffle::idx, mask, value, source, width, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, AEVB_HERE) {
  return ::aevb::emulation::shuffle(::aevb::emulation::Shuffle::up, mask, value, static_cast<int>(delta), width, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, AEVB_HERE) {
  return ::aevb::emulation::shuffle(::aevb::emulation::Shuffle::down, mask, value, static_cast<int>(delta), width, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, AEVB_HERE) {
  return ::aevb::emulation::shuffle(::aevb::emulation::Shuffle::xor_, mask, value, lanes, width, at);
}
#undef AEVB_HERE

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// One thread block on the CPU: its threads as fibers that switch wherever a thread would wait, in a random order. What CUDA files name, enough
// of it for the kernels of this project.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __host__

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
struct dim3 {
  unsigned int x = 0;
};

namespace emulation {

constexpr int kMostThreads = 384;
constexpr size_t kStack = 256 * 1024;

// The first thing that went wrong; every later block of the same call is skipped.
inline const char* failure = nullptr;
void stop(const char* what);

inline float from_bits(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t to_bits(float value) {  // round to nearest even
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if (std::isnan(value)) {
    return 0x7FFF;
  }
  return static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
}

struct Barrier {  // mbarrier object
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phases = 0;
  void settle() {
    if (pending == 0 && bytes == 0) {
      ++phases;
      pending = count;
    }
  }
};
struct Meeting {  // named barrier
  int arrived = 0;
  uint64_t generation = 0;
  void arrive(int threads) {
    if (++arrived == threads) {
      arrived = 0;
      ++generation;
    }
  }
};
struct Product {
  float* d;
  int columns;
  uint64_t a, b;
  bool from_registers, add;
  uint32_t fragment[4];
};

struct Block {
  ucontext_t scheduler, fibers[kMostThreads];
  std::vector<std::unique_ptr<char[]>> stacks;
  std::function<bool()> ready[kMostThreads];
  const char* waits_for[kMostThreads] = {};  // for the message of a deadlock
  uint32_t waits_at[kMostThreads] = {};
  bool finished[kMostThreads] = {};
  int threads = kMostThreads;
  int current = -1;  // the running thread; -1: the scheduler
  std::map<uint32_t, Barrier> barriers;
  Meeting meetings[16], warps[kMostThreads / 32];
  double exchange[kMostThreads / 32][32];
  struct Copy {
    std::function<void()> run;
  };
  std::vector<Copy> copies;
  std::vector<std::vector<Product>> open[kMostThreads];  // groups of a thread: committed ones, and the one being collected last
  std::mt19937 random;
  bool eager = false;
  std::function<void()> body;
};

inline Block* block = nullptr;

inline void stop(const char* what) {
  failure = failure == nullptr ? what : failure;
  if (block != nullptr && block->current >= 0) {
    swapcontext(&block->fibers[block->current], &block->scheduler);  // not to return
  }
}

inline void wait_until(const char* what, uint32_t at, std::function<bool()> condition) {
  if (!condition()) {
    block->waits_for[block->current] = what;
    block->waits_at[block->current] = at;
    block->ready[block->current] = std::move(condition);
    swapcontext(&block->fibers[block->current], &block->scheduler);
  }
}

}  // namespace emulation

inline dim3 blockIdx, gridDim;
struct ThreadIndex {
  struct {
    operator unsigned int() const { return static_cast<unsigned int>(emulation::block->current); }
  } x;
};
inline ThreadIndex threadIdx;

inline void meet(emulation::Meeting& meeting, int threads, const char* what) {
  const uint64_t before = meeting.generation;
  meeting.arrive(threads);
  emulation::wait_until(what, static_cast<uint32_t>(threads), [&meeting, before] { return meeting.generation != before; });
}
inline void __syncthreads() {
  meet(emulation::block->meetings[0], emulation::block->threads, "the block");
}
inline void __syncwarp() {
  meet(emulation::block->warps[emulation::block->current / 32], 32, "its warp");
}
template <typename T>
T __shfl_sync(unsigned int, T value, int) {
  return value;  // used for values that are the same in all lanes
}
template <typename T>
T __shfl_xor_sync(unsigned int, T value, int lanes) {
  double(&slots)[32] = emulation::block->exchange[emulation::block->current / 32];
  const int lane = emulation::block->current % 32;
  __syncwarp();
  slots[lane] = static_cast<double>(value);
  __syncwarp();
  return static_cast<T>(slots[lane ^ lanes]);
}

namespace emulation {

inline void enter() {
  block->body();
  block->finished[block->current] = true;
  swapcontext(&block->fibers[block->current], &block->scheduler);
}

// Runs one block of `body`. Threads and pending copies go on in a random order; stops the program when nothing can go on.
inline void run_block(unsigned int index, unsigned int blocks, unsigned int seed, bool eager, std::function<void()> body, int threads) {
  if (failure != nullptr) {
    return;
  }
  auto owner = std::make_unique<Block>();
  block = owner.get();
  blockIdx.x = index;
  gridDim.x = blocks;
  block->random.seed(seed + index);
  block->eager = eager;
  block->threads = threads;
  block->body = std::move(body);
  for (int t = 0; t < threads; ++t) {
    block->stacks.emplace_back(new char[kStack]);
    getcontext(&block->fibers[t]);
    block->fibers[t].uc_stack.ss_sp = block->stacks[t].get();
    block->fibers[t].uc_stack.ss_size = kStack;
    block->fibers[t].uc_link = nullptr;
    makecontext(&block->fibers[t], enter, 0);
  }
  int left = threads;
  while (left > 0 && failure == nullptr) {
    bool moved = false;
    const int start = static_cast<int>(block->random() % (threads / 32)) * 32;
    for (int i = 0; i < threads; ++i) {
      const int t = (start + i) % threads;
      if (block->finished[t] || (block->ready[t] && !block->ready[t]())) {
        continue;
      }
      block->ready[t] = nullptr;
      block->current = t;
      swapcontext(&block->scheduler, &block->fibers[t]);
      block->current = -1;
      left -= block->finished[t];
      moved = true;
    }
    // Copies land in any order, sometimes long after they were asked for.
    if (!block->copies.empty() && (!moved || block->random() % 4 == 0)) {
      const size_t chosen = block->random() % block->copies.size();
      const std::function<void()> run = std::move(block->copies[chosen].run);
      block->copies.erase(block->copies.begin() + static_cast<int64_t>(chosen));
      run();
      moved = true;
    }
    if (!moved) {
      for (int t = 0; t < threads; t += t == 0 ? 32 : 1) {
        if (!block->finished[t] && (t % 32 == 0 || block->waits_for[t] != block->waits_for[t - 1])) {
          std::fprintf(stderr, "thread %d waits for %s %u\n", t, block->waits_for[t], block->waits_at[t]);
        }
      }
      stop("deadlock: every thread waits");
    }
  }
  if (failure == nullptr && !block->copies.empty()) {
    stop("copies were left over");
  }
  block = nullptr;
}

}  // namespace emulation

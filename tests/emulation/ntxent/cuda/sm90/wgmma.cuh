// Stands in for csrc/ntxent/cuda/sm90/wgmma.cuh and ptx.cuh when the kernels are compiled for the CPU. What the hardware may do late is done
// late here: copies land at a random later moment, their place being NaN until then, and matrix products read shared memory only when they are
// waited for (or at once: `eager`). A stage that is overwritten too early, a missing wait or a wrong parity thus shows as NaN or as a deadlock.
// Layouts are written from the PTX ISA, not from schedule_cuda.h.
#pragma once

#include "fibers.h"

#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_ARCH_FEAT_SM90_ALL 1

// A matrix in memory as the copy engine sees it: [rows][columns] of 2-byte values and a box of [box_rows][64].
struct CUtensorMap {
  const uint16_t* values;
  int64_t rows, columns, stride;
  int box_rows;
};

namespace cellfast::ntxent::sm90 {

struct Bfloat16 {};
constexpr uint32_t kSharedStart = 48;  // the kernel must align its base itself
inline char raw[232448 + 64];  // the kernels' `extern __shared__ char raw[]`

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - raw) + kSharedStart;
}
inline char* shared_pointer(uint32_t address) {
  if (address < kSharedStart || address >= kSharedStart + 232448) {
    emulation::stop("an address outside shared memory");
  }
  return raw + (address - kSharedStart);
}

inline emulation::Barrier& barrier_at(uint32_t address) {
  if (address % 8 != 0 || emulation::block->barriers.count(address) == 0) {
    emulation::stop("use of a barrier that was not initialised");
  }
  return emulation::block->barriers[address];
}
inline void barrier_init(uint32_t address, uint32_t arrivals) {
  emulation::block->barriers[address] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}
inline void barrier_init_done() {}
inline void barrier_arrive(uint32_t address) {
  emulation::Barrier& barrier = barrier_at(address);
  if (--barrier.pending < 0) {
    emulation::stop("more arrivals than a phase has");
  }
  barrier.settle();
}
inline void barrier_expect(uint32_t address, uint32_t bytes) {
  barrier_at(address).bytes += bytes;
  barrier_arrive(address);
}
inline void barrier_wait(uint32_t address, uint32_t parity) {
  emulation::Barrier* barrier = &barrier_at(address);
  emulation::wait_until("the barrier at", address, [barrier, parity] { return (barrier->phases & 1) != parity; });
}
inline void shared_fence() {}
inline void turn_wait(int name, int threads) {
  meet(emulation::block->meetings[name], threads, "its turn");
}
inline void turn_give(int name, int threads) {
  emulation::block->meetings[name].arrive(threads);
}

inline void finish_copy(uint32_t address, int64_t bytes) {
  emulation::Barrier& barrier = barrier_at(address);
  barrier.bytes -= bytes;
  barrier.settle();
}
inline void copy_box(uint32_t destination, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  if (destination % 1024 != 0) {
    emulation::stop("a swizzled copy to an address that is no multiple of 1024");
  }
  std::memset(shared_pointer(destination), 0xFF, map->box_rows * 128);
  emulation::block->copies.push_back({[=] {
    for (int r = 0; r < map->box_rows; ++r) {
      for (int c = 0; c < 64; ++c) {
        const bool inside = row + r < map->rows && column + c < map->columns;
        const uint16_t value = inside ? map->values[(row + r) * map->stride + column + c] : 0;
        const uint32_t linear = destination + r * 128 + c * 2;
        const uint32_t unit = (linear >> 4) & 7, line = (linear >> 7) & 7;
        std::memcpy(shared_pointer((linear & ~0x70u) | ((unit ^ line) << 4)), &value, 2);
      }
    }
    finish_copy(barrier, map->box_rows * 128);
  }});
}
inline void copy_bytes(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  if (destination % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0 || bytes % 16 != 0) {
    emulation::stop("a bulk copy that is not aligned to 16 bytes");
  }
  std::memset(shared_pointer(destination), 0xFF, bytes);
  emulation::block->copies.push_back({[=] {
    std::memcpy(shared_pointer(destination), source, bytes);
    finish_copy(barrier, bytes);
  }});
}
inline void prefetch_map(const CUtensorMap*) {}
template <int>
void give_registers() {}
template <int>
void take_registers() {}

// Element (mn, k) of an operand by its descriptor; `transposed` is MN-major.
inline float operand(uint64_t descriptor, int mn, int k, bool transposed) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = ((descriptor >> 16) & 0x3FFF) << 4, stride = ((descriptor >> 32) & 0x3FFF) << 4;
  if ((descriptor >> 62) != 1 || ((descriptor >> 49) & 7) != 0) {
    emulation::stop("a descriptor that is not the 128-byte swizzle with base offset 0");
  }
  const uint32_t linear = transposed ? start + (mn % 64) * 2 + (mn / 64) * leading + (k % 8) * 128 + (k / 8) * stride
                                     : start + (mn % 8) * 128 + (mn / 8) * stride + k * 2;
  uint16_t bits;
  std::memcpy(&bits, shared_pointer((linear & ~0x70u) | ((((linear >> 4) & 7) ^ ((linear >> 7) & 7)) << 4)), 2);
  return emulation::from_bits(bits);
}

// This thread's accumulators of one m64nNk16 product: row 16 * warp + lane / 4 (+ 8), columns 8 c + 2 (lane % 4) (+ 1).
inline void run_product(const emulation::Product& p) {
  const int thread = emulation::block->current % 128, lane = thread % 32;
  float b[16][2];
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * (thread / 32) + lane / 4 + 8 * half;
    float a[16];
    for (int k = 0; k < 16; ++k) {
      if (p.from_registers) {
        // The fragment of a row lies in the four lanes of a quad: fetched from their queues, which hold the same product.
        const int owner = emulation::block->current - lane % 4 + (k % 8) / 2;
        const std::vector<emulation::Product>& peers = emulation::block->open[owner].front();
        const size_t index = &p - emulation::block->open[emulation::block->current].front().data();
        a[k] = emulation::from_bits(static_cast<uint16_t>(peers[index].fragment[half + 2 * (k / 8)] >> (16 * (k % 2))));
      } else {
        a[k] = operand(p.a, row, k, false);
      }
    }
    for (int column = 0; column < p.columns; column += 8) {
      for (int odd = 0; odd < 2; ++odd) {
        float& d = p.d[column / 2 + 2 * half + odd];
        float sum = p.add ? d : 0.0f;
        for (int k = 0; k < 16; ++k) {
          b[k][odd] = operand(p.b, column + 2 * (lane % 4) + odd, k, p.from_registers);
          sum += a[k] * b[k][odd];
        }
        d = sum;
      }
    }
  }
}

// All threads of a warpgroup come here together; a queue is dropped only when no other lane needs it any more.
template <int kPending>
void product_wait() {
  emulation::Meeting& group = emulation::block->meetings[12 + emulation::block->current / 128];
  std::vector<std::vector<emulation::Product>>& open = emulation::block->open[emulation::block->current];
  while (open.size() > kPending + 1) {  // the last one is still being collected
    meet(group, 128, "its warpgroup");
    for (const emulation::Product& p : open.front()) {
      run_product(p);
    }
    meet(group, 128, "its warpgroup");
    open.erase(open.begin());
  }
}
inline std::vector<emulation::Product>& collecting() {
  std::vector<std::vector<emulation::Product>>& open = emulation::block->open[emulation::block->current];
  if (open.empty()) {
    open.emplace_back();
  }
  return open.back();
}
inline void product_fence() {}
inline void product_commit() {
  collecting();
  emulation::block->open[emulation::block->current].emplace_back();
  if (emulation::block->eager) {
    product_wait<0>();
  }
}
template <int kRegisters>
void multiply(float (&d)[kRegisters], uint64_t a, uint64_t b, bool add, Bfloat16) {
  collecting().push_back({d, 2 * kRegisters, a, b, false, add, {}});
}
template <int kRegisters>
void multiply(float (&d)[kRegisters], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, Bfloat16) {
  collecting().push_back({d, 2 * kRegisters, 0, b, true, true, {a0, a1, a2, a3}});
}
template <typename T, int kRegisters>
void hold(T (&)[kRegisters]) {}
inline uint32_t pack(float low, float high, Bfloat16) {
  return emulation::to_bits(low) | (static_cast<uint32_t>(emulation::to_bits(high)) << 16);
}

}  // namespace cellfast::ntxent::sm90

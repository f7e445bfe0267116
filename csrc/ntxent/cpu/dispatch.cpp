// Which instruction set's kernels run: the best this processor has, unless another is asked for (tests, measurements).
#include <atomic>
#include <cstring>
#include <string>

#include "ntxent/cpu/tile.h"

namespace cellfast::ntxent::cpu {
namespace {

enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kEmulatedBf16 = 4 };

const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16", "emulated_bf16"};

Level supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return kAvx2;
  }
#endif
  return kPortable;
}

std::atomic<int> chosen{-1};

int level() {
  int current = chosen.load(std::memory_order_relaxed);
  if (current < 0) {
    current = supported();
    chosen.store(current, std::memory_order_relaxed);
  }
  return current;
}

template <typename T>
const TileKernels<T>& pick(const TileKernels<T>& portable_kernels, [[maybe_unused]] const TileKernels<T>* avx2_kernels,
                           [[maybe_unused]] const TileKernels<T>* avx512_kernels) {
  switch (level()) {
    case kAvx512Bf16:
    case kAvx512: return *avx512_kernels;
    case kAvx2: return *avx2_kernels;
    default: return portable_kernels;
  }
}

}  // namespace

#if defined(__x86_64__)
#define CELLFAST_X86(kernels) &kernels
#else
#define CELLFAST_X86(kernels) nullptr
#endif

template <>
const TileKernels<float>& tile_kernels<float>() {
  return pick(portable::kFloat, CELLFAST_X86(avx2::kFloat), CELLFAST_X86(avx512::kFloat));
}

template <>
const TileKernels<double>& tile_kernels<double>() {
  return pick(portable::kDouble, CELLFAST_X86(avx2::kDouble), CELLFAST_X86(avx512::kDouble));
}

const TileKernels<float>* pair_kernels() {
  switch (level()) {
    case kAvx512Bf16: return CELLFAST_X86(avx512_bf16::kPairs);
    case kEmulatedBf16: return &emulated_bf16::kPairs;
    default: return nullptr;
  }
}

std::string kernel_names(bool supported_only) {
  std::string found;
  const int best = supported();
  for (int candidate = 0; candidate <= kEmulatedBf16; ++candidate) {
    // The emulated ones differ from portable ones in one instruction, and run everywhere.
    if (!supported_only || candidate <= best || candidate == kEmulatedBf16) {
      found += (found.empty() ? "" : ",") + std::string(names[candidate]);
    }
  }
  return found;
}

const char* choose_kernels(const char* instruction_set) {
  if (std::strcmp(instruction_set, "") == 0) {
    return names[level()];
  }
  const int best = supported();
  if (std::strcmp(instruction_set, names[kEmulatedBf16]) == 0) {
    chosen.store(kEmulatedBf16);
    return names[kEmulatedBf16];
  }
  for (int candidate = 0; candidate <= best; ++candidate) {
    if (std::strcmp(instruction_set, names[candidate]) == 0 || (candidate == best && std::strcmp(instruction_set, "auto") == 0)) {
      chosen.store(candidate);
      return names[candidate];
    }
  }
  return nullptr;
}

}  // namespace cellfast::ntxent::cpu

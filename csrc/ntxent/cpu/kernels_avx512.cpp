// The tile kernels for processors with AVX-512 (F, BW, VL, DQ).
#include <cstdint>

#include <math.h>

#include "ntxent/cpu/tile.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
#define CELLFAST_KERNELS avx512
#define CELLFAST_VECTOR_BYTES 64
#define CELLFAST_ROWS 8
#define CELLFAST_VECTORS 3
#define CELLFAST_OUT_ROWS 12
#define CELLFAST_PAIRS 0
#include "ntxent/cpu/tile_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

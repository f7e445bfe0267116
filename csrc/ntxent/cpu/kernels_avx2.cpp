// The tile kernels for processors with AVX2 and FMA.
#include <cstdint>

#include <math.h>

#include "ntxent/cpu/tile.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define CELLFAST_KERNELS avx2
#define CELLFAST_VECTOR_BYTES 32
#define CELLFAST_ROWS 4
#define CELLFAST_VECTORS 3
#define CELLFAST_OUT_ROWS 6
#define CELLFAST_PAIRS 0
#include "ntxent/cpu/tile_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

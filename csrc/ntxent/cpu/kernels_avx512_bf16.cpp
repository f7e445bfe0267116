// The tile kernels of bfloat16 pairs for processors with AVX-512 BF16.
#include <cstdint>

#include <immintrin.h>
#include <math.h>

#include "ntxent/cpu/tile.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif
#define CELLFAST_KERNELS avx512_bf16
#define CELLFAST_VECTOR_BYTES 64
#define CELLFAST_ROWS 8
#define CELLFAST_VECTORS 3
#define CELLFAST_OUT_ROWS 12
#define CELLFAST_PAIRS 1
#define CELLFAST_PAIR_DOT(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#include "ntxent/cpu/tile_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

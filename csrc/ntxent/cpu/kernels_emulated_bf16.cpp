// The tile kernels of bfloat16 pairs for any processor: slower than float's, they show on every machine what avx512_bf16 computes.
#include <cstdint>

#include <math.h>

#include "ntxent/cpu/tile.h"

#define CELLFAST_KERNELS emulated_bf16
#define CELLFAST_VECTOR_BYTES 16
#define CELLFAST_ROWS 2
#define CELLFAST_VECTORS 3
#define CELLFAST_OUT_ROWS 4
#define CELLFAST_PAIRS 1
#include "ntxent/cpu/tile_kernels.h"

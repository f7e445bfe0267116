// The tile kernels for any processor: SSE2 on x86-64, NEON on Arm.
#include <cstdint>

#include <math.h>

#include "ntxent/cpu/tile.h"

#define CELLFAST_KERNELS portable
#define CELLFAST_VECTOR_BYTES 16
#define CELLFAST_ROWS 2
#define CELLFAST_VECTORS 3
#define CELLFAST_OUT_ROWS 4
#define CELLFAST_PAIRS 0
#include "ntxent/cpu/tile_kernels.h"

// Matrix products of one warpgroup: D[64, n] (+)= A[64, 16] B[16, n], n chosen by the number of accumulators (n / 2). Asynchronous: between
// product_fence() and product_wait() nothing else may touch the registers. PTX ISA: wgmma.mma_async.
#pragma once

#include "ntxent/cuda/sm90/ptx.cuh"

namespace cellfast::ntxent::sm90 {

// The accumulators %0 ... and their operands.
#define CELLFAST_TEXT_24 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define CELLFAST_TEXT_32 CELLFAST_TEXT_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define CELLFAST_TEXT_64 \
  CELLFAST_TEXT_32          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CELLFAST_TEXT_128 \
  CELLFAST_TEXT_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CELLFAST_D8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define CELLFAST_D24(d) CELLFAST_D8(d, 0), CELLFAST_D8(d, 8), CELLFAST_D8(d, 16)
#define CELLFAST_D32(d) CELLFAST_D24(d), CELLFAST_D8(d, 24)
#define CELLFAST_D64(d) CELLFAST_D32(d), CELLFAST_D8(d, 32), CELLFAST_D8(d, 40), CELLFAST_D8(d, 48), CELLFAST_D8(d, 56)
#define CELLFAST_D128(d)                                                                                                            \
  CELLFAST_D64(d), CELLFAST_D8(d, 64), CELLFAST_D8(d, 72), CELLFAST_D8(d, 80), CELLFAST_D8(d, 88), CELLFAST_D8(d, 96), \
      CELLFAST_D8(d, 104), CELLFAST_D8(d, 112), CELLFAST_D8(d, 120)

// A and B K-major in shared memory; `add` false overwrites the accumulators.
#define CELLFAST_FROM_SHARED(ELEMENT, TYPE, COLUMNS, REGISTERS, A, B, ADD)                                                        \
  __device__ inline void multiply(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool add, ELEMENT) {                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD                                                                      \
                 ", 0;\n"                                                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" CELLFAST_TEXT_##REGISTERS "}, " A     \
                 ", " B ", p, 1, 1, 0, 0;\n}\n"                                                                                 \
                 : CELLFAST_D##REGISTERS(d)                                                                                       \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                                   \
  }

// A in registers, B N-major in shared memory; always adds.
#define CELLFAST_FROM_REGISTERS(ELEMENT, TYPE, COLUMNS, REGISTERS, A, B)                                                          \
  __device__ inline void multiply(float (&d)[REGISTERS], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, ELEMENT) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" CELLFAST_TEXT_##REGISTERS "}, {" A    \
                 "}, " B ", 1, 1, 1, 1;\n"                                                                                        \
                 : CELLFAST_D##REGISTERS(d)                                                                                       \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                                                   \
  }

#define CELLFAST_PRODUCTS(ELEMENT, TYPE)                                                               \
  CELLFAST_FROM_SHARED(ELEMENT, TYPE, 48, 24, "%24", "%25", "%26")                                     \
  CELLFAST_FROM_SHARED(ELEMENT, TYPE, 64, 32, "%32", "%33", "%34")                                     \
  CELLFAST_FROM_SHARED(ELEMENT, TYPE, 128, 64, "%64", "%65", "%66")                                    \
  CELLFAST_FROM_REGISTERS(ELEMENT, TYPE, 64, 32, "%32, %33, %34, %35", "%36")                          \
  CELLFAST_FROM_REGISTERS(ELEMENT, TYPE, 128, 64, "%64, %65, %66, %67", "%68")                         \
  CELLFAST_FROM_REGISTERS(ELEMENT, TYPE, 256, 128, "%128, %129, %130, %131", "%132")

CELLFAST_PRODUCTS(__nv_bfloat16, "bf16")
CELLFAST_PRODUCTS(__half, "f16")

#undef CELLFAST_PRODUCTS
#undef CELLFAST_FROM_REGISTERS
#undef CELLFAST_FROM_SHARED

}  // namespace cellfast::ntxent::sm90

// The forward kernel for compute capability 9.0: sums of exponentials of every row over its negatives, similarities never stored.
//
// One block per multiprocessor walks its tiles (ForwardWalk). Warp 0 copies with the tensor copy engine, warp 1 adds finished sums to the
// block's own array in device memory (so the order of additions is fixed), two warpgroups multiply and exponentiate in turns.
#pragma once

#include "ntxent/cuda/sm90/epilogue.h"
#include "ntxent/cuda/sm90/wgmma.cuh"

namespace cellfast::ntxent::sm90 {

struct ForwardArguments {
  ForwardShape shape;
  RowBlocks rows;
  ForwardTiles tiles;
  const double* temperature;
  float* sums;            // [workers, sums_stride]: by padded local row; zero at the start
  int64_t sums_stride;
  float* positives;       // [local rows]: accumulator of each row with its positive
};

constexpr int kTurnThreads = 256;

// Halves `count` values over a pair of lanes: the upper lane keeps the upper half.
template <int kCount>
__device__ inline void reduce_halves(float (&values)[32], int lane) {
  const bool upper = lane & kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float keep = upper ? values[i + kCount] : values[i], send = upper ? values[i] : values[i + kCount];
    values[i] = keep + __shfl_xor_sync(0xffffffff, send, kCount);
  }
}

template <typename T, int kSub>
__device__ inline void forward_copy(const CUtensorMap* row_map, const CUtensorMap* column_map, const ForwardArguments& a, uint32_t base) {
  const ForwardShape& shape = a.shape;
  const uint32_t barriers = base + shape.barrier_offset();
  const uint32_t rows_full = barriers, rows_empty = barriers + 8, full = barriers + 64, empty = barriers + 128;
  uint32_t stage = 0, parity = 0, run = 0;
  ForwardWalk walk(a.tiles, blockIdx.x);
  ForwardTile tile;
  while (walk.next(tile)) {
    if (tile.begins) {
      barrier_wait(rows_empty, (run & 1) ^ 1);
      barrier_expect(rows_full, shape.row_bytes());
      const int row = a.rows.global(tile.row_block);
#pragma unroll 1
      for (int c = 0; c < shape.chunks; ++c) {
#pragma unroll 1
        for (int b = 0; b < 2 * kSub; ++b) {
          copy_box(base + (c * 2 * kSub + b) * kRowBox * kChunkBytes, row_map, c * kChunk, row + b * kRowBox, rows_full);
        }
      }
      ++run;
    }
#pragma unroll 1
    for (int c = 0; c < shape.chunks; ++c) {
      barrier_wait(empty + 8 * stage, parity ^ 1);
      barrier_expect(full + 8 * stage, ForwardShape::kStageBytes);
      copy_box(base + shape.ring_offset() + stage * ForwardShape::kStageBytes, column_map, c * kChunk,
               tile.column_block * kForwardColumns, full + 8 * stage);
      if (++stage == static_cast<uint32_t>(shape.stages)) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

__device__ inline void add_to(float* target, float4 value) {
  float4* place = reinterpret_cast<float4*>(target);
  const float4 old = *place;
  *place = make_float4(old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w);
}

// One warp; a place of the array belongs to the same lane always (its index / 4 modulo 32), so no lane waits for another.
template <int kSub>
__device__ inline void forward_add(const ForwardArguments& a, uint32_t base, const char* shared, int lane) {
  const uint32_t sum_full = base + a.shape.barrier_offset() + 192, sum_empty = sum_full + 16;
  const char* slots = shared + a.shape.sums_offset();
  float* sums = a.sums + blockIdx.x * a.sums_stride;
  uint32_t message = 0;
  ForwardWalk walk(a.tiles, blockIdx.x);
  ForwardTile tile;
  while (walk.next(tile)) {
    if (!a.tiles.rows_only(tile.row_block, tile.column_block)) {
      barrier_wait(sum_full + 8 * (message & 1), (message >> 1) & 1);
      const float4* values = reinterpret_cast<const float4*>(slots + (message & 1) * ForwardShape::kSumSlotBytes);
      float4 total = values[lane];
#pragma unroll
      for (int warp = 1; warp < kConsumerWarps; ++warp) {
        const float4 more = values[warp * (kForwardColumns / 4) + lane];
        total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w);
      }
      add_to(sums + tile.column_block * kForwardColumns + 4 * lane, total);
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(sum_empty + 8 * (message & 1));
      }
      ++message;
    }
    if (tile.ends) {
      barrier_wait(sum_full + 8 * (message & 1), (message >> 1) & 1);
      const float4* values = reinterpret_cast<const float4*>(slots + (message & 1) * ForwardShape::kSumSlotBytes);
#pragma unroll
      for (int part = 0; part < kSub; ++part) {
        add_to(sums + tile.row_block * (128 * kSub) + 128 * part + 4 * lane, values[32 * part + lane]);
      }
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(sum_empty + 8 * (message & 1));
      }
      ++message;
    }
  }
}

template <typename T, int kSub>
__device__ inline void forward_multiply(const ForwardArguments& a, uint32_t base, char* shared, int group, int thread) {
  const ForwardShape& shape = a.shape;
  const uint32_t barriers = base + shape.barrier_offset();
  const uint32_t rows_full = barriers, rows_empty = barriers + 8, full = barriers + 64, empty = barriers + 128;
  const uint32_t sum_full = barriers + 192, sum_empty = sum_full + 16;
  const uint32_t ring = base + shape.ring_offset();
  const uint64_t row_operand = k_major(base + group * kSub * kRowBox * kChunkBytes);
  const int lane = thread & 31, warp = 4 * group + thread / 32;
  const Exponent exponent = exponent_of(*a.temperature);
  float total[kSub][2] = {};
  uint32_t stage = 0, parity = 0, run = 0, message = 0;
  int first_row = 0, first_local = 0, valid = 0;
  const bool takes_turns = shape.takes_turns();
  if (takes_turns && group == 1) {
    turn_give(1, kTurnThreads);  // the first turn is group 0's
  }
  ForwardWalk walk(a.tiles, blockIdx.x);
  ForwardTile tile;
  while (walk.next(tile)) {
    if (tile.begins) {
      first_row = a.rows.global(tile.row_block);
      first_local = a.rows.local(tile.row_block);
      valid = a.rows.valid(tile.row_block);
      barrier_wait(rows_full, run & 1);
      ++run;
    }
    float acc[kSub][64];
    if (takes_turns) {
      turn_wait(1 + group, kTurnThreads);
    }
    uint32_t previous = 0;
    for (int c = 0; c < shape.chunks; ++c) {
      barrier_wait(full + 8 * stage, parity);
      const uint64_t column_operand = k_major(ring + stage * ForwardShape::kStageBytes);
      product_fence();
#pragma unroll
      for (int step = 0; step < kChunk / kStep; ++step) {
#pragma unroll
        for (int sub = 0; sub < kSub; ++sub) {
          multiply(acc[sub], advance(row_operand, (c * 2 * kSub + sub) * kRowBox * kChunkBytes + step * kStepBytesKMajor),
                   advance(column_operand, step * kStepBytesKMajor), c + step > 0, T{});
        }
      }
      product_commit();
      if (c > 0) {
        product_wait<1>();
        if (lane == 0) {
          barrier_arrive(empty + 8 * previous);
        }
      }
      previous = stage;
      if (++stage == static_cast<uint32_t>(shape.stages)) {
        stage = 0;
        parity ^= 1;
      }
    }
    if (takes_turns) {
      turn_give(2 - group, kTurnThreads);
    }
    product_wait<0>();
#pragma unroll
    for (int sub = 0; sub < kSub; ++sub) {
      hold(acc[sub]);
    }
    if (lane == 0) {
      barrier_arrive(empty + 8 * previous);
      if (tile.ends) {
        barrier_arrive(rows_empty);
      }
    }
    const int first_column = tile.column_block * kForwardColumns;
    const bool rows_only = a.tiles.rows_only(tile.row_block, tile.column_block);
    if (is_special(first_row, valid, 128 * kSub, first_column, kForwardColumns, a.rows.num_rows)) {
#pragma unroll
      for (int sub = 0; sub < kSub; ++sub) {
        const int offset = (group * kSub + sub) * kRowBox;
        mask(acc[sub], Place{first_row + offset, first_column, valid - offset, a.rows.num_rows, thread},
             [&](int half, int reg, float value) {
               a.positives[first_local + offset + accumulator_row(thread, 2 * half)] = value;
               if (!rows_only) {
                 a.positives[first_column + accumulator_column(thread, reg)] = value;
               }
             });
      }
    }
    float columns[32] = {};
#pragma unroll
    for (int sub = 0; sub < kSub; ++sub) {
      add_exponentials(acc[sub], exponent.scale, exponent.shift, total[sub], columns);
    }
    if (!rows_only) {
      reduce_halves<16>(columns, lane);
      reduce_halves<8>(columns, lane);
      reduce_halves<4>(columns, lane);
      barrier_wait(sum_empty + 8 * (message & 1), ((message >> 1) & 1) ^ 1);
      float* out = reinterpret_cast<float*>(shared + shape.sums_offset() + (message & 1) * ForwardShape::kSumSlotBytes) + warp * kForwardColumns;
      *reinterpret_cast<float2*>(out + reduced_column(lane, 0)) = make_float2(columns[0], columns[1]);
      *reinterpret_cast<float2*>(out + reduced_column(lane, 2)) = make_float2(columns[2], columns[3]);
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(sum_full + 8 * (message & 1));
      }
      ++message;
    }
    if (tile.ends) {
      barrier_wait(sum_empty + 8 * (message & 1), ((message >> 1) & 1) ^ 1);
      float* out = reinterpret_cast<float*>(shared + shape.sums_offset() + (message & 1) * ForwardShape::kSumSlotBytes);
#pragma unroll
      for (int sub = 0; sub < kSub; ++sub) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = total[sub][half];
          sum += __shfl_xor_sync(0xffffffff, sum, 1);
          sum += __shfl_xor_sync(0xffffffff, sum, 2);
          if ((lane & 3) == 0) {
            out[(group * kSub + sub) * kRowBox + accumulator_row(thread, 2 * half)] = sum;
          }
          total[sub][half] = 0.0f;
        }
      }
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(sum_full + 8 * (message & 1));
      }
      ++message;
    }
  }
}

// kSub: 64-row products per warpgroup, 2 for row tiles of 256 and 1 for 128.
template <typename T, int kSub>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap column_map,
                   const __grid_constant__ ForwardArguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  char* shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const uint32_t base = shared_address(shared);
  if (threadIdx.x == 0) {
    const uint32_t barriers = base + a.shape.barrier_offset();
    barrier_init(barriers, 1);
    barrier_init(barriers + 8, kConsumerWarps);
    for (int s = 0; s < a.shape.stages; ++s) {
      barrier_init(barriers + 64 + 8 * s, 1);
      barrier_init(barriers + 128 + 8 * s, kConsumerWarps);
    }
    for (int s = 0; s < ForwardShape::kSumSlots; ++s) {
      barrier_init(barriers + 192 + 8 * s, kConsumerWarps);
      barrier_init(barriers + 208 + 8 * s, 1);
    }
    barrier_init_done();
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // the compiler sees one value per warp
  if (group == 0) {
    give_registers<64>();
    if (threadIdx.x == 0) {
      prefetch_map(&row_map);
      prefetch_map(&column_map);
      forward_copy<T, kSub>(&row_map, &column_map, a, base);
    } else if (threadIdx.x / 32 == 1) {
      forward_add<kSub>(a, base, shared, threadIdx.x & 31);
    }
  } else {
    take_registers<216>();
    forward_multiply<T, kSub>(a, base, shared, group - 1, threadIdx.x & 127);
  }
#endif
}

}  // namespace cellfast::ntxent::sm90

// The backward kernel for compute capability 9.0: gradient rows as weights times zhat, the weights recomputed tile by tile and never stored.
//
// A block owns rows and walks the columns; one shared-memory tile of zhat serves both products, as columns of the similarities and as rows of
// the sum. While a warpgroup exponentiates, the tensor cores finish its previous weights and work for the other warpgroup.
#pragma once

#include "ntxent/cuda/sm90/epilogue.h"
#include "ntxent/cuda/sm90/wgmma.cuh"

namespace cellfast::ntxent::sm90 {

struct BackwardArguments {
  RowBlocks rows;
  int column_tiles, splits;
  int width;                  // columns of `partial`
  const double* temperature;
  float gain;                 // weights are multiplied by it: half precision would lose small ones
  // [column_tiles, 2, columns]: exp2(shift - lse) * gain, then the high part of lse * log2(e); 0 beyond the last row. The shift is that of row 0.
  const float* factors;
  const float2* lse;          // [M]: lse * log2(e) as high and low part
  const int* wide;            // not 0: lse spans too much for one exponential per element
  float* partial;             // [splits, local rows, width]
};

template <int kDim>
__device__ inline void backward_copy(const CUtensorMap* row_map, const CUtensorMap* column_map, const BackwardArguments& a, uint32_t base) {
  constexpr BackwardShape shape = backward_shape(kDim);
  const uint32_t barriers = base + shape.barrier_offset();
  const uint32_t rows_full = barriers, rows_empty = barriers + 8, full = barriers + 64, empty = barriers + 128;
  uint32_t stage = 0, parity = 0, run = 0;
  const int row_blocks = a.rows.count();
  for (int unit = blockIdx.x; unit < row_blocks * a.splits; unit += gridDim.x) {
    const int split = unit / row_blocks, block = unit - split * row_blocks;
    const int row = a.rows.global(block);
    barrier_wait(rows_empty, (run & 1) ^ 1);
    barrier_expect(rows_full, shape.chunks * shape.row_tile * kChunkBytes);
#pragma unroll 1
    for (int c = 0; c < shape.chunks; ++c) {
#pragma unroll 1
      for (int b = 0; b < shape.row_tile / kRowBox; ++b) {
        copy_box(base + (c * shape.row_tile + b * kRowBox) * kChunkBytes, row_map, c * kChunk, row + b * kRowBox, rows_full);
      }
    }
    ++run;
    const int end = split_begin(a.column_tiles, split + 1, a.splits);
    for (int tile = split_begin(a.column_tiles, split, a.splits); tile < end; ++tile) {
      const uint32_t target = base + shape.ring_offset() + stage * shape.stage_bytes();
      barrier_wait(empty + 8 * stage, parity ^ 1);
      barrier_expect(full + 8 * stage, shape.chunks * shape.block_bytes() + shape.factor_bytes());
#pragma unroll 1
      for (int c = 0; c < shape.chunks; ++c) {
        copy_box(target + c * shape.block_bytes(), column_map, c * kChunk, tile * shape.columns, full + 8 * stage);
      }
      copy_bytes(base + shape.factors_offset() + stage * shape.factor_bytes(), a.factors + static_cast<int64_t>(tile) * (2 * shape.columns), shape.factor_bytes(),
                 full + 8 * stage);
      if (++stage == shape.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

// The rows of one thread: registers of half 0 and 1 belong to two rows.
struct RowTerms {
  float factor[2], lse[2];
  int first;      // global row of the warpgroup's first row
  int left;       // its valid rows
};

// acc: similarities of 64 rows with a tile of columns; becomes their weights.
template <int kRegisters>
__device__ inline void backward_weights(float (&acc)[kRegisters], const BackwardArguments& a, const RowTerms& rows, float scale, float shift,
                                        bool wide, const float* column_factors, int first_column, int thread) {
  constexpr int kColumns = 2 * kRegisters;
  const int num_rows = a.rows.num_rows;
  const bool special = is_special(rows.first, rows.left, kRowBox, first_column, kColumns, num_rows);
  int pair[2] = {-1, -1};
  float weight[2] = {0.0f, 0.0f};
  if (special) {
    mask(acc, Place{rows.first, first_column, rows.left, num_rows, thread}, [&](int half, int reg, float value) {
      pair[half] = accumulator_column(thread, reg);
      weight[half] = value;
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (pair[half] >= 0) {
        const float2 row = a.lse[rows.first + accumulator_row(thread, 2 * half)], column = a.lse[first_column + pair[half]];
        weight[half] = a.gain * positive_weight(weight[half], scale, row.x, row.y, column.x, column.y);
      }
    }
  }
  if (wide) {
    weights_from_two(acc, scale, a.gain, rows.lse, column_factors + kColumns, thread);
  } else {
    weights_from_factors(acc, scale, shift, rows.factor, column_factors, thread);
  }
  if (special) {
    // The whole weight of a positive, minus 2 included, takes its place before anything is rounded to 2 bytes.
#pragma unroll
    for (int reg = 0; reg < kRegisters; ++reg) {
      const int half = (reg >> 1) & 1;
      if (accumulator_column(thread, reg) == pair[half]) {
        acc[reg] = weight[half];
      }
    }
  }
}

template <typename T, int kDim>
__device__ inline void backward_multiply(const BackwardArguments& a, uint32_t base, const char* shared, int group, int thread) {
  constexpr BackwardShape shape = backward_shape(kDim);
  constexpr int kAcc = shape.columns / 2, kOut = shape.out_width / 2, kSteps = shape.columns / kStep;
  const uint32_t barriers = base + shape.barrier_offset();
  const uint32_t rows_full = barriers, rows_empty = barriers + 8, full = barriers + 64, empty = barriers + 128;
  const uint32_t ring = base + shape.ring_offset();
  const uint64_t row_operand = k_major(base + (shape.split_width ? 0 : group * kRowBox * kChunkBytes));
  const uint32_t my_width = shape.split_width ? group * (shape.out_width / kChunk) * shape.block_bytes() : 0;
  const int lane = thread & 31;
  const float scale = exponent_of(*a.temperature).scale, shift = a.lse[0].x;
  const bool wide = *a.wide != 0;
  const int row_blocks = a.rows.count();
  uint32_t stage = 0, parity = 0, run = 0;
  float out[kOut];
  uint32_t weights[kAcc / 2];
  if (group == 1) {
    turn_give(1, 256);  // the first turn is group 0's
  }

  // Accumulators of similarities are declared anew for every tile: what the epilogue leaves in them is no input of the next product.
  const auto similarities = [&](float (&acc)[kAcc], uint32_t at) {
    const uint64_t column_operand = k_major(ring + at * shape.stage_bytes());
#pragma unroll
    for (int c = 0; c < shape.chunks; ++c) {
#pragma unroll
      for (int step = 0; step < kChunk / kStep; ++step) {
        multiply(acc, advance(row_operand, c * shape.row_tile * kChunkBytes + step * kStepBytesKMajor),
                 advance(column_operand, c * shape.block_bytes() + step * kStepBytesKMajor), c + step > 0, T{});
      }
    }
    product_commit();
  };
  const auto accumulate = [&](uint32_t at) {
    const uint64_t operand = n_major(ring + at * shape.stage_bytes() + my_width, shape.block_bytes());
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply(out, weights[4 * step], weights[4 * step + 1], weights[4 * step + 2], weights[4 * step + 3],
               advance(operand, step * kStepBytesNMajor), T{});
    }
    product_commit();
  };
  const auto round_weights = [&](const float (&acc)[kAcc]) {
#pragma unroll
    for (int i = 0; i < kAcc / 2; ++i) {
      weights[i] = pack(acc[2 * i], acc[2 * i + 1], T{});
    }
  };

  for (int unit = blockIdx.x; unit < row_blocks * a.splits; unit += gridDim.x) {
    const int split = unit / row_blocks, block = unit - split * row_blocks;
    const int offset = shape.split_width ? 0 : group * kRowBox;
    RowTerms rows;
    rows.first = a.rows.global(block) + offset;
    rows.left = a.rows.valid(block) - offset;
    rows.left = rows.left > kRowBox ? kRowBox : rows.left;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = accumulator_row(thread, 2 * half);
      rows.lse[half] = r < rows.left ? a.lse[rows.first + r].x : 0.0f;
      rows.factor[half] = r < rows.left ? a.gain * power_of_two(shift - rows.lse[half]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kOut; ++i) {
      out[i] = 0.0f;
    }
    const int begin = split_begin(a.column_tiles, split, a.splits), end = split_begin(a.column_tiles, split + 1, a.splits);
    const auto weigh = [&](float (&acc)[kAcc], int tile, uint32_t at) {
      backward_weights(acc, a, rows, scale, shift, wide,
                       reinterpret_cast<const float*>(shared + shape.factors_offset() + at * shape.factor_bytes()), tile * shape.columns, thread);
      // The factors were read by ordinary loads; the copy engine overwrites them once the stage is released.
      shared_fence();
      __syncwarp();
    };
    barrier_wait(rows_full, run & 1);
    ++run;
    barrier_wait(full + 8 * stage, parity);
    {
      float acc[kAcc];
      product_fence();
      similarities(acc, stage);
      product_wait<0>();
      hold(acc);
      weigh(acc, begin, stage);
      round_weights(acc);
    }
    for (int tile = begin; tile + 1 < end; ++tile) {
      const uint32_t current = stage;
      if (++stage == shape.stages) {
        stage = 0;
        parity ^= 1;
      }
      barrier_wait(full + 8 * stage, parity);
      turn_wait(1 + group, 256);
      float acc[kAcc];
      hold(out);
      hold(weights);
      product_fence();
      similarities(acc, stage);
      accumulate(current);
      turn_give(2 - group, 256);
      product_wait<1>();
      hold(acc);
      weigh(acc, tile + 1, stage);
      product_wait<0>();
      hold(out);
      hold(weights);
      if (lane == 0) {
        barrier_arrive(empty + 8 * current);
      }
      round_weights(acc);
    }
    if (lane == 0) {
      barrier_arrive(rows_empty);
    }
    hold(out);
    hold(weights);
    product_fence();
    accumulate(stage);
    product_wait<0>();
    hold(out);
    if (lane == 0) {
      barrier_arrive(empty + 8 * stage);
    }
    if (++stage == shape.stages) {
      stage = 0;
      parity ^= 1;
    }
    float* partial = a.partial + (static_cast<int64_t>(split) * a.rows.local_rows() + a.rows.local(block) + offset) * a.width;
    const int first = shape.split_width ? group * shape.out_width : 0;
#pragma unroll
    for (int i = 0; i < kOut; i += 2) {
      const int r = accumulator_row(thread, i), column = first + accumulator_column(thread, i);
      if (r < rows.left && column < a.width) {
        *reinterpret_cast<float2*>(partial + static_cast<int64_t>(r) * a.width + column) = make_float2(out[i], out[i + 1]);
      }
    }
  }
}

// kDim: 64, 128, 256 or 512, the largest D this instance serves.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap column_map,
                    const __grid_constant__ BackwardArguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr BackwardShape shape = backward_shape(kDim);
  extern __shared__ char raw[];
  char* shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const uint32_t base = shared_address(shared);
  if (threadIdx.x == 0) {
    const uint32_t barriers = base + shape.barrier_offset();
    barrier_init(barriers, 1);
    barrier_init(barriers + 8, kConsumerWarps);
    for (int s = 0; s < shape.stages; ++s) {
      barrier_init(barriers + 64 + 8 * s, 1);
      barrier_init(barriers + 128 + 8 * s, kConsumerWarps);
    }
    barrier_init_done();
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // the compiler sees one value per warp
  if (group == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) {
      prefetch_map(&row_map);
      prefetch_map(&column_map);
      backward_copy<kDim>(&row_map, &column_map, a, base);
    }
  } else {
    take_registers<240>();
    backward_multiply<T, kDim>(a, base, shared, group - 1, threadIdx.x & 127);
  }
#endif
}

}  // namespace cellfast::ntxent::sm90

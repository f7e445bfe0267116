// What one thread does with its accumulators, between the matrix products. No CUDA in here: the tests run it on the CPU.
#pragma once

#include <cmath>

#include "ntxent/schedule_cuda.h"

namespace cellfast::ntxent::sm90 {

CELLFAST_HD inline float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// exp2(x) - 1 without cancellation near 0.
CELLFAST_HD inline float power_of_two_minus_one(float x) {
  return expm1f(x * 0.6931471805599453f);
}

constexpr float kMasked = -INFINITY;  // as an accumulator: its exponential is 0

// Where a thread's accumulators of one 64-row wgmma lie in the matrix of similarities.
struct Place {
  int row;        // global row of the wgmma's first row
  int column;     // of its first column
  int rows_left;  // rows of the block from that row on: beyond, nothing counts
  int num_rows;   // M
  int thread;     // of the warpgroup
};

// Masks what is no negative pair (accumulator -infinity) and hands each positive pair to found(half, register, value).
template <int kRegisters, typename Found>
CELLFAST_HD inline void mask(float (&acc)[kRegisters], const Place& at, const Found& found) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = accumulator_row(at.thread, 2 * half), row = at.row + r;
    // As columns of the tile; those of another tile are negative or too large to be met.
    const int self = row - at.column, pair = static_cast<int>(positive_of(row, at.num_rows)) - at.column;
    const int valid_columns = r < at.rows_left ? at.num_rows - at.column : 0;
#pragma unroll
    for (int reg = 0; reg < kRegisters; ++reg) {
      if (((reg >> 1) & 1) == half) {
        const int column = accumulator_column(at.thread, reg);
        if (column == pair && column < valid_columns) {
          found(half, reg, acc[reg]);
        }
        if (column >= valid_columns || column == self || column == pair) {
          acc[reg] = kMasked;
        }
      }
    }
  }
}

// Adds exp2(acc * scale - shift) to the thread's two row sums and 32 column sums (index 2 * (column / 8) + column % 2).
CELLFAST_HD inline void add_exponentials(const float (&acc)[64], float scale, float shift, float (&rows)[2], float (&columns)[32]) {
  float tile[2] = {0.0f, 0.0f};  // summed apart: thousands of tiles follow each other in `rows`
#pragma unroll
  for (int reg = 0; reg < 64; ++reg) {
    const float e = power_of_two(fmaf(acc[reg], scale, -shift));
    tile[(reg >> 1) & 1] += e;
    columns[2 * (reg >> 2) + (reg & 1)] += e;
  }
  rows[0] += tile[0];
  rows[1] += tile[1];
}

// Weights of the gradient, exp(s - lse_row) + exp(s - lse_column), from one exponential: acc becomes exp2(acc * scale - shift) * (row factor +
// column factor), the factors being exp2(shift - lse). Only where every |shift - lse| is below kFactorRange, so that no product leaves the range.
constexpr float kFactorRange = 60.0f;

template <int kRegisters>
CELLFAST_HD inline void weights_from_factors(float (&acc)[kRegisters], float scale, float shift, const float (&row_factor)[2],
                                             const float* column_factor, int thread) {
#pragma unroll
  for (int reg = 0; reg < kRegisters; reg += 4) {
    const int column = accumulator_column(thread, reg);
    const float first = column_factor[column], second = column_factor[column + 1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      acc[reg + 2 * half] = power_of_two(fmaf(acc[reg + 2 * half], scale, -shift)) * (row_factor[half] + first);
      acc[reg + 2 * half + 1] = power_of_two(fmaf(acc[reg + 2 * half + 1], scale, -shift)) * (row_factor[half] + second);
    }
  }
}

// The same by two exponentials, for any range of lse. lse_row and lse_column are lse * log2(e) in float32; `gain` scales.
template <int kRegisters>
CELLFAST_HD inline void weights_from_two(float (&acc)[kRegisters], float scale, float gain, const float (&lse_row)[2],
                                         const float* lse_column, int thread) {
#pragma unroll
  for (int reg = 0; reg < kRegisters; reg += 4) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const float lse = lse_column[accumulator_column(thread, reg + odd)];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& a = acc[reg + 2 * half + odd];
        a = gain * (power_of_two(fmaf(a, scale, -lse_row[half])) + power_of_two(fmaf(a, scale, -lse)));
      }
    }
  }
}

// A positive's weight P + P' - 2 from its accumulator; lse in two parts (high + low), so that the difference keeps its digits.
CELLFAST_HD inline float positive_weight(float acc, float scale, float row_high, float row_low, float column_high, float column_low) {
  return power_of_two_minus_one(fmaf(acc, scale, -row_high) - row_low) + power_of_two_minus_one(fmaf(acc, scale, -column_high) - column_low);
}

// Logits are kept as powers of two: exp(s) = exp2(acc * scale). The shift keeps exp2 inside float32's range for cosines at any temperature
// from about 0.01 on; a row whose sum leaves the range all the same is found by needs_repair() and computed again with a running maximum.
struct Exponent {
  float scale, shift;
};

CELLFAST_HD inline Exponent exponent_of(double temperature) {
  // A temperature that is not positive cannot be refused without waiting for the device: the loss says NaN instead.
  const float scale = temperature > 0 ? static_cast<float>(1.4426950408889634 / temperature) : NAN;
  const float top = 1.01f * scale - 100.0f;  // cosines of rounded rows pass 1 a little
  return {scale, top > 0.0f ? top : 0.0f};
}

// lse - positive logit of a row: log(1 + sum * 2^(shift - positive)), `sum` over the negatives of 2^(logit - shift), in natural units.
CELLFAST_HD inline double row_loss_of(double sum, double shift, double positive) {
  if (sum == 0) {
    return 0;  // no negatives at all: N = 1
  }
  const double gap = (shift - positive) * 0.6931471805599453;
  return gap < 0 ? log1p(sum * exp(gap)) : gap + log(sum + exp(-gap));
}

// True where exponentials that float32 dropped (below 2^-126) or could not hold may have mattered to lse.
CELLFAST_HD inline bool needs_repair(double sum, double shift, double positive, int num_rows) {
  return num_rows > 2 && (std::isinf(sum) || (sum < 0x1p-80 && positive - shift < -80.0));
}

}  // namespace cellfast::ntxent::sm90

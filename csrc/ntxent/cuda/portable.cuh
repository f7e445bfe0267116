// The portable kernels: any GPU from compute capability 8.0 on, any D, every dtype. Row-owner tiles in shared memory, no atomics, nothing of
// size M x M. Twice the arithmetic of symmetric tiles and no matrix units: correct and small in memory, not the fast path.
//
// One block owns kRows rows and meets all columns kColumns at a time; sums run in a fixed order, so repeats are bit-identical.
#pragma once

#include "ntxent/cuda/tensors.cuh"

namespace cellfast::ntxent::cuda::portable {

constexpr int kRows = 32;
constexpr int kColumns = 64;
constexpr int kDepth = 32;
constexpr int kThreads = 256;

template <typename T>
__device__ inline T minus_infinity() {
  return -static_cast<T>(INFINITY);
}

// logits[r][c] = zhat[row r] . zhat[first + c] * inv_temperature for this block's rows and one tile of columns; 0 beyond the last.
template <typename S, typename T>
__device__ void tile_logits(const S* __restrict__ zhat, int64_t dim, const Shard& shard, int64_t begin, int64_t first, T inv_temperature,
                            T (*a)[kDepth + 1], T (*b)[kDepth + 1], T (*logits)[kColumns + 1]) {
  const int tid = threadIdx.x;
  const int row0 = (tid / 16) * 2, column0 = (tid % 16) * 4;
  const int64_t num_local = shard.num_local();
  T sum[2][4] = {};
  for (int64_t k0 = 0; k0 < dim; k0 += kDepth) {
    for (int i = tid; i < kRows * kDepth; i += kThreads) {
      const int r = i / kDepth, k = i % kDepth;
      a[r][k] = (begin + r < num_local && k0 + k < dim) ? load(zhat[shard.row(begin + r) * dim + k0 + k]) : T(0);
    }
    for (int i = tid; i < kColumns * kDepth; i += kThreads) {
      const int c = i / kDepth, k = i % kDepth;
      b[c][k] = (first + c < shard.num_rows && k0 + k < dim) ? load(zhat[(first + c) * dim + k0 + k]) : T(0);
    }
    __syncthreads();
    for (int k = 0; k < kDepth; ++k) {
      for (int r = 0; r < 2; ++r) {
        for (int c = 0; c < 4; ++c) {
          sum[r][c] += a[row0 + r][k] * b[column0 + c][k];
        }
      }
    }
    __syncthreads();
  }
  for (int r = 0; r < 2; ++r) {
    for (int c = 0; c < 4; ++c) {
      logits[row0 + r][column0 + c] = sum[r][c] * inv_temperature;
    }
  }
  __syncthreads();
}

// Eight threads share a row, each with every eighth column, a running maximum and a sum of its own.
constexpr int kPerRow = kThreads / kRows;

template <typename S>
__global__ void forward_kernel(const S* __restrict__ zhat, int64_t dim, const double* __restrict__ temperature, Shard shard,
                               double* __restrict__ row_loss, double* __restrict__ lse) {
  using T = typename Accumulator<S>::type;
  __shared__ T a[kRows][kDepth + 1], b[kColumns][kDepth + 1], logits[kRows][kColumns + 1];
  const int tid = threadIdx.x, r = tid / kPerRow, part = tid % kPerRow;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRows;
  const bool valid_row = begin + r < shard.num_local();
  const int64_t i = valid_row ? shard.row(begin + r) : 0, pair = positive_of(i, shard.num_rows);
  const double tau = *temperature;
  // A temperature that is not positive cannot be refused without waiting for the device: the loss says NaN instead.
  const T inv_temperature = static_cast<T>(tau > 0 ? 1.0 / tau : static_cast<double>(NAN));
  T largest = minus_infinity<T>(), positive = T(0);
  double others = 0;
  for (int64_t first = 0; first < shard.num_rows; first += kColumns) {
    tile_logits<S, T>(zhat, dim, shard, begin, first, inv_temperature, a, b, logits);
    if (valid_row) {
      for (int c = part; c < kColumns && first + c < shard.num_rows; c += kPerRow) {
        const T s = logits[r][c];
        if (first + c == pair) {
          positive = s;
        } else if (first + c != i) {
          if (s > largest) {
            others *= exp(static_cast<double>(largest) - static_cast<double>(s));
            largest = s;
          }
          // A NaN is no maximum but makes the sum NaN. Where nothing but -infinity was met so far there is nothing to add.
          others += largest > minus_infinity<T>() || isnan(s) ? static_cast<double>(exp(s - largest)) : 0.0;
        }
      }
    }
    __syncthreads();
  }
  for (int width = 1; width < kPerRow; width *= 2) {
    const T other_largest = __shfl_xor_sync(0xffffffff, largest, width);
    const double other_sum = __shfl_xor_sync(0xffffffff, others, width);
    positive += __shfl_xor_sync(0xffffffff, positive, width);  // one thread has it, the rest 0
    const T top = other_largest > largest ? other_largest : largest;
    // What has seen no column has sum 0 and maximum -infinity, and must not make 0 * NaN.
    const double mine = largest > minus_infinity<T>() ? others * exp(static_cast<double>(largest) - static_cast<double>(top)) : others;
    const double more =
        other_largest > minus_infinity<T>() ? other_sum * exp(static_cast<double>(other_largest) - static_cast<double>(top)) : other_sum;
    others = mine + more;
    largest = top;
  }
  if (valid_row && part == 0) {
    const double p = static_cast<double>(positive);
    double loss = 0;  // no negatives at all: N = 1
    if (isnan(others) || isnan(p)) {
      loss = static_cast<double>(NAN);
    } else if (others > 0) {
      const double gap = static_cast<double>(largest) - p;
      loss = gap < 0 ? log1p(others * exp(gap)) : gap + log(others + exp(-gap));
    }
    row_loss[begin + r] = loss;
    lse[begin + r] = p + loss;
  }
}

constexpr int kRowsPerWarp = kRows / (kThreads / 32);

template <typename S>
__global__ void backward_kernel(const double* __restrict__ grad_loss, const S* __restrict__ zhat,
                                const typename Accumulator<S>::type* __restrict__ inv_norm, const double* __restrict__ lse, int64_t dim,
                                const double* __restrict__ temperature, Shard shard, bool normalize,
                                typename Accumulator<S>::type* __restrict__ grad, double* __restrict__ alignment) {
  using T = typename Accumulator<S>::type;
  __shared__ T a[kRows][kDepth + 1], b[kColumns][kDepth + 1], weights[kRows][kColumns + 1];
  const int tid = threadIdx.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = static_cast<int>(shard.num_local() - begin < kRows ? shard.num_local() - begin : kRows);
  const double tau = *temperature;
  const T inv_temperature = static_cast<T>(tau > 0 ? 1.0 / tau : static_cast<double>(NAN));
  // Each warp owns four rows and each lane every 32nd column of them: no two threads write one value of grad.
  const int lane = tid % 32, row0 = tid / 32 * kRowsPerWarp;
  for (int64_t first = 0; first < shard.num_rows; first += kColumns) {
    const int valid = static_cast<int>(shard.num_rows - first < kColumns ? shard.num_rows - first : kColumns);
    tile_logits<S, T>(zhat, dim, shard, begin, first, inv_temperature, a, b, weights);
    for (int e = tid; e < rows * kColumns; e += kThreads) {
      const int r = e / kColumns, c = e % kColumns;
      if (c >= valid) {
        weights[r][c] = T(0);
        continue;
      }
      const int64_t i = shard.row(begin + r);
      const double row_part = static_cast<double>(weights[r][c]) - lse[i];
      const double column_part = static_cast<double>(weights[r][c]) - lse[first + c];
      if (first + c == i) {
        weights[r][c] = T(0);
      } else if (first + c == positive_of(i, shard.num_rows)) {
        // P + P - 2 without the cancellation at P near 1.
        weights[r][c] = static_cast<T>(expm1(row_part) + expm1(column_part));
      } else {
        weights[r][c] = exp(static_cast<T>(row_part)) + exp(static_cast<T>(column_part));
      }
    }
    __syncthreads();
    for (int64_t k = lane; k < dim; k += 32) {
      T sum[kRowsPerWarp] = {};
      for (int c = 0; c < valid; ++c) {
        const T value = load(zhat[(first + c) * dim + k]);
        for (int q = 0; q < kRowsPerWarp; ++q) {
          sum[q] += weights[row0 + q][c] * value;
        }
      }
      for (int q = 0; q < kRowsPerWarp; ++q) {
        if (row0 + q < rows) {
          T& target = grad[(begin + row0 + q) * dim + k];
          target = first == 0 ? sum[q] : target + sum[q];
        }
      }
    }
    __syncthreads();
  }
  const double scale = *grad_loss / (static_cast<double>(shard.num_rows) * tau);
  for (int r = row0; r < row0 + kRowsPerWarp && r < rows; ++r) {
    const S* unit = zhat + shard.row(begin + r) * dim;
    T* mine = grad + (begin + r) * dim;
    double along = 0;
    for (int64_t k = lane; k < dim; k += 32) {
      along += static_cast<double>(load(unit[k])) * static_cast<double>(mine[k]);
    }
    for (int width = 16; width > 0; width /= 2) {
      along += __shfl_xor_sync(0xffffffff, along, width);
    }
    if (lane == 0) {
      alignment[begin + r] = along;
    }
    const double factor = scale * (normalize ? static_cast<double>(inv_norm[begin + r]) : 1.0);
    for (int64_t k = lane; k < dim; k += 32) {
      const double g = static_cast<double>(mine[k]);
      mine[k] = static_cast<T>(factor * (normalize ? g - along * static_cast<double>(load(unit[k])) : g));
    }
  }
}

}  // namespace cellfast::ntxent::cuda::portable

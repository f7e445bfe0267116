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

template <typename S>
__global__ void forward_kernel(const S* __restrict__ zhat, int64_t dim, const double* __restrict__ temperature, Shard shard,
                               double* __restrict__ row_loss, double* __restrict__ lse) {
  using T = typename Accumulator<S>::type;
  __shared__ T a[kRows][kDepth + 1], b[kColumns][kDepth + 1], logits[kRows][kColumns + 1];
  __shared__ T largest[kRows], positive[kRows];
  __shared__ double others[kRows];
  const int tid = threadIdx.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRows;
  const double tau = *temperature;
  // A temperature that is not positive cannot be refused without waiting for the device: the loss says NaN instead.
  const T inv_temperature = static_cast<T>(tau > 0 ? 1.0 / tau : static_cast<double>(NAN));
  if (tid < kRows) {
    largest[tid] = minus_infinity<T>();
    positive[tid] = T(0);
    others[tid] = 0;
  }
  for (int64_t first = 0; first < shard.num_rows; first += kColumns) {
    tile_logits<S, T>(zhat, dim, shard, begin, first, inv_temperature, a, b, logits);
    if (tid < kRows && begin + tid < shard.num_local()) {
      const int64_t i = shard.row(begin + tid);
      const int64_t self = i - first, pair = positive_of(i, shard.num_rows) - first;
      const int valid = static_cast<int>(shard.num_rows - first < kColumns ? shard.num_rows - first : kColumns);
      T* s = logits[tid];
      if (pair >= 0 && pair < valid) {
        positive[tid] = s[pair];
        s[pair] = minus_infinity<T>();
      }
      if (self >= 0 && self < valid) {
        s[self] = minus_infinity<T>();
      }
      T top = largest[tid];
      bool is_nan = false;
      for (int c = 0; c < valid; ++c) {
        is_nan = is_nan || isnan(s[c]);
        top = s[c] > top ? s[c] : top;
      }
      if (is_nan) {
        others[tid] = static_cast<double>(NAN);
      } else if (top > minus_infinity<T>()) {
        double sum = others[tid] * exp(static_cast<double>(largest[tid]) - static_cast<double>(top));
        for (int c = 0; c < valid; ++c) {
          sum += static_cast<double>(exp(s[c] - top));
        }
        others[tid] = sum;
        largest[tid] = top;
      }
    }
    __syncthreads();
  }
  if (tid < kRows && begin + tid < shard.num_local()) {
    const double p = static_cast<double>(positive[tid]);
    double loss = 0;  // no negatives at all: N = 1
    if (isnan(others[tid]) || isnan(p)) {
      loss = static_cast<double>(NAN);
    } else if (others[tid] > 0) {
      const double gap = static_cast<double>(largest[tid]) - p;
      loss = gap < 0 ? log1p(others[tid] * exp(gap)) : gap + log(others[tid] + exp(-gap));
    }
    row_loss[begin + tid] = loss;
    lse[begin + tid] = p + loss;
  }
}

template <typename S>
__global__ void backward_kernel(const double* __restrict__ grad_loss, const S* __restrict__ zhat,
                                const typename Accumulator<S>::type* __restrict__ inv_norm, const double* __restrict__ lse, int64_t dim,
                                const double* __restrict__ temperature, Shard shard, bool normalize,
                                typename Accumulator<S>::type* __restrict__ grad, double* __restrict__ alignment) {
  using T = typename Accumulator<S>::type;
  __shared__ T a[kRows][kDepth + 1], b[kColumns][kDepth + 1], weights[kRows][kColumns + 1];
  __shared__ double along[kRows];
  const int tid = threadIdx.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = static_cast<int>(shard.num_local() - begin < kRows ? shard.num_local() - begin : kRows);
  const double tau = *temperature;
  const T inv_temperature = static_cast<T>(tau > 0 ? 1.0 / tau : static_cast<double>(NAN));
  // Every thread keeps to its own (row, k) pairs of grad throughout: no two write one value, none waits for another.
  for (int64_t e = tid; e < rows * dim; e += kThreads) {
    grad[begin * dim + e] = T(0);
  }
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
    for (int64_t e = tid; e < rows * dim; e += kThreads) {
      const int64_t r = e / dim, k = e % dim;
      T sum = T(0);
      for (int c = 0; c < valid; ++c) {
        sum += weights[r][c] * load(zhat[(first + c) * dim + k]);
      }
      grad[begin * dim + e] += sum;
    }
    __syncthreads();
  }
  __syncthreads();
  if (tid < rows) {
    double sum = 0;
    for (int64_t k = 0; k < dim; ++k) {
      sum += static_cast<double>(load(zhat[shard.row(begin + tid) * dim + k])) * static_cast<double>(grad[(begin + tid) * dim + k]);
    }
    along[tid] = sum;
    alignment[begin + tid] = sum;
  }
  __syncthreads();
  const double scale = *grad_loss / (static_cast<double>(shard.num_rows) * tau);
  for (int64_t e = tid; e < rows * dim; e += kThreads) {
    const int64_t r = e / dim, k = e % dim;
    const double g = static_cast<double>(grad[begin * dim + e]);
    const double unit = static_cast<double>(load(zhat[shard.row(begin + r) * dim + k]));
    const double factor = scale * (normalize ? static_cast<double>(inv_norm[begin + r]) : 1.0);
    grad[begin * dim + e] = static_cast<T>(factor * (normalize ? g - along[r] * unit : g));
  }
}

}  // namespace cellfast::ntxent::cuda::portable

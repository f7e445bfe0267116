// The portable CUDA backend, any GPU from sm_80 on, any D: row-owner tiles in shared memory, no atomics, nothing of size M x M.
// Twice the arithmetic of symmetric tiles and no matrix units: correct and small in memory, not the fast path. Contract: ntxent/ntxent.h.
//
// One block owns kRows rows and meets all columns kColumns at a time; sums run in a fixed order, so repeats are bit-identical.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "ntxent/ntxent.h"

namespace cellfast::ntxent::cuda {
namespace {

constexpr int kRows = 32;
constexpr int kColumns = 64;
constexpr int kDepth = 32;
constexpr int kThreads = 256;

template <typename S>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// By name: torch compiles extensions with the implicit conversions of half types switched off.
__device__ inline float load(float value) { return value; }
__device__ inline double load(double value) { return value; }
__device__ inline float load(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float load(__half value) { return __half2float(value); }
__device__ inline void store(float value, float& out) { out = value; }
__device__ inline void store(double value, double& out) { out = value; }
__device__ inline void store(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ inline void store(float value, __half& out) { out = __float2half_rn(value); }

struct Shard {
  int64_t index, count, num_rows;
  __host__ __device__ int64_t row(int64_t local) const { return shard_row(local, index, count, num_rows); }
  __host__ __device__ int64_t num_local() const { return num_rows / count; }
};

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
__global__ void normalize_kernel(const S* __restrict__ z, int64_t dim, bool normalize, S* __restrict__ zhat,
                                 typename Accumulator<S>::type* __restrict__ inv_norm) {
  using T = typename Accumulator<S>::type;
  __shared__ double partial[kThreads];
  const int64_t row = blockIdx.x;
  double squares = 0;
  for (int64_t k = threadIdx.x; k < dim; k += kThreads) {
    const double value = static_cast<double>(load(z[row * dim + k]));
    squares += value * value;
  }
  partial[threadIdx.x] = squares;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) {
      partial[threadIdx.x] += partial[threadIdx.x + width];
    }
    __syncthreads();
  }
  const double norm = sqrt(partial[0]);
  const T scale = normalize ? static_cast<T>(1.0 / fmax(norm, kNormEps)) : T(1);
  if (threadIdx.x == 0) {
    inv_norm[row] = normalize && norm < kNormEps ? T(0) : scale;
  }
  for (int64_t k = threadIdx.x; k < dim; k += kThreads) {
    // A row with an infinity or a NaN is NaN throughout, as 0 * inf would not be everywhere.
    store(isfinite(norm) ? load(z[row * dim + k]) * scale : static_cast<T>(NAN), zhat[row * dim + k]);
  }
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

// out = factor(values) of a sum in a fixed order, by one block.
template <typename Out, typename Finish>
__global__ void sum_kernel(const double* __restrict__ values, int64_t count, Out* __restrict__ out, Finish finish) {
  __shared__ double partial[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += values[i];
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) {
      partial[threadIdx.x] += partial[threadIdx.x + width];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    *out = static_cast<Out>(finish(partial[0]));
  }
}

struct Mean {
  double count;
  __device__ double operator()(double sum) const { return sum / count; }
};

struct TemperatureGradient {
  const double* grad_loss;
  const double* temperature;
  double num_rows;
  __device__ double operator()(double sum) const { return -*grad_loss * sum / (num_rows * *temperature * 2 * *temperature); }
};

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Calls f(S{}) with the CUDA type of a stored dtype.
template <typename F>
void dispatch(ScalarType stored, const F& f) {
  switch (stored) {
    case ScalarType::Double: f(double{}); break;
    case ScalarType::BFloat16: f(__nv_bfloat16{}); break;
    case ScalarType::Half: f(__half{}); break;
    default: f(float{});
  }
}

unsigned int blocks_of(int64_t rows, int64_t rows_per_block) {
  const int64_t blocks = ceil_div(rows, rows_per_block);
  if (blocks > 0x7fffffff) {
    fail("z has too many rows for one launch: ", rows);
  }
  return static_cast<unsigned int>(blocks);
}

std::tuple<Tensor, Tensor> normalize(Tensor z, bool normalize_rows) {
  check_rows(z, "z");
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  const int64_t num_rows = z.size(0), dim = z.size(1);
  const Tensor source = torch::stable::contiguous(z);
  Tensor zhat = new_tensor(z, {num_rows, dim}, z.scalar_type());
  Tensor inv_norm = new_tensor(z, {num_rows}, accumulator_of(z.scalar_type()));
  dispatch(z.scalar_type(), [&](auto type) {
    using S = decltype(type);
    normalize_kernel<S><<<blocks_of(num_rows, 1), kThreads, 0, current_stream(z)>>>(
        data<S>(source), dim, normalize_rows, data<S>(zhat), data<typename Accumulator<S>::type>(inv_norm));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {zhat, inv_norm};
}

std::tuple<Tensor, Tensor> shard_forward(Tensor zhat, Tensor temperature, int64_t index, int64_t count) {
  check_rows(zhat, "zhat");
  const int64_t num_rows = zhat.size(0), dim = zhat.size(1);
  check_shard(num_rows, index, count);
  check_temperature(temperature);
  const torch::stable::accelerator::DeviceGuard guard(zhat.get_device_index());
  const Shard shard{index, count, num_rows};
  const Tensor source = torch::stable::contiguous(zhat);
  Tensor row_loss = new_tensor(zhat, {shard.num_local()}, ScalarType::Double);
  Tensor lse = new_tensor(zhat, {shard.num_local()}, ScalarType::Double);
  dispatch(zhat.scalar_type(), [&](auto type) {
    using S = decltype(type);
    forward_kernel<S><<<blocks_of(shard.num_local(), kRows), kThreads, 0, current_stream(zhat)>>>(
        data<S>(source), dim, data<double>(temperature), shard, data<double>(row_loss), data<double>(lse));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {row_loss, lse};
}

std::tuple<Tensor, Tensor> shard_backward(Tensor grad_loss, Tensor zhat, Tensor inv_norm, Tensor lse, Tensor temperature,
                                          bool normalize_rows, int64_t index, int64_t count, ScalarType dtype) {
  check_rows(zhat, "zhat");
  const int64_t num_rows = zhat.size(0), dim = zhat.size(1);
  check_shard(num_rows, index, count);
  check_temperature(temperature);
  const torch::stable::accelerator::DeviceGuard guard(zhat.get_device_index());
  const Shard shard{index, count, num_rows};
  const int64_t num_local = shard.num_local();
  const ScalarType accumulator = accumulator_of(zhat.scalar_type());
  check_vector(inv_norm, num_local, accumulator, "inv_norm");
  check_vector(lse, num_rows, ScalarType::Double, "lse");
  if (grad_loss.numel() != 1) {
    fail("grad_loss must be one number, got shape ", shape_of(grad_loss));
  }
  const Tensor source = torch::stable::contiguous(zhat), inv = torch::stable::contiguous(inv_norm);
  const Tensor all_lse = torch::stable::contiguous(lse);
  const Tensor upstream = torch::stable::to(grad_loss, ScalarType::Double);
  Tensor grad = new_tensor(zhat, {num_local, dim}, accumulator);
  Tensor alignment = new_tensor(zhat, {num_local}, ScalarType::Double);
  Tensor grad_temperature = new_tensor(zhat, {}, ScalarType::Double);
  const cudaStream_t stream = current_stream(zhat);
  dispatch(zhat.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = typename Accumulator<S>::type;
    backward_kernel<S><<<blocks_of(num_local, kRows), kThreads, 0, stream>>>(data<double>(upstream), data<S>(source), data<T>(inv),
                                                                             data<double>(all_lse), dim, data<double>(temperature), shard,
                                                                             normalize_rows, data<T>(grad), data<double>(alignment));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  sum_kernel<<<1, kThreads, 0, stream>>>(
      data<double>(alignment), num_local, data<double>(grad_temperature),
      TemperatureGradient{data<double>(upstream), data<double>(temperature), static_cast<double>(num_rows)});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {accumulator == dtype ? grad : torch::stable::to(grad, dtype), grad_temperature};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor z, Tensor temperature, bool normalize_rows) {
  check_rows(z, "z");
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  auto [zhat, inv_norm] = normalize(z, normalize_rows);
  auto [row_loss, lse] = shard_forward(zhat, temperature, 0, 1);
  const ScalarType accumulator = accumulator_of(z.scalar_type());
  Tensor loss = new_tensor(z, {}, accumulator);
  const Mean mean{static_cast<double>(z.size(0))};
  if (accumulator == ScalarType::Double) {
    sum_kernel<<<1, kThreads, 0, current_stream(z)>>>(data<double>(row_loss), z.size(0), data<double>(loss), mean);
  } else {
    sum_kernel<<<1, kThreads, 0, current_stream(z)>>>(data<double>(row_loss), z.size(0), data<float>(loss), mean);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, zhat, inv_norm, lse};
}

std::tuple<Tensor, Tensor> backward(Tensor grad_loss, Tensor zhat, Tensor inv_norm, Tensor lse, Tensor temperature, bool normalize_rows,
                                    ScalarType dtype) {
  return shard_backward(grad_loss, zhat, inv_norm, lse, temperature, normalize_rows, 0, 1, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellfast, CUDA, m) {
  m.impl("ntxent_normalize", TORCH_BOX(&normalize));
  m.impl("ntxent_forward", TORCH_BOX(&forward));
  m.impl("ntxent_backward", TORCH_BOX(&backward));
  m.impl("ntxent_shard_forward", TORCH_BOX(&shard_forward));
  m.impl("ntxent_shard_backward", TORCH_BOX(&shard_backward));
}

}  // namespace cellfast::ntxent::cuda

// The CUDA backend's operators: checks, the kernels that all backends share (normalisation, sums) and the choice of the rest.
// Contract: ntxent/ntxent.h.
#include "ntxent/cuda/portable.h"
#include "ntxent/cuda/selection.h"
#include "ntxent/cuda/sm90/sm90.h"
#include "ntxent/cuda/tensors.cuh"

namespace cellfast::ntxent::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / 32;
constexpr int64_t kSumsPerBlock = 8 * kThreads;

// One warp per row.
template <typename S>
__global__ void normalize_kernel(const S* __restrict__ z, int64_t num_rows, int64_t dim, bool normalize, S* __restrict__ zhat,
                                 typename Accumulator<S>::type* __restrict__ inv_norm) {
  using T = typename Accumulator<S>::type;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  if (row >= num_rows) {
    return;
  }
  double squares = 0;
  for (int64_t k = lane; k < dim; k += 32) {
    const double value = static_cast<double>(load(z[row * dim + k]));
    squares += value * value;
  }
  for (int width = 16; width > 0; width /= 2) {
    squares += __shfl_xor_sync(0xffffffff, squares, width);
  }
  const double norm = sqrt(squares);
  const T scale = normalize ? static_cast<T>(1.0 / fmax(norm, kNormEps)) : T(1);
  if (lane == 0) {
    inv_norm[row] = normalize && norm < kNormEps ? T(0) : scale;
  }
  for (int64_t k = lane; k < dim; k += 32) {
    // A row with an infinity or a NaN is NaN throughout, as 0 * inf would not be everywhere.
    store(isfinite(norm) ? load(z[row * dim + k]) * scale : static_cast<T>(NAN), zhat[row * dim + k]);
  }
}

// The sum over the block's threads, in a fixed order; for thread 0.
__device__ double block_sum(double sum) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) {
      sums[threadIdx.x] += sums[threadIdx.x + width];
    }
    __syncthreads();
  }
  return sums[0];
}

// partial[block] = sum of this block's share of the values, in an order that depends on nothing but their number.
__global__ void partial_sums_kernel(const double* __restrict__ values, int64_t count, double* __restrict__ partial) {
  const int64_t begin = blockIdx.x * kSumsPerBlock;
  double sum = 0;
#pragma unroll
  for (int64_t i = threadIdx.x; i < kSumsPerBlock; i += kThreads) {
    sum += begin + i < count ? values[begin + i] : 0.0;
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
  }
}

// out = finish(sum of the values), by one block.
template <typename Out, typename Finish>
__global__ void sum_kernel(const double* __restrict__ values, int64_t count, Out* __restrict__ out, Finish finish) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += values[i];
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) {
    *out = static_cast<Out>(finish(total));
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

template <typename Out, typename Finish>
void sum(const Tensor& values, Out* out, const Finish& finish) {
  const int64_t count = values.numel();
  const cudaStream_t stream = current_stream(values);
  const unsigned int blocks = blocks_of(count, kSumsPerBlock);
  const Tensor partial = new_tensor(values, {blocks}, ScalarType::Double);
  partial_sums_kernel<<<blocks, kThreads, 0, stream>>>(data<double>(values), count, data<double>(partial));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sum_kernel<<<1, kThreads, 0, stream>>>(data<double>(partial), static_cast<int64_t>(blocks), out, finish);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The dispatcher comes here when any argument is a CUDA tensor: a pointer of another device must not reach a kernel.
void check_device(const Tensor& t, const Tensor& rows, const char* name) {
  if (!t.is_cuda() || t.get_device_index() != rows.get_device_index()) {
    fail(name, " must be on the device of the rows, cuda:", rows.get_device_index(), ", got ",
         t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : std::string("another kind of device"));
  }
}

void check_zhat(const Tensor& zhat, const Tensor& temperature, int64_t index, int64_t count) {
  check_rows(zhat, "zhat");
  check_device(zhat, zhat, "zhat");
  check_shard(zhat.size(0), index, count);
  check_temperature(temperature);
  check_device(temperature, zhat, "temperature");
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
    normalize_kernel<S><<<blocks_of(num_rows, kRowsPerBlock), kThreads, 0, current_stream(z)>>>(
        data<S>(source), num_rows, dim, normalize_rows, data<S>(zhat), data<typename Accumulator<S>::type>(inv_norm));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {zhat, inv_norm};
}

std::tuple<Tensor, Tensor> shard_forward(Tensor zhat, Tensor temperature, int64_t index, int64_t count) {
  check_zhat(zhat, temperature, index, count);
  const torch::stable::accelerator::DeviceGuard guard(zhat.get_device_index());
  const Tensor source = torch::stable::contiguous(zhat);
  return use_sm90(source) ? sm90::shard_forward(source, temperature, index, count)
                          : portable::shard_forward(source, temperature, index, count);
}

std::tuple<Tensor, Tensor> shard_backward(Tensor grad_loss, Tensor zhat, Tensor inv_norm, Tensor lse, Tensor temperature,
                                          bool normalize_rows, int64_t index, int64_t count, ScalarType dtype) {
  check_zhat(zhat, temperature, index, count);
  const torch::stable::accelerator::DeviceGuard guard(zhat.get_device_index());
  const int64_t num_rows = zhat.size(0);
  const ScalarType accumulator = accumulator_of(zhat.scalar_type());
  check_vector(inv_norm, num_rows / count, accumulator, "inv_norm");
  check_vector(lse, num_rows, ScalarType::Double, "lse");
  if (grad_loss.numel() != 1) {
    fail("grad_loss must be one number, got shape ", shape_of(grad_loss));
  }
  check_device(inv_norm, zhat, "inv_norm");
  check_device(lse, zhat, "lse");
  check_device(grad_loss, zhat, "grad_loss");
  const Tensor source = torch::stable::contiguous(zhat), inv = torch::stable::contiguous(inv_norm);
  const Tensor all_lse = torch::stable::contiguous(lse);
  const Tensor upstream = torch::stable::to(grad_loss, ScalarType::Double);
  const bool written_directly = dtype == zhat.scalar_type() || dtype == ScalarType::Float;
  auto [grad, alignment] =
      use_sm90(source) ? sm90::shard_backward(upstream, source, inv, all_lse, temperature, normalize_rows, index, count,
                                              written_directly ? dtype : ScalarType::Float)
                       : portable::shard_backward(upstream, source, inv, all_lse, temperature, normalize_rows, index, count);
  Tensor grad_temperature = new_tensor(zhat, {}, ScalarType::Double);
  sum(alignment, data<double>(grad_temperature),
      TemperatureGradient{data<double>(upstream), data<double>(temperature), static_cast<double>(num_rows)});
  return {grad.scalar_type() == dtype ? grad : torch::stable::to(grad, dtype), grad_temperature};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor z, Tensor temperature, bool normalize_rows) {
  check_rows(z, "z");
  check_device(z, z, "z");
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  auto [zhat, inv_norm] = normalize(z, normalize_rows);
  auto [row_loss, lse] = shard_forward(zhat, temperature, 0, 1);
  const ScalarType accumulator = accumulator_of(z.scalar_type());
  Tensor loss = new_tensor(z, {}, accumulator);
  const Mean mean{static_cast<double>(z.size(0))};
  if (accumulator == ScalarType::Double) {
    sum(row_loss, data<double>(loss), mean);
  } else {
    sum(row_loss, data<float>(loss), mean);
  }
  return {loss, zhat, inv_norm, lse};
}

std::tuple<Tensor, Tensor> backward(Tensor grad_loss, Tensor zhat, Tensor inv_norm, Tensor lse, Tensor temperature, bool normalize_rows,
                                    ScalarType dtype) {
  return shard_backward(grad_loss, zhat, inv_norm, lse, temperature, normalize_rows, 0, 1, dtype);
}

std::string kernel(std::string name) {
  return choose_kernel(name);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellfast, CUDA, m) {
  m.impl("ntxent_normalize", TORCH_BOX(&normalize));
  m.impl("ntxent_forward", TORCH_BOX(&forward));
  m.impl("ntxent_backward", TORCH_BOX(&backward));
  m.impl("ntxent_shard_forward", TORCH_BOX(&shard_forward));
  m.impl("ntxent_shard_backward", TORCH_BOX(&shard_backward));
}

// No argument is a tensor, so no device chooses the backend.
STABLE_TORCH_LIBRARY_IMPL(cellfast, CompositeExplicitAutograd, m) {
  m.impl("ntxent_cuda_kernel", TORCH_BOX(&kernel));
}

}  // namespace cellfast::ntxent::cuda
